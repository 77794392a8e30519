"""Which findings deserve a warning, when, and in which words."""

from collections.abc import Sequence

from bn_callbacks.report import BatchNormReport, LayerReport
from bn_callbacks.statistics.causes import (
    CORRELATED_BATCHES,
    DRIFTING,
    INFERENCE_MODE,
    MIXED_CALLS,
    NOISY,
    NON_FINITE,
    NOT_UPDATING,
    OUTLIERS,
    TINY_BATCH,
    UNEXPECTED_UPDATE,
    WARMING_UP,
)
from bn_callbacks.statistics.moving_average import start_weight

PATIENCE = 3.0
"""Memories of the average, `1/(1 − momentum)` updates, for which drift must last
before it is called more than the turbulence at the start of any training."""

WORSE = 2.0
"""How many times as large the lag must be for a finding to be repeated."""

TURBULENT = frozenset({DRIFTING, NOISY})
"""Causes that the start of any training may show for a while."""

UNCURABLE = frozenset(
    {
        CORRELATED_BATCHES,
        INFERENCE_MODE,
        MIXED_CALLS,
        OUTLIERS,
        TINY_BATCH,
        UNEXPECTED_UPDATE,
    }
)
"""Causes that recalibration does not cure."""


class Findings:
    """Decides what to say in one `fit`: each finding once, and again if it worsens.

    Args:
        threshold: Lag above which something is said.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._said: dict[str, float] = {}
        self._since: dict[str, int] = {}

    def messages(
        self,
        report: BatchNormReport,
        steps_left: int | None,
        is_corrected: bool = False,
    ) -> list[str]:
        """Texts of new findings.

        Args:
            report: The latest report.
            steps_left: Training steps still to come; None if unknown.
            is_corrected: Whether a callback corrects the statistics at the end, so
                that only what it cannot cure deserves a word.
        """
        groups: dict[str, list[LayerReport]] = {}
        for layer in report.lagging:
            if is_corrected and layer.cause not in UNCURABLE:
                continue
            if self._is_due(layer, steps_left):
                groups.setdefault(layer.cause, []).append(layer)
        turbulent = {layer.path for layer in report.lagging if layer.cause in TURBULENT}
        self._since = {
            path: since for path, since in self._since.items() if path in turbulent
        }
        messages = []
        for cause, layers in groups.items():
            size = layers[0].lag or 0.0
            if cause not in self._said or size > WORSE * self._said[cause] > 0:
                self._said[cause] = size
                messages.append(_message(layers, len(report.layers)))
        return messages

    def _is_due(self, layer: LayerReport, steps_left: int | None) -> bool:
        if steps_left == 0:
            return True
        momentum, updates = layer.momentum or 0.0, layer.updates or 0
        if layer.cause == WARMING_UP:
            # What is left of the start at the end, at least so many steps from now.
            if steps_left is None:
                return False
            return (layer.lag or 0) * start_weight(
                momentum, steps_left
            ) > self._threshold
        if layer.cause in TURBULENT:
            since = self._since.setdefault(layer.path, updates)
            memories = (updates - since) * (1 - momentum)
            return updates > since and memories >= PATIENCE
        return True


def _message(layers: Sequence[LayerReport], total: int) -> str:
    worst = layers[0]
    who = worst.path if len(layers) == 1 else f"worst {worst.path}"
    of = f"{len(layers)} of {total} BatchNormalization layers"
    if worst.cause in (INFERENCE_MODE, NOT_UPDATING):
        what = f"{of} never updated their statistics ({who})"
    elif worst.cause == NON_FINITE:
        what = f"{of} hold NaN or infinity ({who})"
    elif worst.lag is None:
        what = f"{of}: {who}"
    else:
        what = f"{of} lag, {who} by {worst.lag:.2f} standard deviations"
    return f"{what}. Likely cause: {worst.cause}. {worst.advice}"

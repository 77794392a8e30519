"""Decides which findings deserve a warning, when, and in which words."""

from collections.abc import Sequence

from bn_callbacks.report import BatchNormReport, LayerReport
from bn_callbacks.statistics.causes import (
    BATCH_DEPENDENT,
    CORRELATED_BATCHES,
    DRIFTING,
    INFERENCE_MODE,
    MIXED_CALLS,
    NOISY,
    NON_FINITE,
    NOT_UPDATING,
    OUTLIERS,
    RESCALED_INPUTS,
    STALE,
    TINY_BATCH,
    UNEXPECTED_UPDATE,
    WARMING_UP,
)
from bn_callbacks.statistics.moving_average import start_weight

PATIENCE = 3.0
"""How long drift must last to be more than the turbulence at the start of any training,
in memories `1/(1 − momentum)` of the average."""

WORSE = 2.0
"""Factor by which a lag must grow for its finding to be repeated."""

TURBULENT = frozenset({DRIFTING, NOISY, STALE})
"""Causes that any training may show at its start."""

UNCURABLE = frozenset(
    {
        BATCH_DEPENDENT,
        CORRELATED_BATCHES,
        INFERENCE_MODE,
        MIXED_CALLS,
        OUTLIERS,
        RESCALED_INPUTS,
        TINY_BATCH,
        UNEXPECTED_UPDATE,
    }
)
"""Causes that recalibration does not cure."""

FACTS = frozenset({INFERENCE_MODE, NON_FINITE, NOT_UPDATING})
"""Causes that are facts, not estimates, and so need no second look."""

CLEAR = 2.0
"""At the end of a training that was healthy at every look before, how many times the
threshold a lag must be to be believed, and how many times the recalibrated loss that in
inference mode. Healthy trainings have ended with 1.4 (tests/benchmarks/limits.py)."""


class WarningFilter:
    """Decides what to warn of in one `fit`: each finding once, again if it worsens.

    A finding at one epoch's end may be chance. So the warning waits until the next end
    shows it too, or until training ends. If all looks before found nothing, the last
    one must be clear.

    Args:
        threshold: Lag above which to warn.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._said: dict[str, float] = {}
        self._since: dict[str, int] = {}
        self._before: frozenset[str] = frozenset()
        self._looks = 0
        self._has_found = False

    def messages(
        self,
        report: BatchNormReport,
        steps_left: int | None,
        is_corrected: bool = False,
    ) -> list[str]:
        """Returns the texts of the warnings that are due.

        Args:
            report: The latest report.
            steps_left: Training steps still to come; None if unknown.
            is_corrected: Whether a callback corrects the statistics at the end; then
                only what it cannot cure is due.
        """
        is_last = steps_left == 0
        is_lonely = is_last and self._looks > 1 and not self._has_found
        found = report.lagging
        groups: dict[str, list[LayerReport]] = {}
        for layer in found:
            if is_corrected and layer.cause not in UNCURABLE:
                continue
            is_sure = is_last or layer.cause in self._before or layer.cause in FACTS
            if is_lonely and not self._is_clear(layer, report):
                is_sure = False
            if self._is_due(layer, steps_left) and is_sure:
                groups.setdefault(layer.cause, []).append(layer)
        turbulent = {layer.path for layer in found if layer.cause in TURBULENT}
        self._since = {
            path: since for path, since in self._since.items() if path in turbulent
        }
        self._before = frozenset(layer.cause for layer in found)
        self._has_found = self._has_found or bool(found)
        self._looks += 1
        messages = []
        for cause, layers in groups.items():
            size = layers[0].lag or 0.0
            if cause not in self._said or size > WORSE * self._said[cause] > 0:
                self._said[cause] = size
                messages.append(_message(layers, report))
        return messages

    def _is_clear(self, layer: LayerReport, report: BatchNormReport) -> bool:
        """Whether a finding is so large that it needs no second look."""
        if layer.cause not in TURBULENT:
            return True
        consistent, inference = report.loss_recalibrated, report.loss_inference
        if consistent is not None and inference is not None:
            return not inference < CLEAR * consistent
        return (layer.lag or 0.0) > CLEAR * self._threshold

    def _is_due(self, layer: LayerReport, steps_left: int | None) -> bool:
        if steps_left == 0:
            return True
        momentum, updates = layer.momentum or 0.0, layer.updates or 0
        if layer.cause == WARMING_UP:
            # At the end, in at least so many updates, this much of the lag is left.
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


def _message(layers: Sequence[LayerReport], report: BatchNormReport) -> str:
    """Says what happened, how sure that is, and what to do; shows the worst layer."""
    worst = layers[0]
    who = worst.path if len(layers) == 1 else f"worst {worst.path}"
    of = f"{len(layers)} of {len(report.layers)} BatchNormalization layers"
    if worst.cause in (INFERENCE_MODE, NOT_UPDATING):
        what = f"{of} never updated their statistics ({who})"
    elif worst.cause == NON_FINITE:
        what = f"{of} hold NaN or infinity ({who})"
    elif worst.lag is None:
        what = f"{of}: {who}"
    else:
        what = f"{of} lag, {who} by {worst.lag:.2f} standard deviations"
    line = report.loss_line
    proof = f"{line[0].upper()}{line[1:]}. " if line else ""
    return f"{what}. {proof}Likely cause: {worst.cause}. {worst.advice}"

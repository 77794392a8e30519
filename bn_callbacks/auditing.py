"""`audit`: compares a model's BN statistics with data, or inspects them alone."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from bn_callbacks.evidence import evidence_of
from bn_callbacks.layers import (
    BatchNormLayer,
    LayerSelection,
    calls_of,
    check_model,
    count_inputs,
    find,
    read,
    read_replicas,
    steps_made,
    team_of,
)
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Measurement, Population
from bn_callbacks.measuring.probe import EachBatch, three_losses
from bn_callbacks.measuring.reach import split
from bn_callbacks.measuring.rescaling import input_map
from bn_callbacks.report import BatchNormReport, layer_reports
from bn_callbacks.statistics.affine import InputMap
from bn_callbacks.statistics.losses import Family, Losses
from bn_callbacks.statistics.moments import Statistics, is_finite
from bn_callbacks.statistics.scatter import Scatter


def audit(
    model: keras.Model,
    x: Any = None,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    layers: LayerSelection = None,
) -> BatchNormReport:
    """Compares a model's BN statistics with data, and changes nothing.

    Args:
        model: A built Keras model.
        x: Training data as `fit` takes them, or `None`, the default, to inspect the
            stored statistics alone. If the data have targets and the model is compiled,
            `audit` measures the loss in both modes too.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        layers: Which layers, as `recalibrate` takes them; all by default.

    Returns:
        A `BatchNormReport`. For each layer, `lag` is the distance between its stored
        statistics and those of the batches; `residual` is the distance to the
        statistics of its input in inference mode, which recalibrating would remove. A
        model without BN layers gives an empty report. A layer that nothing calls has no
        lag and no cause.

    Raises:
        TypeError: `model` is not a Keras 3 model.
        ValueError: The data are empty, endless, not finite or of a wrong structure.

    Examples:
        >>> import keras, numpy as np
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.BatchNormalization(epsilon=0.001)]
        ... )
        >>> report = audit(model, np.random.default_rng(0).normal(5, 1, (256, 4)))
        >>> 4.8 < report.max_lag < 5.2
        True
    """
    check_model(model)
    found = find(model, layers)
    stored = read(found)
    if x is None or not found:
        return report_on(found, stored, model)
    team = team_of(model)
    with team.agreed():
        batches = Batches(
            x, batch_size=batch_size, steps=steps, inputs=count_inputs(model)
        ).by_rows()
        has_loss = bool(model.compiled) and batches.peek()[1] is not None
        targets, *_ = split(model, found, batches)
        in_inference = Population(model, found)
        by_batch = Population(model, targets, loss=has_loss, penalties=False)
        solver = Population(model, targets)
    in_inference.share(batches)
    seen = Seen()
    # Replicas of other workers may store something else.
    if team.everywhere(is_finite(stored)):
        # Frozen layers, and layers that never train, have no batch mode.
        seen.in_inference(found, in_inference.measure(batches, stored))
    losses = None
    if targets or has_loss:
        each = EachBatch(targets)
        batch = by_batch.measure(batches, until=each.until)
        seen.in_batches(targets, batch, each.scatter)
        if has_loss:
            losses = three_losses(
                by_batch, solver, batches, read(targets), batch
            ).losses
    seen.input_map = input_map(
        model, in_inference, batches, stored, seen.batch, is_thorough=True
    )
    return report_on(found, stored, model, seen, losses)


@dataclass
class Seen:
    """What passes over data have measured at some layers.

    Args:
        batch: Pooled statistics of each layer's input in batch mode.
        inferred: Statistics of each layer's input in inference mode.
        scatter: How single batches differ.
        share: Variance of the pooled statistics over that of one batch's.
        batch_size: Examples per batch.
        input_map: What was done to the data, if that is proven.
        has_run: Whether the data went through the model.
    """

    batch: dict[BatchNormLayer, Statistics] = field(default_factory=dict)
    inferred: dict[BatchNormLayer, Statistics] = field(default_factory=dict)
    scatter: dict[BatchNormLayer, Scatter | None] = field(default_factory=dict)
    share: float | None = None
    batch_size: float | None = None
    input_map: InputMap | None = None
    has_run: bool = False

    def in_inference(
        self, layers: Sequence[BatchNormLayer], measured: Measurement
    ) -> None:
        """Adds the results of a pass in inference mode."""
        self.inferred.update(_reached(layers, measured))
        self.batch.update(self.inferred)
        self._note(measured)

    def in_batches(
        self,
        layers: Sequence[BatchNormLayer],
        measured: Measurement,
        scatter: dict[BatchNormLayer, Scatter | None],
    ) -> None:
        """Adds the results of a pass in batch mode, and how its batches differed."""
        self.batch.update(_reached(layers, measured))
        self.scatter.update(scatter)
        self._note(measured)

    def _note(self, measured: Measurement) -> None:
        self.has_run = True
        self.share = 1 / max(measured.batches, 1)
        self.batch_size = measured.samples / max(measured.batches, 1)

    def evidence(self, bn: BatchNormLayer) -> dict[str, Any]:
        """What is known of a layer, by the names of `Evidence`."""
        return {
            "batch": self.batch.get(bn),
            "inferred": self.inferred.get(bn),
            "scatter": self.scatter.get(bn),
            "batch_share": self.share,
            "batch_size": self.batch_size,
            "is_called": not self.has_run or bn in self.batch,
            "input_map": self.input_map,
        }


def _reached(
    layers: Sequence[BatchNormLayer], measured: Measurement
) -> dict[BatchNormLayer, Statistics]:
    return {
        bn: moments.statistics
        for bn, moments in zip(layers, measured.moments, strict=True)
        if not moments.is_empty
    }


def report_on(
    layers: Sequence[BatchNormLayer],
    stored: Sequence[Statistics],
    model: keras.Model,
    seen: Seen | None = None,
    losses: Losses | None = None,
) -> BatchNormReport:
    """Makes a report on stored statistics, compared with data if there are any."""
    seen = seen or Seen()
    steps = steps_made(model)
    family = Family.UNKNOWN if losses is None else losses.family
    evidence = []
    for bn, moving, each, calls in zip(
        layers,
        stored,
        read_replicas(model, layers),
        calls_of(model, layers),
        strict=True,
    ):
        one = evidence_of(
            bn,
            moving,
            start=bn.initial,
            replicas=each,
            has_mixed_calls=(calls.updates or 1) > 1,
            trains=calls.trains,
            family=family,
            **seen.evidence(bn),
        )
        updates = None
        if steps == 0 and one.is_initial:
            updates = 0
        elif steps and calls.updates is not None and bn.trainable:
            # A frozen layer may have been trained, and frozen later.
            updates = steps * calls.updates
        is_still = bool(steps) and one.is_initial
        evidence.append(dataclasses.replace(one, updates=updates, is_still=is_still))
    return BatchNormReport.of(layer_reports(evidence), losses)

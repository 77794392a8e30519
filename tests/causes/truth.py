"""What is really wrong in a case, found without any diagnosis.

Three counterfactuals tell the causes apart: the loss gap as it is; the gap with the
start values taken out of the moving statistics, which cures `warming_up` alone; and
the gap after training has gone on with a learning rate of 0, which cures what the
movement of the weights has caused, but not what the batches cause.
"""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from kit import Case, Run, build

from bn_callbacks.layers import count_inputs, find, read
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.statistics.moments import Statistics

GAP = 1.4
"""A loss gap from which on something is wrong."""

MEMORIES = 4
"""Memories of the average, `1/(1 − momentum)` updates, until it has settled."""

MAX_UPDATES = 2000

MOVES = {"inference_mode": False, "not_updating": False, "unexpected_update": True}
"""Whether training moves the statistics, where that makes the cause."""

WEIGHTS = ("drifting", "weights_replaced")
"""Causes that go as soon as the weights stand still."""


@dataclass(frozen=True)
class Losses:
    """Losses on the probe, everything but BN in inference mode.

    Args:
        inference: In inference mode.
        batch: With batch statistics.
        recalibrated: In inference mode, after one pass over the probe.
        trivial: Of a constant prediction, where there is one target.
    """

    inference: float
    batch: float
    recalibrated: float
    trivial: float

    @property
    def gap(self) -> float:
        return self.inference / self.batch


def losses(run: Run, batch_size: int | None = None) -> Losses:
    """Measures the losses of a trained model.

    Args:
        run: The run, trained.
        batch_size: Examples in a batch; those of the training by default.
    """
    trivial = constant(run.probe[1])
    found = find(run.model)
    if not found:
        loss = float(run.model.evaluate(*run.probe, verbose=0))
        return Losses(loss, loss, loss, trivial)
    stored = read(found)
    population = Population(run.model, found, loss=True)
    batches = Batches(
        run.probe,
        batch_size=batch_size or run.batch_size,
        inputs=count_inputs(run.model),
    )
    first = population.measure(batches)
    pooled = [Statistics(m.mean, m.variance) for m in first.moments]
    recalibrated = population.measure(batches, pooled).loss
    is_finite = all(np.isfinite(part).all() for layer in stored for part in layer)
    inference = population.measure(batches, stored).loss if is_finite else math.nan
    return Losses(inference, first.loss, recalibrated, trivial)


def constant(targets: Any) -> float:
    """The loss of the best constant prediction."""
    if isinstance(targets, list):
        return math.nan
    if targets.dtype.kind == "i":
        shares = np.bincount(targets) / len(targets)
        shares = shares[shares > 0]
        return float(-(shares * np.log(shares)).sum())
    return float(targets.var())


@dataclass(frozen=True)
class Truth:
    """What was found of a case.

    Args:
        losses: As trained, in the batches of the training.
        in_32: As trained, in batches of 32.
        has_moved: Whether training moved any statistics.
        debiased: Gap without the start values; None where that means nothing.
        settled: Gap after more training with a learning rate of 0; None where that
            means nothing.
    """

    losses: Losses
    in_32: Losses
    has_moved: bool
    debiased: float | None
    settled: float | None

    def is_as(self, case: Case) -> bool:
        """Whether the case has the trouble that it claims, and shows it."""
        low, high = case.gap or (-math.inf, math.inf)
        gap, cause = self.losses.gap, case.expected
        if cause == "non_finite":
            return math.isnan(gap) and math.isfinite(self.losses.batch)
        if not low <= gap <= high:
            return False
        if not case.scored:
            return True
        if cause is None:
            return not self.losses.inference > self.losses.trivial / 2
        if cause in MOVES:
            return self.has_moved == MOVES[cause]
        if gap < GAP:
            return True
        assert self.debiased is not None
        assert self.settled is not None
        if cause == "warming_up":
            return self.debiased < gap / 2 and self.settled < GAP
        is_about_weights = self.settled < GAP
        return self.debiased >= GAP and is_about_weights == (cause in WEIGHTS)


def examine(case: Case) -> Truth:
    """Trains a case, and then does what tells its cause."""
    made = build(case)
    layers = [bn.layer for bn in find(made.model)]
    start, before = state(layers), updates(made.model)
    made.fit([])
    end, count = state(layers), updates(made.model) - before
    has_moved = any(not np.array_equal(a, b) for a, b in zip(start, end, strict=True))
    as_is, in_32 = losses(made), losses(made, 32)
    debiased = settled = None
    if case.expected and case.scored and np.isfinite(as_is.gap) and has_moved:
        weights = [layer.momentum**count for layer in layers for _ in range(2)]
        values = [
            (b - w * a) / (1 - w) for a, b, w in zip(start, end, weights, strict=True)
        ]
        put(layers, values)
        debiased = losses(made).gap
        put(layers, end)
        settled = settle(made, layers, count)
    return Truth(as_is, in_32, has_moved, debiased, settled)


def settle(run: Run, layers: list[Any], count: int) -> float:
    """The gap when the averages have forgotten how the weights have moved.

    Args:
        run: The run, trained.
        layers: Its BN layers.
        count: Updates that a call of `fit` makes.
    """
    optimizers = [run.model.optimizer, getattr(run.model, "other", None)]
    for optimizer in filter(None, optimizers):
        getattr(optimizer, "inner_optimizer", optimizer).learning_rate = 0.0
    momentum = max(layer.momentum for layer in layers)
    wanted = min(MAX_UPDATES, MEMORIES / (1 - momentum))
    for _ in range(math.ceil(wanted / count)):
        run.fit([])
    return losses(run).gap


def state(layers: list[Any]) -> list[Any]:
    """Means and variances of all layers, one after the other."""
    return [
        keras.ops.convert_to_numpy(variable).astype("float64")
        for layer in layers
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def put(layers: list[Any], values: list[Any]) -> None:
    """Writes what `state` returns."""
    for layer, mean, variance in zip(layers, values[::2], values[1::2], strict=True):
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(np.maximum(variance, 0))


def updates(model: keras.Model) -> int:
    """Training steps made, micro-batches included."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return int(keras.ops.convert_to_numpy(optimizer._iterations))

"""Measures a model's loss on a sample, with three kinds of statistics: B, I and R."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.layers import BatchNormLayer, count_inputs, find, read
from bn_callbacks.measuring.consistent import consistent, known, lags, storable
from bn_callbacks.measuring.data import Batches, is_endless
from bn_callbacks.measuring.mix import Mix
from bn_callbacks.measuring.one_pass import Measurement, Population, Until
from bn_callbacks.measuring.progress import Progress
from bn_callbacks.measuring.sample import (
    KeptBatches,
    Sample,
    examples_in,
    sample_size,
)
from bn_callbacks.statistics.losses import Losses
from bn_callbacks.statistics.moments import Moments, Statistics, is_finite
from bn_callbacks.statistics.scatter import Scatter, scatter

SOLVED = 0.01
"""Largest residual, in standard deviations, of the statistics of R. Where each layer is
called once, a millionth is left (tests/benchmarks/limits.py)."""

MOST_PASSES = 4
"""Largest number of passes for the statistics of R, where one does not find them. It
bounds what R costs beside B and I at each epoch's end (docs/benchmarks.md)."""

SAMPLE = 512
"""A probe keeps the first batches of a dataset, up to about so many examples."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a probe has measured.

    Args:
        losses: The three losses.
        inferred: Statistics of each layer's input in inference mode.
        scatter: How the batches differ at each layer.
    """

    losses: Losses
    inferred: dict[BatchNormLayer, Statistics]
    scatter: dict[BatchNormLayer, Scatter | None]

    def design_effect(self, bn: BatchNormLayer) -> float | None:
        """Variance of a layer's batch means, over that of random samples."""
        found = self.scatter.get(bn)
        if found is None:
            return None
        return found.mean * max(float(self.losses.weights.mean()) - 1, 0.0)


class EachBatch:
    """Keeps the moments of each batch of a pass.

    Args:
        layers: The layers that are measured.
    """

    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self._layers = list(layers)
        self._batches: list[list[Moments]] = []

    def until(self) -> Until:
        """Makes the function that a pass calls with each batch; never ends the pass."""
        self._batches.clear()

        def keep(batch: list[Moments], examples: int) -> bool:
            self._batches.append(batch)
            return False

        return keep

    def of(self, index: int) -> list[Moments]:
        """The moments at the `index`-th layer of all batches that reach it."""
        return [each[index] for each in self._batches if not each[index].is_empty]

    @property
    def scatter(self) -> dict[BatchNormLayer, Scatter | None]:
        """How the batches differ, for each layer that the data reach."""
        found = {}
        for index, bn in enumerate(self._layers):
            if parts := self.of(index):
                means = np.stack([part.mean for part in parts])
                variances = np.stack([part.variance for part in parts])
                found[bn] = scatter(Statistics(means, variances), bn.epsilon)
        return found


class Probe:
    """A model's loss on a sample of data, in the modes of its BN layers.

    Args:
        model: A compiled model.
        data: Data with targets, as `fit` takes them. Arrays are used whole; of data in
            batches, the first ones with about 512 examples.
        layers: BN layers whose mode changes; by default all that are not frozen.

    Raises:
        ValueError: The data have no targets, or the model has no loss.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Any,
        layers: list[BatchNormLayer] | None = None,
    ) -> None:
        self._inputs = count_inputs(model)
        self._data, self._comes_in_batches = _sample(data, self._inputs)
        self._batches = Batches(self._data, inputs=self._inputs)
        has_targets = self._batches.peek()[1] is not None
        if not (model.compiled and has_targets):
            raise ValueError(
                "Measuring a loss needs data with targets and a compiled model. "
                f"Received: compiled={bool(model.compiled)}, targets={has_targets}. "
                "Pass (x, y), and compile the model with a loss."
            )
        if layers is None:
            layers = [bn for bn in find(model) if bn.trainable]
        self._model = model
        self.layers = layers
        self._population = Population(model, layers, loss=True, penalties=False)
        self._solver = Population(model, layers)
        self._validation: Population | None = None
        self._is_shared = False

    def measure(self, batch_size: float | None = None) -> ProbeResult:
        """Measures B, I and R in passes over the sample.

        Args:
            batch_size: Examples per batch in training, if known: then B has batch
                statistics like those of training. Ignored for data in batches.
        """
        if batch_size is not None and not self._comes_in_batches:
            size = max(1, round(batch_size))
            self._batches = Batches(self._data, batch_size=size, inputs=self._inputs)
            self._is_shared = False
        self._share()
        return three_losses(
            self._population, self._solver, self._batches, read(self.layers)
        )

    def inference_loss(self, statistics: list[Statistics]) -> float | None:
        """The loss that `evaluate` would give if the layers stored these statistics."""
        if self._validation is None:
            self._validation = Population(self._model, self.layers, loss=True)
        self._share()
        # Replicas of other workers may store something else.
        if not self._validation.team.everywhere(is_finite(statistics)):
            return math.nan
        return self._validation.measure(self._batches, statistics).loss

    def _share(self) -> None:
        if not self._is_shared:
            self._population.share(self._batches)
            self._is_shared = True


def three_losses(
    population: Population,
    solver: Population,
    batches: Batches,
    stored: list[Statistics],
    by_batch: Measurement | None = None,
) -> ProbeResult:
    """Measures B, I and R on the same batches, and each layer's input in inference.

    Args:
        population: Measures the loss as well.
        solver: The same layers, without the loss.
        batches: Data with targets.
        stored: What the layers store.
        by_batch: The result of an earlier pass in batch mode; by default makes one.
    """
    layers = population.layers
    each = EachBatch(layers)
    if by_batch is None:
        by_batch = population.measure(batches, until=each.until)
    inferred: dict[BatchNormLayer, Statistics] = {}
    of_inference = np.full(len(by_batch.losses), np.nan)
    if population.team.everywhere(is_finite(stored)):
        inference = population.measure(batches, stored)
        of_inference = inference.losses[:, 0]
        inferred = {
            bn: moments.statistics
            for bn, moments in zip(layers, inference.moments, strict=True)
            if not moments.is_empty
        }
    of_consistent = of_inference
    if not all(moments.is_empty for moments in by_batch.moments):
        of_consistent = _consistent_losses(population, solver, batches, stored)
        if not len(of_consistent):
            of_consistent = np.full(len(of_inference), np.nan)
    columns = by_batch.losses[:, 0], of_inference, of_consistent, by_batch.losses[:, 1]
    b, i, r, weights = _gather(population, np.stack(columns, axis=1)).T
    losses = Losses(b, i, r if np.isfinite(r).all() else None, weights)
    return ProbeResult(losses, inferred, each.scatter)


def _consistent_losses(
    population: Population,
    solver: Population,
    batches: Batches,
    stored: list[Statistics],
) -> NDArray[np.float64]:
    """R of each batch; empty if activations overflow with all statistics tried."""
    start = [
        one if is_finite([one]) else bn.initial
        for bn, one in zip(solver.layers, stored, strict=True)
    ]
    # Run as one batch, a sample solves itself. The next pass checks that it did.
    given = _solved(solver, batches, start)
    if given is not None:
        measured = population.measure(batches, given)
        residual = known(lags(solver.layers, measured.moments, given)) or 0.0
        if residual <= SOLVED:
            return measured.losses[:, 0]
    try:
        progress = Progress(False, batches.length)
        given = consistent(
            solver, batches, start, limit=SOLVED, passes=MOST_PASSES, progress=progress
        ).statistics
    except ValueError:
        return np.zeros(0)
    return population.measure(batches, given).losses[:, 0]


def _solved(
    solver: Population, batches: Batches, start: list[Statistics]
) -> list[Statistics] | None:
    """The statistics of all batches run as one; None if that fails."""
    if solver.team.size > 1 or not solver.takes_any_batch:
        return None
    first = next(iter(batches))
    most = sample_size(solver.bytes_of_example(first), examples_in(first))
    batch = Sample(batches, lambda _: most, from_all=True).batch()
    if batch is None:
        return None
    try:
        moments = solver.run(batch, Mix.of_batch(solver.channels))
    except (ValueError, tf.errors.OpError):
        return None
    return storable(solver.layers, moments, start)


def is_probe(data: Any) -> bool:
    """Whether data may be a probe, with targets beside them or in their batches."""
    if isinstance(data, tuple):
        return len(data) in (2, 3)
    return isinstance(data, (tf.data.Dataset, keras.utils.PyDataset, Iterator))


def _sample(data: Any, inputs: int | None) -> tuple[Any, bool]:
    """The part of the data that a probe uses, and whether it comes in batches."""
    if not isinstance(data, (tf.data.Dataset, keras.utils.PyDataset, Iterator)):
        return data, False
    has_end = not (isinstance(data, Iterator) or is_endless(data))
    kept, count = [], 0
    for batch in Batches(data, steps=None if has_end else SAMPLE, inputs=inputs):
        kept.append(batch)
        # `Batches` refuses an item that is no batch later, and says why.
        count += examples_in(batch) or SAMPLE
        if count >= SAMPLE:
            break
    return KeptBatches(kept), True


def _gather(population: Population, own: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows of all workers, which may have different numbers of rows."""
    team = population.team
    if team.workers == 1:
        return own
    counts = team.gather(np.array([float(len(own))]))[:, 0].astype(int)
    padded = np.zeros((counts.max(), own.shape[1]))
    padded[: len(own)] = own
    rows = team.gather(padded.ravel()).reshape(len(counts), *padded.shape)
    return np.concatenate([row[:n] for row, n in zip(rows, counts, strict=True)])

"""Makes one pass over data, and pools the moments of every BN layer's input."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.layers import (
    BatchNormLayer,
    memory_of,
    structure_of,
    takes_any_batch,
    team_of,
)
from bn_callbacks.measuring.data import Batch, Batches, Source, naming_batch
from bn_callbacks.measuring.mix import Mix
from bn_callbacks.measuring.sample import examples_in
from bn_callbacks.measuring.traced import Traced
from bn_callbacks.statistics.moments import Moments, Statistics, pool, pool_batches
from bn_callbacks.statistics.sampling import design_effect

Until: TypeAlias = Callable[[list[Moments], int], bool]
"""Gets the moments and the number of examples of each batch; True ends the pass."""

Show: TypeAlias = Callable[[int], None]
"""Is called with the number of batches read so far."""

# Sums in float32 leave the mean off by up to about 4e-6 of itself (measured). Beyond
# this ratio of mean to σ, that error matters.
FAST_LIMIT = 200.0

_Pending: TypeAlias = tuple[list[int], list[int], tuple[Any, ...]]

MAX_PENDING = 16
"""Batches whose results may wait on the device before they are fetched."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """The result of one pass.

    Args:
        moments: Count, mean and M2 of each layer's input, per channel; counts of 0
            for a layer that the data never reached.
        loss: Mean loss over the samples; None if it was not measured.
        batches: Number of batches read, by all workers.
        samples: Number of samples read.
        own_batches: Number of batches that this worker has read.
        losses: Mean loss and number of samples of each batch that this worker has
            read, `(batches, 2)`.
        design_effect: Variance of this worker's batch means at the first layer, over
            that of random samples. Random samples have 1 at most, apart from chance.
            None if unknown.
    """

    moments: list[Moments]
    loss: float | None
    batches: int
    samples: int
    own_batches: int
    losses: NDArray[np.float64]
    design_effect: float | None = None


@dataclass(frozen=True, eq=False)
class _Results:
    """What the traced function returned for some batches, on the host.

    Args:
        numbers: The place of each batch in the data.
        sizes: The number of examples in each batch.
        counts: Counts of each batch, of all entries in one row.
        means: The same of the means.
        variances: The same of the variances.
        losses: Sum and number of the losses of each batch.
        late: Moments from inside loops and branches, of each batch, by layer.
    """

    numbers: list[int]
    sizes: list[int]
    counts: NDArray[np.float64]
    means: NDArray[np.float64]
    variances: NDArray[np.float64]
    losses: NDArray[np.float64]
    late: dict[int, list[Moments]]

    def batch(self, index: int) -> "_Results":
        """The results of one batch."""
        one = slice(index, index + 1)
        return _Results(
            self.numbers[one],
            self.sizes[one],
            self.counts[one],
            self.means[one],
            self.variances[one],
            self.losses[one],
            {layer: moments[one] for layer, moments in self.late.items()},
        )


class Population:
    """Measures the inputs of BN layers in passes over data.

    BN layers normalise with the statistics of each batch, with given ones, or with a
    `Mix` of both; everything else runs in inference mode. Nothing in the model is
    written. A pass pools the moments of batches in float64, weighted by the number of
    elements. One trace, kept with the model, serves all three ways and batches of any
    size. Results stay on the device and are fetched several at a time.

    In a distribution strategy each replica works on whole batches of its own, so that
    the result is that of a single device. A pass pools the data of all workers.

    Args:
        model: A built Keras model.
        layers: The layers to measure. Other BN layers use what they store.
        dropout: Whether dropout, noise and augmentation layers are active.
        loss: Whether to measure the model's loss as well.
        penalties: Whether the loss includes the penalties that layers add.

    Attributes:
        order: Indices of the layers in the order of their first calls, known after a
            pass.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[BatchNormLayer],
        *,
        dropout: bool = False,
        loss: bool = False,
        penalties: bool = True,
    ) -> None:
        self.layers = list(layers)
        self.team = team_of(model)
        self.channels = sum(bn.channels for bn in layers)
        self.takes_any_batch = takes_any_batch(model)
        self._model = model
        self._options = {"dropout": dropout, "loss": loss, "penalties": penalties}
        self.order: list[int] = []
        self._is_fast = True
        self._entry: int | None = None

    def measure(
        self,
        batches: Source,
        statistics: Sequence[Statistics] | None = None,
        *,
        until: Callable[[], Until] | None = None,
        show: Show | None = None,
    ) -> Measurement:
        """Reads the batches once; all workers do, and get the same measurement.

        Args:
            batches: The data. They are read twice if their mean is far from 0.
            statistics: What each layer normalises with; `None` for the statistics
                of each batch.
            until: Makes a function that is called with each batch's moments and number
                of examples, and ends the pass (on all workers) by returning True.
            show: Is called with the number of batches read so far.

        Returns:
            The measurement.

        Raises:
            ValueError: The data do not fit the model, or the input of a layer is
                not finite in some batch. Given statistics may themselves make
                activations overflow: with them, only an input that depends on no
                statistics raises; other layers get moments that are not finite.
            RuntimeError: Another worker has failed.
        """
        result = self.read(batches, statistics, until=until, show=show)
        if self.becomes_exact(result.moments):
            result = self.read(batches, statistics, until=until, show=show)
        return result

    def becomes_exact(self, moments: Sequence[Moments]) -> bool:
        """Switches to exact sums if those in float32 are too rough; True if it does."""
        if not self._is_fast:
            return False
        for bn, one in zip(self.layers, moments, strict=True):
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = np.abs(one.mean) / np.sqrt(one.variance + bn.epsilon)
            if np.max(ratio, initial=0, where=one.count > 0) > FAST_LIMIT:
                self._is_fast = False
        return not self._is_fast

    def share(self, batches: Batches) -> None:
        """Divides the data among the workers, if all have the same.

        They are the same if their first batches are equal, bit for bit. Otherwise each
        worker already has its own share.
        """
        if self.team.workers > 1:
            with self.team.agreed():
                own = batches.checksum()
            sums = self.team.gather(np.array([own]))
            if (sums == sums[0]).all():
                batches.share(self.team.worker, self.team.workers)

    def read(
        self,
        batches: Source,
        statistics: Sequence[Statistics] | None = None,
        *,
        until: Callable[[], Until] | None = None,
        show: Show | None = None,
    ) -> Measurement:
        """Reads the batches once, as `measure` does, but never a second time."""
        mix = self._tensor(
            Mix.of_batch(self.channels) if statistics is None else Mix.given(statistics)
        )
        is_fixed = statistics is not None
        is_enough = until() if until is not None else None
        pooled = [Moments.empty(bn.channels) for bn in self.layers]
        losses: list[NDArray[np.float64]] = []
        entry_means: list[Moments] = []
        source = iter(batches)
        count = samples = 0

        def take(traced: Traced, pending: list[_Pending]) -> bool:
            """Pools the pending results; returns whether these are enough."""
            nonlocal pooled
            if not pending:
                return False
            results = _fetch(traced, pending, self.team.replicas)
            pending.clear()
            each = [results]
            if is_enough is not None:
                each = [results.batch(index) for index in range(len(results.numbers))]
            for one in each:
                new = self._moments(traced, one, is_fixed)
                pooled = [
                    old.merge(part) for old, part in zip(pooled, new, strict=True)
                ]
                losses.append(one.losses)
                entry_means.append(_entry_means(traced, one))
                if is_enough is not None and is_enough(new, sum(one.sizes)):
                    return True
            return False

        def work(traced: Traced) -> tuple[bool, bool]:
            """Reads some batches; returns whether the data ended, and if enough."""
            nonlocal count, samples
            pending: list[_Pending] = []
            for _ in range(MAX_PENDING):
                group = list(itertools.islice(source, self.team.replicas))
                if not group:
                    return True, take(traced, pending)
                numbers = [batches.number(count + i) for i in range(len(group))]
                with naming_batch(self._model, group[0][0], numbers[0]):
                    sizes = [examples_in(batch) for batch in group]
                    pending.append((numbers, sizes, traced(group, mix, count)))
                count += len(group)
                samples += sum(sizes)
                if show is not None:
                    show(batches.read(count))
                if (is_enough is not None or traced.late) and take(traced, pending):
                    return False, True
            return False, take(traced, pending)

        with self._traced() as traced:
            while True:
                with self.team.agreed():
                    ended, enough = work(traced)
                if self.team.everywhere(ended or enough):
                    break
        read = batches.read(count)
        each = np.concatenate([np.zeros((0, 2)), *losses])
        rows = self.team.gather(_flat([read, samples, *each.sum(axis=0)], pooled))
        each[:, 0] /= np.where(each[:, 1], each[:, 1], 1.0)
        result = _measurement(rows, self.layers, read, each)
        if self._entry is None or not count:
            return result
        whole, size = pooled[self._entry], samples / count
        design = design_effect(pool(entry_means), whole, size)
        return replace(result, design_effect=design)

    def run(self, batch: Batch, mix: Mix) -> list[Moments]:
        """Runs one batch on the chief's first replica; all workers get its moments.

        Raises:
            ValueError: As `measure`.
            tf.errors.OpError: The batch takes more memory than there is.
        """
        with self.team.agreed(), self._traced() as traced:
            with naming_batch(self._model, batch[0], 0):
                sizes = [examples_in(batch)]
                pending = [([0], sizes, traced([batch], self._tensor(mix), 0))]
            results = _fetch(traced, pending, self.team.replicas)
            moments = self._moments(traced, results, is_fixed=True)
        chief = self.team.gather(_flat([1, 0, 0, 0], moments))[:1]
        return _measurement(chief, self.layers, 1, np.zeros((0, 2))).moments

    def bytes_of_example(self, batch: Batch) -> float:
        """Bytes that one example more in a batch takes. Traces the model if needed.

        Raises:
            ValueError: The batch does not fit the model.
        """
        with self._traced() as traced, naming_batch(self._model, batch[0], 0):
            mix = self._tensor(Mix.of_batch(self.channels))
            return traced.bytes_of_example(batch, mix)

    @staticmethod
    def _tensor(mix: Mix) -> Any:
        return tf.constant(np.stack(mix))

    @contextmanager
    def _traced(self) -> Iterator[Traced]:
        """Takes the traced function out of the memory, since it has a state."""
        memory = memory_of(self.layers)
        key = (
            structure_of(self._model),
            tuple(id(bn.layer) for bn in self.layers),
            tuple(self._options.items()),
            self._is_fast,
        )
        traced = memory.pop(key, None) or Traced(
            self._model, self.layers, self.team, is_fast=self._is_fast, **self._options
        )
        traced.begin()
        try:
            yield traced
        finally:
            self._entry = traced.entry
            self.order = list(traced.order)
            memory[key] = traced

    def _moments(
        self, traced: Traced, results: _Results, is_fixed: bool
    ) -> list[Moments]:
        """Pools the moments of some batches, for each layer.

        Raises:
            ValueError: An input is not finite.
        """
        bad: dict[int, tuple[int, bool]] = {}
        parts = [[Moments.empty(bn.channels)] for bn in self.layers]

        def add(layer: int, moments: Moments, is_bad: Any, means: Any) -> None:
            parts[layer].append(moments)
            if np.any(is_bad):
                index = int(np.argmax(is_bad))
                is_huge = bool(np.isfinite(means[index]).all())
                first = results.numbers[index], is_huge
                bad[layer] = min(first, bad.get(layer, first))

        for layer, late in results.late.items():
            means = [one.mean for one in late]
            add(
                layer,
                pool(late),
                [not np.isfinite(one.m2).all() for one in late],
                means,
            )
        start = first_count = 0
        for entry in traced.entries:
            end = start + self.layers[entry.layer].channels
            end_count = first_count + entry.counts
            n = results.counts[:, first_count:end_count]
            mean = results.means[:, start:end]
            variance = results.variances[:, start:end]
            start, first_count = end, end_count
            if entry.is_unbiased:
                variance = variance * ((n - 1) / np.maximum(n, 1))
            known = np.isfinite(mean) & np.isfinite(variance)
            is_bad = (~known & (n > 0)).any(axis=1)
            add(entry.layer, pool_batches(n, mean, variance), is_bad, mean)
        if bad:
            self._raise_bad(traced, bad, is_fixed)
        return [pool(each) for each in parts]

    def _raise_bad(
        self, traced: Traced, bad: dict[int, tuple[int, bool]], is_fixed: bool
    ) -> None:
        # Within a batch, the first bad layer spoils the layers behind it.
        index = min(number for number, _ in bad.values())
        first = next(one for one in traced.order if bad.get(one, (None,))[0] == index)
        if not is_fixed or first == traced.entry:
            if bad[first][1]:
                raise ValueError(
                    f"The input of {self.layers[first].path} is too large: its "
                    "variance is not finite. Received: values that overflow when they "
                    f"are squared, in batch {index} of the data (counted from 0). "
                    "Scale the data, or look for huge weights in the layers before."
                )
            raise ValueError(
                f"The input of {self.layers[first].path} is not finite. Received: NaN "
                f"or infinity in batch {index} of the data (counted from 0). Remove "
                "it from the data, or look for an overflow in the layers before."
            )

    @property
    def entry(self) -> BatchNormLayer | None:
        """The layer whose input depends on no statistics; None if unknown."""
        return None if self._entry is None else self.layers[self._entry]


def _fetch(traced: Traced, pending: Sequence[_Pending], replicas: int) -> _Results:
    """Fetches the results of some steps, and drops those of idle replicas."""
    numbers = [number for group, _, _ in pending for number in group]
    sizes = [size for _, group, _ in pending for size in group]
    is_real = [
        place < len(group) for _, group, _ in pending for place in range(replicas)
    ]
    counts, means, variances, losses = (
        np.concatenate([np.asarray(part, np.float64) for part in column])[is_real]
        for column in zip(*(result for _, _, result in pending), strict=True)
    )
    late = {layer: parts[: len(numbers)] for layer, parts in traced.take_late().items()}
    return _Results(numbers, sizes, counts, means, variances, losses, late)


def _entry_means(traced: Traced, results: _Results) -> Moments:
    """Moments of the batch means at the layer whose input depends on no statistics."""
    if traced.entry is None:
        return Moments.empty(0)
    end, counts = traced.layers[traced.entry].channels, traced.entries[0].counts
    used = np.broadcast_to(results.counts[:, :counts] > 0, (len(results.numbers), end))
    means = results.means[:, :end]
    return pool_batches(used.astype(np.float64), means, np.zeros_like(means))


def _flat(own: Sequence[float], moments: Sequence[Moments]) -> NDArray[np.float64]:
    """A worker's part of a pass, as one vector for the others."""
    parts = [(one.count, one.mean, one.m2) for one in moments]
    return np.concatenate([np.asarray(own), *itertools.chain(*parts)])


def _measurement(
    rows: NDArray[np.float64],
    layers: Sequence[BatchNormLayer],
    own_batches: int,
    losses: NDArray[np.float64],
) -> Measurement:
    """Pools the vectors of all workers, with the same result on each of them."""
    batches, samples, loss, weight = rows[:, :4].sum(axis=0)
    moments, start = [], 4
    for bn in layers:
        size = bn.channels
        parts = rows[:, start : start + 3 * size].reshape(len(rows), 3, size)
        moments.append(pool(Moments(*part) for part in parts))
        start += 3 * size
    return Measurement(
        moments=moments,
        loss=float(loss / weight) if weight else None,
        batches=int(batches),
        samples=int(samples),
        own_batches=own_batches,
        losses=losses,
    )

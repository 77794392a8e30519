"""Takes a sample of the data, as large as memory allows, to run as one batch."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.measuring.data import Batch, Batches, Source

MEMORY = 256 * 2**20
"""Bytes that a sample may take beyond those of a batch."""

JOINED = 256
"""Largest number of examples to run together where statistics are given."""


def sample_size(bytes_of_example: float, batch_size: int) -> int:
    """How many examples to run as one batch.

    The sample may take 256 MB beyond what a batch takes at inference, or an eighth of
    the machine's free memory if that is less. A sample takes about twice the memory of
    its tensors (measured in fresh processes): operations run in parallel, and kernels
    need memory of their own.

    Args:
        bytes_of_example: Memory that an example takes in a pass.
        batch_size: Examples that a batch has anyway.
    """
    memory = min(MEMORY, _free_memory() / 8)
    return int(memory / max(2 * bytes_of_example, 1.0)) + batch_size // 2


def _free_memory() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Not on Linux.
        return float("inf")


def examples_in(batch: Batch) -> int:
    """Number of examples in a batch."""
    leaves = (leaf for leaf in tf.nest.flatten(batch[0]) if leaf is not None)
    shape = next(leaves).shape
    return int(shape[0] or 0) if shape.rank else 0


class Sample(Source):
    """A sample of the data, gathered while they are read for the first time.

    From arrays, it is drawn from all examples. From other data, it consists of the
    first examples until the first reading ends, and is then a random sample of all.

    Iterating over it is the first reading of the data.

    Args:
        batches: The data.
        size_for: Computes the number of examples from the first batch.
        from_all: Whether to draw from all examples where that can be done at once.
    """

    def __init__(
        self, batches: Batches, size_for: Callable[[Batch], int], *, from_all: bool
    ) -> None:
        self._batches = batches
        self._rest = iter(batches)
        first = next(self._rest)
        self.size = size_for(first)
        self._own = batches.sample(self.size) if from_all else None
        self._reservoir = Reservoir(self.size)
        self._begun = [first]
        self._is_settled = False
        self._reservoir.add(first)
        while self._own is None and self._reservoir.seen < self.size:
            batch = next(self._rest, None)
            if batch is None:
                break
            self._begun.append(batch)
            self._reservoir.add(batch)

    def batch(self) -> Batch | None:
        """The sample as one batch; None if its examples cannot be joined."""
        return self._own if self._own is not None else self._reservoir.batch()

    def has_changed(self) -> bool:
        """Whether the sample has changed in the first reading, which has ended."""
        grown = self._own is None and self._reservoir.seen > self.size
        has_changed, self._is_settled = grown and not self._is_settled, True
        return has_changed

    def __iter__(self) -> Iterator[Batch]:
        begun, self._begun = self._begun, []
        while begun:
            yield begun.pop(0)
        for batch in self._rest:
            if self._own is None:
                self._reservoir.add(batch)
            yield batch

    def number(self, index: int) -> int:
        """The place in the data of the `index`-th batch."""
        return self._batches.number(index)


class Reservoir:
    """Keeps a random sample of the examples of a stream (Vitter's algorithm R).

    Args:
        size: Examples to keep.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rng = np.random.default_rng(0)
        # The examples are in whole batches as long as all are kept, then in rows.
        self._batches: list[Batch] = []
        self._rows: list[NDArray[Any]] = []
        self.seen = 0

    def add(self, batch: Batch) -> None:
        """Takes the next batch into account; skips one with rows of another kind."""
        specs = row_specs(batch)
        if specs is None or (self._batches and specs != row_specs(self._batches[0])):
            return
        numbers = self.seen + np.arange(examples_in(batch))
        self.seen += len(numbers)
        places = self._rng.integers(0, numbers + 1)
        if not self._rows:
            self._batches.append(batch)
            if self.seen <= self._size:
                return
            leaves = tf.nest.flatten(join(self._batches)[0])
            self._rows = [leaf.numpy()[: self._size] for leaf in leaves]
            del self._batches[1:]
        replaced = (numbers >= self._size) & (places < self._size)
        for rows, leaf in zip(self._rows, tf.nest.flatten(batch[0]), strict=True):
            new = np.asarray(leaf)
            for index in np.flatnonzero(replaced):
                rows[places[index]] = new[index]

    def batch(self) -> Batch | None:
        """The examples kept, as one batch; None if there are none."""
        if not self._batches:
            return None
        if not self._rows:
            return join(self._batches)
        rows = map(tf.convert_to_tensor, self._rows)
        return tf.nest.pack_sequence_as(self._batches[0][0], list(rows)), None, None


def join(batches: Sequence[Batch]) -> Batch:
    """Batches of the same `row_specs` as one batch of inputs."""
    inputs = tf.nest.map_structure(
        lambda *leaves: tf.concat(leaves, axis=0), *(batch[0] for batch in batches)
    )
    return inputs, None, None


def row_specs(batch: Batch) -> list[tf.TensorSpec] | None:
    """Shape and type of an example in each input; None if it cannot be told apart.

    That is so if an input is sparse or ragged, or if inputs differ in length.
    """
    leaves = tf.nest.flatten(batch[0])
    if not all(tf.is_tensor(leaf) and leaf.shape.rank for leaf in leaves):
        return None
    if len({int(leaf.shape[0]) for leaf in leaves}) > 1:
        return None
    return [tf.TensorSpec(leaf.shape[1:], leaf.dtype) for leaf in leaves]


class KeptBatches(Source):
    """Batches in memory, or parts of batches, such as single examples.

    Args:
        batches: The batches or parts.
        numbers: For each of them, the place in the data of its batch; in order by
            default.
    """

    def __init__(
        self, batches: Sequence[Batch], numbers: Sequence[int] | None = None
    ) -> None:
        self._batches = list(batches)
        self._numbers = list(range(len(batches)) if numbers is None else numbers)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def number(self, index: int) -> int:
        """The place in the data of the batch that the `index`-th part is from."""
        return self._numbers[index]

    def read(self, count: int) -> int:
        """From how many batches of the data the first `count` parts are."""
        return len(set(self._numbers[:count]))


class Joined(Source):
    """Joins batches to larger ones, which run faster.

    Only for passes with given statistics, which do not depend on the batch size.

    Args:
        batches: The batches; none is divided.
        size: Largest number of examples in a joined batch.
    """

    def __init__(self, batches: Source, size: int) -> None:
        self._batches = batches
        self._size = size
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        self._ends = [0]
        group: list[Batch] = []
        examples = 0
        for batch in self._batches:
            is_like = not group or (
                examples + examples_in(batch) <= self._size
                and row_specs(batch) == row_specs(group[0]) is not None
            )
            if not is_like:
                yield self._join(group)
                group, examples = [], 0
            group.append(batch)
            examples += examples_in(batch)
            if examples >= self._size:
                yield self._join(group)
                group, examples = [], 0
        if group:
            yield self._join(group)

    def _join(self, group: Sequence[Batch]) -> Batch:
        self._ends.append(self._ends[-1] + len(group))
        return group[0] if len(group) == 1 else join(group)

    def number(self, index: int) -> int:
        """The place in the data of the first batch in the `index`-th joined one."""
        return self._batches.number(self._ends[index])

    def read(self, count: int) -> int:
        """How many batches of the data the first `count` joined ones consist of."""
        return self._batches.read(self._ends[count])

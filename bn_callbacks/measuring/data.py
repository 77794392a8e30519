"""Turns what `fit` takes as `x` into batches that can be read more than once."""

import abc
import contextlib
import copy
import itertools
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.arguments import check_whole, shown
from bn_callbacks.distribution import copies
from bn_callbacks.layers import input_layout
from bn_callbacks.names import said, shortened

# Data of unknown length must end within so many batches, so that an endless generator
# raises an error instead of hanging. 10⁴ samples are plenty for statistics.
MAX_UNSIZED_BATCHES = 10_000

BATCH_SIZE = 32
"""Samples per batch of arrays, as in `fit`."""

Batch = tuple[Any, Any, Any]


class Source(abc.ABC):
    """What a pass reads: batches, which may be joined or divided batches of data."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    @abc.abstractmethod
    def number(self, index: int) -> int:
        """The place in the data of the `index`-th batch that is read."""

    def read(self, count: int) -> int:
        """How many batches of the data the first `count` batches consist of."""
        return count


class Batches(Source):
    """Batches of `(inputs, targets, sample_weight)`; the last two may be None.

    Args:
        x: An array; a list, dict or tuple structure of arrays; `(x, y)` or
            `(x, y, sample_weight)` of these; a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a `tf.distribute.DistributedDataset`, or a
            generator or other iterable of batches.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        inputs: The number of inputs of the model, which tells a tuple of
            inputs from `(x, y)`; None if unknown.

    Raises:
        ValueError: `x` is empty, endless or shorter than `steps`, or arguments
            contradict each other.
        TypeError: `fit` would not take `x`.
    """

    def __init__(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        inputs: int | None = None,
    ) -> None:
        check_whole("batch_size", batch_size)
        check_whole("steps", steps)
        # `islice` takes no larger number, and nobody reads that many batches.
        self.steps = None if steps is None else min(int(steps), sys.maxsize)
        self._part, self._parts = 0, 1
        self._order: Sequence[int] | None = None
        self._first: Batch | None = None
        self._once: Iterator[Any] | None = None
        self._kept: list[Batch] = []
        if _is_arrays(x):
            self._source: Iterable[Any] = _Arrays(x, batch_size or BATCH_SIZE, inputs)
            size: int | None = len(self._source)
        else:
            if batch_size is not None:
                raise ValueError(
                    "`batch_size` is for arrays; other data come in batches "
                    f"already. Received: batch_size={batch_size} with x of type "
                    f"{type(x).__name__}. Leave batch_size out."
                )
            self._source, size = _iterable(x)
        if steps is None and is_endless(x):
            raise ValueError(
                f"`x` is infinite. Received: {type(x).__name__} without end and "
                "steps=None. Pass `steps`."
            )
        if size == 0:
            raise ValueError(
                f"`x` is empty. Received: {type(x).__name__} of no samples. Pass at "
                "least one batch of data."
            )
        if size is not None and self.steps is not None and self.steps > size:
            raise ValueError(_ran_out(size, self.steps))
        self._length = self.steps or size
        if isinstance(self._source, Iterator):
            self._once = self._source

    @property
    def length(self) -> int | None:
        """Number of batches that this worker reads; None if unknown."""
        if self._length is None:
            return None
        return len(range(self._part, self._length, self._parts))

    def mix(self) -> None:
        """Reads arrays and `PyDataset`s in random order from now on, always the same.

        Other data keep their order.
        """
        if isinstance(self._source, (_Arrays, _Indexed)) and self._length is not None:
            self._order = np.random.default_rng(0).permutation(self._length).tolist()

    def by_rows(self) -> "Batches":
        """The same data, with the rows of arrays in random order, always the same.

        If `steps` are used, they come from all rows. Other data keep their order.
        """
        if not isinstance(self._source, _Arrays):
            return self
        new = copy.copy(self)
        new._source, new._first = self._source.by_rows(), None
        return new

    def peek(self) -> Batch:
        """The first batch. It is read from the data only once."""
        if self._first is None:
            self._first = next(iter(self))
            if isinstance(self._source, _Indexed):
                self._source.spare[self.number(0)] = self._first
        return self._first

    def sample(self, size: int) -> Batch | None:
        """Draws `size` examples from all of the arrays; None for other data."""
        if not isinstance(self._source, _Arrays):
            return None
        return _to_tensors(self._source.sample(size, self.steps), 0)

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for item in itertools.islice(self._items(), self.steps):
            if count >= MAX_UNSIZED_BATCHES and self._length is None:
                raise ValueError(
                    "`x` seems to be infinite. Received: more than "
                    f"{MAX_UNSIZED_BATCHES} batches and steps=None. Pass `steps`."
                )
            is_own = count % self._parts == self._part
            batch = _to_tensors(item, self._place(count)) if is_own else item
            # An iterator can be read only once, so its batches are kept.
            if self._once is not None and count == len(self._kept):
                self._kept.append(batch)
            count += 1
            if is_own:
                yield batch
        if count == 0:
            raise ValueError(
                "`x` is empty. Received: no batch at all. Pass at least one batch "
                "of data; an iterator that has been read to its end has none left."
            )
        if self.steps is not None and count < self.steps:
            raise ValueError(_ran_out(count, self.steps))

    def share(self, part: int, parts: int) -> None:
        """Reads only every `parts`-th batch from now on, beginning with `part`."""
        self._part, self._parts = part, parts

    def number(self, index: int) -> int:
        """The place in the data of the `index`-th batch that this worker reads."""
        return self._place(self._part + index * self._parts)

    def _place(self, count: int) -> int:
        return count if self._order is None else self._order[count]

    def checksum(self) -> float:
        """A checksum of the first batch: different data almost surely differ in it."""
        first = [leaf for leaf in tf.nest.flatten(self.peek()) if leaf is not None]
        parts = [np.asarray(leaf).tobytes() for leaf in first]
        return float(zlib.crc32(b"".join(parts)))

    def first(self, count: int) -> "FirstBatches":
        """The first `count` batches, which can be read as often as all of them."""
        return FirstBatches(self, count)

    def _items(self) -> Iterator[Any]:
        source = iter(self._source if self._once is None else self._once)
        if isinstance(self._source, (_Arrays, _Indexed)) and self._order is not None:
            source = map(self._source.__getitem__, self._order)
        yield from list(self._kept)
        for index in itertools.count(len(self._kept)):
            try:
                item = next(source)
            except StopIteration:
                return
            except Exception as error:
                _note(error, self._place(index))
                raise
            yield item


@dataclass(frozen=True)
class FirstBatches(Source):
    """The first batches of some data, the same in each pass.

    Args:
        batches: The data.
        length: The number of batches to read.
    """

    batches: Batches
    length: int

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for batch in itertools.islice(self.batches, self.length):
            count += 1
            yield batch
        if count < self.length:
            raise ValueError(
                "`x` does not give the same data in each pass. Received: "
                f"{self.length - count} batches fewer than in the first pass, which "
                f"had {self.length}. Pass data that can be read again, or refine=0."
            )

    def first(self, count: int) -> "FirstBatches":
        """The first `count` of these."""
        return FirstBatches(self.batches, min(count, self.length))

    def number(self, index: int) -> int:
        """The place in the data of the `index`-th batch."""
        return self.batches.number(index)


def _note(error: Exception, index: int) -> None:
    """Adds the number of the batch to an error that the user's own data raise."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"Raised by batch {index} of `x`, counted from 0.")


def _ran_out(size: int, steps: int) -> str:
    return (
        f"`x` ran out of data after {size} batches. Received: steps={steps}. Pass "
        "fewer `steps`, or data that repeat."
    )


def _is_arrays(x: Any) -> bool:
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        return False
    if isinstance(x, (list, tuple, dict)):
        leaves = [leaf for leaf in tf.nest.flatten(x) if leaf is not None]
        return bool(leaves) and all(_is_array(leaf) for leaf in leaves)
    return _is_array(x)


def _is_array(leaf: Any) -> bool:
    has_parts = hasattr(leaf, "__array__") and hasattr(leaf, "__getitem__")
    return has_parts and hasattr(leaf, "shape") and len(leaf.shape) > 0


def is_endless(x: Any) -> bool:
    """Whether data say of themselves that they have no end."""
    if isinstance(x, tf.data.Dataset):
        return bool(x.cardinality() == tf.data.INFINITE_CARDINALITY)
    return isinstance(x, keras.utils.PyDataset) and _num_batches(x) is None


def _iterable(x: Any) -> tuple[Iterable[Any], int | None]:
    """The data as an iterable of batches, and their number where it is known."""
    if isinstance(x, tf.data.Dataset):
        size = int(x.cardinality())
        return x.prefetch(tf.data.AUTOTUNE), size if size >= 0 else None
    if isinstance(x, keras.utils.PyDataset):
        return _Indexed(x), _num_batches(x)
    if isinstance(x, tf.distribute.DistributedDataset):
        return _Distributed(x), None
    is_scalar = hasattr(x, "shape") and not len(x.shape)
    is_other = isinstance(x, (str, bytes, list, tuple, dict)) or is_scalar
    if isinstance(x, Iterable) and not is_other:
        try:
            return x, len(x)  # type: ignore[arg-type]
        except TypeError:
            return x, None
    raise TypeError(
        "`x` must be what `fit` takes: arrays, a tf.data.Dataset, a PyDataset or a "
        f"generator of batches. Received: {_describe(x)}."
    )


def _num_batches(dataset: keras.utils.PyDataset) -> int | None:
    # Keras before 3.1 asks for the length, later ones for `num_batches`.
    if hasattr(dataset, "num_batches"):
        size: int | None = dataset.num_batches
        return size
    return len(dataset)


def _describe(x: Any) -> str:
    if isinstance(x, (list, tuple, dict)):
        kinds = sorted({type(leaf).__name__ for leaf in tf.nest.flatten(x)})
        return f"{type(x).__name__} of {', '.join(kinds) or 'nothing'}"
    return f"{shown(x)} of type {type(x).__name__}"


def _to_tensors(item: Any, index: int) -> Batch:
    try:
        parts = keras.utils.unpack_x_y_sample_weight(item)
        if not any(leaf is not None for leaf in tf.nest.flatten(parts[0])):
            raise ValueError("There are no inputs in it.")
        return tuple(  # type: ignore[return-value]
            None if part is None else tf.nest.map_structure(_to_tensor, part)
            for part in parts
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Batch {index} of the data has no form that a model takes. Received: "
            f"{_describe(item)}. Give batches of x, (x, y) or (x, y, sample_weight), "
            "each an array or a structure of arrays."
        ) from error
    except Exception as error:
        _note(error, index)
        raise


def _to_tensor(leaf: Any) -> Any:
    if tf.is_tensor(leaf) or leaf is None:
        return leaf
    array = np.asarray(leaf)
    # As `fit` does: NumPy's default is float64, Keras' is `floatx`.
    if array.dtype == np.float64:
        array = array.astype(keras.backend.floatx())
    return tf.convert_to_tensor(array)


def open_specs(batch: Any) -> Any:
    """Tensor specifications of a structure, for batches of any size."""

    def spec(leaf: Any) -> Any:
        if leaf is None:
            return None
        spec = tf.type_spec_from_value(leaf)
        if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
            return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
        return spec

    return tf.nest.map_structure(spec, batch)


MAX_SAID = 300
"""Largest number of characters of Keras' own message in ours."""

# Keras, TensorFlow and a user's own `call` raise these, for inputs of a wrong kind too.
_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    tf.errors.InvalidArgumentError,
    tf.errors.UnimplementedError,
)


@contextlib.contextmanager
def naming_batch(model: keras.Model, inputs: Any, index: int) -> Iterator[None]:
    """Makes errors of a model's call name the batch, and say if its shape is wrong.

    Args:
        model: The model.
        inputs: The inputs of the batch.
        index: The number of the batch.
    """
    try:
        yield
    except tf.errors.OperatorNotAllowedInGraphError as error:
        raise ValueError(
            "The model cannot be traced, as its Python code asks for values of tensors "
            f"that only run_eagerly=True would have. Received: model {model.name!r}. "
            "Write its `call` with `keras.ops.cond` or `keras.ops.where` instead."
        ) from error
    except _ERRORS as error:
        wanted = _misfit(model, inputs)
        what = f"The model fails on batch {index} of the data."
        do = "Check their structure and type, and the model's own code."
        if wanted:
            what = f"Batch {index} of the data does not fit the model."
            do = "Pass data as `fit` takes them, in batches."
        shapes = tf.nest.map_structure(
            lambda leaf: None if leaf is None else tuple(leaf.shape), inputs
        )
        raise ValueError(
            f"{what} Received: inputs of shape {shapes} for model {model.name!r}"
            f"{wanted}. {do} Keras says: {shortened(said(error), MAX_SAID)}"
        ) from error


def _misfit(model: keras.Model, inputs: Any) -> str:
    """What the model takes, if these inputs have another shape; otherwise empty."""
    layout = input_layout(model)
    if layout is None:
        return ""
    leaves = [] if layout.is_dict else tf.nest.flatten(inputs)
    if isinstance(inputs, dict):
        leaves = [inputs[name] for name in layout.names if name in inputs]
    if len(leaves) == len(layout.shapes):
        pairs = zip(leaves, layout.shapes, strict=True)
        if all(
            leaf is None or tf.TensorShape(shape).is_compatible_with(leaf.shape)
            for leaf, shape in pairs
        ):
            return ""
    shapes = ", ".join(
        f"{name} of {shape}" if layout.is_dict else str(shape)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    )
    return f", which takes {shapes}"


class _Arrays:
    """Arrays, cut into batches of consecutive rows, or of rows in random order."""

    def __init__(self, x: Any, batch_size: int, inputs: int | None) -> None:
        is_item = isinstance(x, tuple) and len(x) in (2, 3)
        if is_item and len(x) == inputs:
            # The tuple is as long as the model has inputs: it may be (x, y) or two
            # inputs. It is (x, y) if x alone has all inputs.
            is_item = len(tf.nest.flatten(x[0])) == inputs
        self._parts = (*x, None)[:3] if is_item else (x, None, None)
        if isinstance(x, tuple) and len(x) == 1:
            self._parts = (x[0], None, None)
        leaves = [leaf for leaf in tf.nest.flatten(self._parts) if leaf is not None]
        sizes = sorted({int(leaf.shape[0]) for leaf in leaves})
        if len(sizes) > 1:
            raise ValueError(
                "All arrays must have the same number of samples. Received: arrays "
                f"of {', '.join(map(str, sizes))} samples. Pass arrays with one row "
                "for each sample."
            )
        self._samples = sizes[0]
        self._batch_size = min(int(batch_size), max(1, self._samples))
        self._order: NDArray[np.int64] | None = None

    def by_rows(self) -> "_Arrays":
        """The same arrays, with rows in random order, always the same."""
        new = copy.copy(self)
        if self._samples > self._batch_size:
            new._order = np.random.default_rng(0).permutation(self._samples)
        return new

    def __len__(self) -> int:
        return math.ceil(self._samples / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        start = index * self._batch_size
        part: Any = slice(start, start + self._batch_size)
        if self._order is not None:
            # The order within a batch is free; sorted, files on a disk are faster.
            part = np.sort(self._order[part])
        return self._cut(part)

    def sample(self, size: int, steps: int | None) -> Batch:
        """Draws examples from the first `steps` batches, always the same ones.

        If there are no more than `size`, takes all of them in their order.
        """
        total = min(self._samples, self._batch_size * (steps or len(self)))
        rows = np.arange(total) if self._order is None else self._order[:total]
        if size < total:
            rows = np.random.default_rng(0).choice(rows, size, replace=False)
        elif total == self._samples:
            return self._cut(slice(total))
        return self._cut(np.sort(rows))

    def _cut(self, part: Any) -> Batch:
        cut: Batch = tf.nest.map_structure(
            lambda leaf: None if leaf is None else _cut(leaf, part), self._parts
        )
        return cut


def _cut(array: Any, part: Any) -> Any:
    if tf.is_tensor(array) and not isinstance(part, slice):
        return tf.gather(array, part)
    # pandas objects are cut by position through `iloc`.
    return getattr(array, "iloc", array)[part]


class _Indexed:
    """A PyDataset, read without its epoch hooks.

    Attributes:
        spare: Batches that `peek` has read, by number. The next pass uses them
            instead of reading them again, since a PyDataset may be slow.
    """

    def __init__(self, dataset: keras.utils.PyDataset) -> None:
        self._dataset = dataset
        self.spare: dict[int, Batch] = {}

    def __iter__(self) -> Iterator[Any]:
        size = _num_batches(self._dataset)
        indices = itertools.count() if size is None else range(size)
        return map(self.__getitem__, indices)

    def __getitem__(self, index: int) -> Any:
        return self.spare.pop(index) if index in self.spare else self._dataset[index]


class _Distributed:
    """A distributed dataset. What one replica of this process gets is one batch."""

    def __init__(self, dataset: tf.distribute.DistributedDataset) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for item in self._dataset:
            leaves = tf.nest.flatten(item)
            for parts in zip(*map(copies, leaves), strict=True):
                if len(parts[0]):  # A replica may get nothing of the last batch.
                    yield tf.nest.pack_sequence_as(item, parts)

"""Values that nobody should pass, and a judge of what they are answered with."""

import datetime
import decimal
import fractions
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from hypothesis import currently_in_test_context, note
from hypothesis import strategies as st

import bn_callbacks

PACKAGE = os.path.dirname(bn_callbacks.__file__)
DTYPES = (
    *("float16", "float32", "float64", "int8", "int64", "uint8", "uint64", "bool"),
    *("complex64", "object", "U3", "S3", "datetime64[s]", "timedelta64[s]", "f4,i4"),
)


class Contrary:
    """Refuses what arrays and data frames refuse: to be compared, or to be a truth."""

    def __bool__(self) -> bool:
        raise ValueError("The truth value of a Contrary is ambiguous.")

    def __eq__(self, other: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]


class Long:
    """Something whose text is without end."""

    def __repr__(self) -> str:
        return "long " * 100_000


class Unreadable:
    """Promises an array and gives none."""

    shape = (4, 3)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise OSError("no array")


def objects() -> st.SearchStrategy[Any]:
    """Things of every kind that is at hand; made anew, since some are used up."""
    makers: list[Callable[[], Any]] = [
        object,
        lambda: object,
        lambda: len,
        lambda: lambda: 1 / 0,
        lambda: NotImplemented,
        lambda: ...,
        lambda: range(3),
        lambda: slice(1),
        dict,
        list,
        tuple,
        set,
        lambda: frozenset({1}),
        lambda: {"a": 1},
        lambda: [None],
        lambda: (None, None),
        lambda: [[]],
        lambda: np.array("x"),
        lambda: np.array(3),
        lambda: np.array([1, 2]),
        lambda: np.zeros((0,)),
        lambda: np.float32("nan"),
        lambda: np.float64(-1),
        lambda: np.datetime64("2020"),
        lambda: np.random.default_rng(0),
        lambda: Path("x"),
        lambda: re.compile("x"),
        lambda: Exception("x"),
        lambda: ValueError,
        lambda: math,
        lambda: datetime.date(2020, 1, 1),
        lambda: decimal.Decimal("NaN"),
        lambda: fractions.Fraction(-1, 3),
        lambda: tf.constant(3),
        lambda: tf.constant([1.0, 2.0]),
        lambda: tf.constant("x"),
        lambda: tf.ragged.constant([[1.0], [1.0, 2.0]]),
        lambda: tf.sparse.from_dense([[1.0, 0.0]]),
        lambda: tf.TensorSpec([1]),
        lambda: keras.Input((3,)),
        lambda: keras.layers.Dense(2),
        lambda: iter([]),
        lambda: (index for index in ()),
        lambda: open(os.devnull),  # noqa: SIM115
        Contrary,
        Long,
        Unreadable,
    ]
    return st.sampled_from(makers).map(lambda make: make())


def anything() -> st.SearchStrategy[Any]:
    """Any value at all."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.sampled_from([10**400, -(10**400), sys.maxsize + 1]),
        st.floats(),
        st.complex_numbers(),
        st.text(max_size=8),
        st.binary(max_size=8),
        st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        objects(),
    )


@st.composite
def arrays(draw: Any) -> Any:
    """Arrays of any rank and dtype, empty ones and NaN included."""
    fitting = st.sampled_from([(8, 6), (8, 6), (3, 6), (8, 1), (0, 6), (6,)])
    shapes = st.one_of(fitting, st.lists(st.integers(0, 6), max_size=5))
    shape = tuple(draw(shapes))
    dtype = draw(st.sampled_from(DTYPES))
    values = np.ones(shape) * draw(st.sampled_from([0.0, 1.0, 255.0]))
    is_record = dtype == "f4,i4"
    array = np.zeros(shape, dtype) if is_record else np.array(values, dtype)
    if array.dtype.kind == "f" and array.size and draw(st.booleans()):
        array[...] = draw(st.sampled_from([np.nan, np.inf, 1e30, -1.0]))
    return draw(st.sampled_from([np.asarray, np.asarray, as_tensor]))(array)


def as_tensor(array: Any) -> Any:
    """As a tensor, where TensorFlow has one like that."""
    try:
        return tf.constant(array)
    except (ValueError, TypeError):
        return array


@st.composite
def structures(draw: Any) -> Any:
    """Data of any structure: arrays, what holds them, and streams of them."""
    leaf = st.one_of(arrays(), arrays(), anything())
    nested = draw(
        st.recursive(
            leaf,
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.lists(inner, max_size=3).map(tuple),
                st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            ),
            max_leaves=4,
        )
    )
    how = draw(st.sampled_from(["as it is", "generator", "list", "dataset", "indexed"]))
    if how == "generator":
        return iter([nested] * draw(st.integers(0, 3)))
    if how == "list":
        return [nested] * draw(st.integers(0, 3))
    if how == "indexed":
        return Indexed(nested, draw(st.sampled_from([0, 1, 2, None])))
    if how == "dataset":
        try:
            dataset = tf.data.Dataset.from_tensor_slices(nested)
            return dataset.batch(2) if draw(st.booleans()) else dataset
        except Exception:
            return nested
    return nested


class Indexed(keras.utils.PyDataset):
    """Gives the same batch again and again."""

    def __init__(self, batch: Any, length: int | None) -> None:
        super().__init__()
        self.batch, self.length = batch, length

    def __len__(self) -> Any:
        return self.length if self.length is not None else 3

    def __getitem__(self, index: int) -> Any:
        return self.batch


def judge(act: Callable[[], Any], *, must_fail: bool = True) -> None:
    """Asserts that an act fails with a clear error of ours.

    It is raised in our own code, of a kind that Python has for wrong arguments, of a
    readable length, and says what was received and what to do. Or it is what the user's
    own data raised, with the number of the batch.
    """
    error: Exception | None = None
    try:
        act()
    except Exception as raised:
        error = raised
    if error is not None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:2000]}"
        if currently_in_test_context():
            note(text)
        where = f"{text}\nraised in {last.filename}:{last.lineno} ({last.line})"
        if last.filename == __file__ and any(
            said.startswith("Raised by batch")
            for said in getattr(error, "__notes__", [])
        ):
            return
        assert last.filename.startswith(PACKAGE), f"not an error of ours: {where}"
        assert type(error) in (ValueError, TypeError), f"of an odd kind: {where}"
        message = str(error)
        assert "Received: " in message, f"does not say what was received: {where}"
        rule, _, advice = message.partition("Received: ")
        says = re.search(r"must be|takes", rule) or re.search(r"[.!?] ", advice)
        assert says, f"does not say what to do: {where}"
        assert len(message) <= 1500, f"of {len(message)} characters: {where}"
    else:
        assert not must_fail, "accepted"

"""What `fit` takes as x: every kind gives the same batches, or one clear error."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import KERAS, normal

import bn_callbacks.measuring.data
from bn_callbacks.measuring.data import Batches, naming_batch, open_specs

X, Y, W = normal(10, 3), normal(10, 2, seed=1), np.linspace(0, 1, 10, dtype="float32")


class Rows(keras.utils.PyDataset):
    """Batches of four rows, the last one of two."""

    def __init__(self, with_targets: bool = True) -> None:
        super().__init__()
        self.with_targets = with_targets
        self.epochs_ended = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        part = slice(4 * index, 4 * index + 4)
        return (X[part], Y[part], W[part]) if self.with_targets else X[part]

    def on_epoch_end(self) -> None:
        self.epochs_ended += 1


def endless() -> Iterator[Any]:
    for start in itertools.cycle(range(0, 10, 4)):
        yield X[start : start + 4]


def items() -> list[Any]:
    return [(X[s : s + 4], Y[s : s + 4], W[s : s + 4]) for s in range(0, 10, 4)]


def rows(batches: Batches, part: int = 0) -> Any:
    """One part of all batches together: 0 for inputs, 1 targets, 2 weights."""
    return np.concatenate([np.asarray(batch[part]) for batch in batches])


DATA = {
    "arrays": lambda: Batches((X, Y, W), batch_size=4),
    "tensors": lambda: Batches(tuple(map(tf.constant, (X, Y, W))), batch_size=4),
    "dataset": lambda: Batches(tf.data.Dataset.from_tensor_slices((X, Y, W)).batch(4)),
    "dataset of unknown length": lambda: Batches(
        tf.data.Dataset.from_tensor_slices((X, Y, W))
        .batch(4)
        .filter(lambda x, y, w: True)
    ),
    "PyDataset": lambda: Batches(Rows()),
    "generator": lambda: Batches(iter(items())),
    "iterable": lambda: Batches(_Iterable()),
}


class _Iterable:
    def __iter__(self) -> Iterator[Any]:
        return iter(items())


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_gives_inputs_targets_and_weights(kind: str) -> None:
    batches = DATA[kind]()
    assert [batch[0].shape[0] for batch in batches] == [4, 4, 2]
    for part, expected in enumerate((X, Y, W)):
        np.testing.assert_array_equal(rows(batches, part), expected)


@pytest.mark.parametrize("kind", DATA)
def test_data_can_be_read_again_and_again(kind: str) -> None:
    batches = DATA[kind]()
    next(iter(batches))  # A reader that stops early takes nothing from the next.
    np.testing.assert_array_equal(rows(batches), X)
    np.testing.assert_array_equal(rows(batches), X)


@pytest.mark.parametrize("kind", DATA)
def test_steps_are_the_number_of_batches_read(kind: str) -> None:
    batches = DATA[kind]()
    batches.steps = 2
    assert [batch[0].shape[0] for batch in batches] == [4, 4]


def test_a_generator_is_not_read_beyond_steps() -> None:
    source = endless()
    batches = Batches(source, steps=2)
    assert len(list(batches)) == len(list(batches)) == 2
    np.testing.assert_array_equal(next(source), X[8:])


def test_arrays_come_in_batches_of_32_by_default() -> None:
    sizes = [batch[0].shape[0] for batch in Batches(normal(70, 2))]
    assert sizes == [32, 32, 6]


@pytest.mark.parametrize(
    ("x", "inputs", "expected"),
    [
        (X, 1, X),
        ((X,), 1, X),
        ((X, Y), 1, X),
        ((X, Y), None, X),
        ((X, Y, W), 1, X),
        ((X, Y, W), 2, X),
        ((X, None), 1, X),
        ([X, Y], 2, [X, Y]),
        ({"a": X, "b": Y}, 2, {"a": X, "b": Y}),
        ((X, Y), 2, (X, Y)),
        ((X, Y, X), 3, (X, Y, X)),
        ((X, Y, X, Y), 4, (X, Y, X, Y)),
        (([X, Y], W), 2, [X, Y]),
        (((X, Y), W), 2, (X, Y)),
        (({"a": X, "b": Y}, W), 2, {"a": X, "b": Y}),
        (([X, Y, X], Y, W), 3, [X, Y, X]),
    ],
)
def test_the_number_of_inputs_tells_x_from_x_and_y(
    x: Any, inputs: int | None, expected: Any
) -> None:
    (batch,) = Batches(x, batch_size=10, inputs=inputs)
    tf.nest.map_structure(np.testing.assert_array_equal, batch[0], expected)


def test_a_dataset_of_pairs_is_inputs_and_targets_as_for_fit() -> None:
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(10)
    (batch,) = Batches(dataset, inputs=2)
    np.testing.assert_array_equal(batch[0], X)
    np.testing.assert_array_equal(batch[1], Y)


def test_numpy_float64_becomes_the_default_float_as_in_fit() -> None:
    (batch,) = Batches(X.astype("float64"))
    assert batch[0].dtype == tf.float32
    (batch,) = Batches(np.arange(8).reshape(4, 2))
    assert batch[0].dtype == tf.int64


def test_pandas_is_cut_by_position() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, index=range(100, 110), columns=["a", "b", "c"])
    np.testing.assert_array_equal(rows(Batches(frame, batch_size=4)), X)


def test_what_slices_by_position_through_iloc_is_cut_by_position() -> None:
    class Frame:
        """What pandas has and NumPy has not: slices of itself go by label."""

        shape = X.shape
        iloc = X

        def __getitem__(self, label: Any) -> Any:
            raise KeyError(label)

        def __array__(self, *_: Any, **__: Any) -> Any:
            return X

    np.testing.assert_array_equal(rows(Batches(Frame(), batch_size=4)), X)


def test_a_py_dataset_is_read_in_order_without_its_epoch_hooks() -> None:
    dataset = Rows(with_targets=False)
    np.testing.assert_array_equal(rows(Batches(dataset)), X)
    assert dataset.epochs_ended == 0


@pytest.mark.skipif(KERAS < (3, 4), reason="every PyDataset of this Keras has an end")
def test_an_infinite_py_dataset_needs_steps() -> None:
    class Endless(Rows):
        @property
        def num_batches(self) -> None:
            return None

        def __getitem__(self, index: int) -> Any:
            return X[:4] + index

    assert len(list(Batches(Endless(), steps=5))) == 5
    with pytest.raises(ValueError, match=r"infinite.*steps=None.*Pass `steps`"):
        Batches(Endless())


def test_an_infinite_dataset_needs_steps() -> None:
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(4).repeat()
    assert len(list(Batches(dataset, steps=7))) == 7
    with pytest.raises(
        ValueError,
        match=r"^`x` is infinite\. Received: \w+ without end and steps=None\. Pass",
    ):
        Batches(dataset)


def test_a_generator_without_end_is_an_error_not_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bn_callbacks.measuring.data, "MAX_UNSIZED_BATCHES", 5)
    assert len(list(Batches(itertools.islice(endless(), 5)))) == 5
    assert len(list(Batches(endless(), steps=9))) == 9
    with pytest.raises(
        ValueError, match=r"^`x` seems to be infinite\. .* more than 5 .*Pass `steps`"
    ):
        list(Batches(endless()))


@pytest.mark.parametrize("name", ["steps", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "all", float("nan"), [3]])
def test_counts_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` must be .* Received: {name}="):
        Batches(X, **{name: value})


def test_numpy_integers_are_integers() -> None:
    assert len(list(Batches(X, batch_size=np.int64(5), steps=np.int32(1)))) == 1


@pytest.mark.parametrize(
    "x",
    [
        tf.data.Dataset.from_tensor_slices(X).batch(4),
        Rows(),
        iter(items()),
    ],
    ids=["dataset", "PyDataset", "generator"],
)
def test_batch_size_is_for_arrays_only(x: Any) -> None:
    with pytest.raises(ValueError, match=r"arrays.*batch_size=4 with x of.*Leave"):
        Batches(x, batch_size=4)


@pytest.mark.parametrize(
    "x",
    [
        X[:0],
        (X[:0], Y[:0]),
        {"a": X[:0]},
        tf.data.Dataset.from_tensor_slices(X[:0]).batch(4),
        tf.data.Dataset.from_tensor_slices(X).filter(lambda x: False).batch(4),
        iter([]),
    ],
    ids=["array", "tuple", "dict", "dataset", "unknown length", "generator"],
)
def test_empty_data_are_an_error(x: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^`x` is empty\. Received: .*\. Pass at least one batch"
    ):
        list(Batches(x))


def test_an_iterator_read_to_its_end_is_empty() -> None:
    used = iter(items())
    list(used)
    with pytest.raises(ValueError, match="an iterator that has been read to its end"):
        list(Batches(used))


@pytest.mark.parametrize("kind", DATA)
def test_less_data_than_steps_is_an_error(kind: str) -> None:
    message = r"^`x` ran out of data after 3 batches\. Received: steps=4\. Pass fewer"
    batches = DATA[kind]()
    batches.steps = 4
    with pytest.raises(ValueError, match=message):
        list(batches)


def test_less_data_than_steps_is_found_at_once_where_the_length_is_known() -> None:
    with pytest.raises(ValueError, match="ran out of data after 3 batches"):
        Batches(X, batch_size=4, steps=4)


@pytest.mark.parametrize(
    ("x", "received"),
    [
        (None, "None of type NoneType"),
        (3.0, r"3\.0 of type float"),
        ("file.npy", "'file.npy' of type str"),
        ([[1.0, 2.0], [3.0, 4.0]], "list of float"),
        ([X, "b"], "list of ndarray, str"),
        ((), "tuple of nothing"),
        (np.float32(3), "3"),
    ],
)
def test_what_fit_would_not_take_is_a_type_error(x: Any, received: str) -> None:
    message = rf"^`x` must be what `fit` takes: .*Received: .*{received}"
    with pytest.raises(TypeError, match=message):
        Batches(x)


def test_arrays_of_unequal_length_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"same number of samples.*of 7, 10 samples"):
        Batches((X, Y[:7]))


@pytest.mark.parametrize(
    "item",
    [None, {}, (X, Y, W, W), np.array([object()])],
    ids=["None", "empty", "four parts", "objects"],
)
def test_a_batch_that_is_no_data_is_named(item: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^Batch 1 of the data has no form .*Received: .*Give batches"
    ):
        list(Batches(iter([X, item])))


def failing(error: BaseException) -> Iterator[Any]:
    yield X
    yield X
    raise error


def test_an_exception_of_the_data_passes_with_the_batch_in_a_note() -> None:
    error = OSError("disk gone")
    with pytest.raises(OSError, match="disk gone") as caught:
        list(Batches(failing(error)))
    assert caught.value is error
    if sys.version_info >= (3, 11):
        assert error.__notes__ == ["Raised by batch 2 of `x`, counted from 0."]


class Lost:
    """An array on a disk that is gone."""

    shape = (4, 3)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise OSError("disk gone")


def test_an_exception_of_an_array_within_a_batch_passes_with_a_note() -> None:
    with pytest.raises(OSError, match="disk gone") as caught:
        list(Batches(iter([X, Lost()])))
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["Raised by batch 1 of `x`, counted from 0."]


@pytest.mark.parametrize("kind", ["arrays", "PyDataset"])
def test_mixed_data_are_read_to_their_end_again_and_again(kind: str) -> None:
    class Two(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return X[2 * index : 2 * index + 2]

    batches = Batches(X[:4], batch_size=2) if kind == "arrays" else Batches(Two())
    batches.mix()
    for _ in range(2):
        found = np.concatenate([batch[0] for batch in batches])
        np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(X[:4], axis=0))


def test_an_exception_without_notes_passes_as_well() -> None:
    class OldError(Exception):
        """As exceptions are before Python 3.11."""

        @property
        def add_note(self) -> None:
            raise AttributeError

    with pytest.raises(OldError):
        list(Batches(failing(OldError())))


def test_an_exception_inside_a_dataset_passes_with_a_note() -> None:
    def rows() -> Iterator[Any]:
        yield X
        raise OSError("disk gone")

    dataset = tf.data.Dataset.from_generator(
        rows, output_signature=tf.TensorSpec([10, 3])
    )
    with pytest.raises(tf.errors.OpError, match="disk gone") as caught:
        list(Batches(dataset))
    if sys.version_info >= (3, 11):
        assert any("batch 1 of `x`" in note for note in caught.value.__notes__)


def test_ctrl_c_in_the_data_passes_untouched() -> None:
    with pytest.raises(KeyboardInterrupt):
        list(Batches(failing(KeyboardInterrupt())))


def test_only_the_batch_size_of_a_spec_is_open() -> None:
    (batch,) = Batches(({"a": X, "b": Y.astype("int32")}, None), inputs=2)
    inputs, *_ = open_specs(batch)
    assert inputs["a"] == tf.TensorSpec([None, 3], tf.float32)
    assert inputs["b"] == tf.TensorSpec([None, 2], tf.int32)
    assert open_specs(tf.constant(1.0)) == tf.TensorSpec([], tf.float32)


def of_size(size: int) -> keras.Model:
    return keras.Sequential([keras.Input((size,)), keras.layers.ReLU()], name="net")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        TypeError("no"),
        KeyError("no"),
        IndexError("no"),
        AttributeError("no"),
        tf.errors.InvalidArgumentError(None, None, "no"),
        tf.errors.UnimplementedError(None, None, "no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_model_names_the_batch_and_blames_the_shape_only_if_wrong(
    error: Exception,
) -> None:
    for size, message in (
        (
            2,
            r"^Batch 3 of the data does not fit the model\. Received: inputs of shape "
            r"\(10, 3\) for model 'net', which takes \(None, 2\)\. Pass .* Keras says: "
            r".*no",
        ),
        (
            3,
            r"^The model fails on batch 3 of the data\. Received: inputs of shape "
            r"\(10, 3\) for model 'net'\. Check their .* Keras says: .*no",
        ),
    ):
        with (
            pytest.raises(ValueError, match=message) as caught,
            naming_batch(of_size(size), tf.constant(X), 3),
        ):
            raise error
        assert caught.value.__cause__ is error


def test_a_long_message_of_keras_is_cut_after_a_sentence() -> None:
    long = ValueError("First. " + "Second sentence which is very long. " * 20)
    with (
        pytest.raises(ValueError, match=r"long\. …$") as caught,
        naming_batch(of_size(3), tf.constant(X), 0),
    ):
        raise long
    assert len(str(caught.value)) < 600


def test_a_model_that_cannot_be_traced_is_told_from_data_that_do_not_fit() -> None:
    with (
        pytest.raises(
            ValueError,
            match=r"^The model cannot be traced, .* Received: model 'net'\. Write its",
        ),
        naming_batch(of_size(3), tf.constant(X), 0),
    ):
        raise tf.errors.OperatorNotAllowedInGraphError("no")


def test_other_exceptions_are_no_misfit() -> None:
    with pytest.raises(MemoryError), naming_batch(of_size(3), tf.constant(X), 0):
        raise MemoryError

"""Whatever goes wrong: one clear error of ours, and a model that is bit-identical."""

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import (
    batch_norms,
    compiled,
    dense,
    layers,
    normal,
    scatter,
    single,
    unchanged,
)

import bn_callbacks.measuring.data
from bn_callbacks import (
    BatchNormMonitor,
    DebiasBatchNorm,
    RecalibrateBatchNorm,
    audit,
    recalibrate,
    recalibrated,
)

X = normal(96, 6)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """Shared, since no test here changes it: that is what they are about."""
    net = compiled(scatter(dense(2)))
    net.train_on_batch(X[:8], X[:8, :1])
    return net


def data(
    batches: int = 6, at: int = -1, act: Callable[[], Any] = lambda: None
) -> Iterator[Any]:
    """Batches, one of which is what `act` gives or raises."""
    for index in range(batches):
        yield act() if index == at else X[16 * index % 96 :][:16]


def nan_batch() -> Any:
    bad = X[:16].copy()
    bad[3, 2] = np.nan
    return bad


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


# The data go wrong.


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("error", [OSError("disk gone"), RuntimeError("boom")], ids=str)
def test_an_exception_of_the_data_passes_as_it_is(
    model: keras.Model, error: Exception, at: int
) -> None:
    with unchanged(model), pytest.raises(type(error)) as caught:
        recalibrate(model, data(at=at, act=raising(error)), verbose=0)
    assert caught.value is error
    if sys.version_info >= (3, 11):
        assert error.__notes__[-1] == f"Raised by batch {at} of `x`, counted from 0."


@pytest.mark.parametrize("at", [0, 4])
def test_ctrl_c_leaves_the_model(model: keras.Model, at: int) -> None:
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        recalibrate(model, data(at=at, act=raising(KeyboardInterrupt())), verbose=0)


def test_ctrl_c_in_a_later_pass_leaves_the_model(model: keras.Model) -> None:
    class Interrupted(keras.utils.PyDataset):
        """Can be read once, and half."""

        reads = 0

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            if self.reads > 10:
                raise KeyboardInterrupt
            return X[16 * index :][:16]

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        recalibrate(model, Interrupted(), refine=3, verbose=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_batch_that_is_not_finite_is_named_with_the_first_layer_it_reaches(
    model: keras.Model, at: int, value: float
) -> None:
    x = X.copy()
    x[16 * at + 3, 2] = value
    first = batch_norms(model)[0]
    message = (
        rf"^The input of \S*{first.name} is not finite\. Received: NaN or infinity "
        rf"in batch {at} of the data \(counted from 0\)\. Remove it"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, x, batch_size=16, verbose=0)


@pytest.mark.parametrize("shape", [(6,), (4, 4, 3)], ids=["dense", "image"])
def test_of_two_bad_batches_the_first_is_named(shape: tuple[int, ...]) -> None:
    x = normal(96, *shape)
    x[40], x[70] = np.nan, np.inf
    net = keras.Sequential([keras.Input(shape), layers.BatchNormalization()])
    with unchanged(net), pytest.raises(ValueError, match="in batch 2 of the data"):
        recalibrate(net, x, batch_size=16, verbose=0)


def test_a_bad_batch_beyond_many_good_ones_is_named() -> None:
    net, x = single(6), normal(400, 6)
    x[333] = np.nan
    with unchanged(net), pytest.raises(ValueError, match="in batch 83 of the data"):
        recalibrate(net, x, batch_size=4, verbose=0)


def test_a_bad_batch_in_a_loop_is_named() -> None:
    net = keras.Sequential(
        [keras.Input((None, 6)), layers.TimeDistributed(layers.BatchNormalization())]
    )
    x = normal(64, 3, 6)
    x[40, 1, 2] = np.nan
    with unchanged(net), pytest.raises(ValueError, match="in batch 2 of the data"):
        recalibrate(net, x, batch_size=16, verbose=0)
    recalibrate(net, normal(64, 3, 6), verbose=0)


def test_an_overflow_inside_the_model_is_named_where_it_starts() -> None:
    inputs = keras.Input((6,))
    first = layers.BatchNormalization(name="first")(inputs)
    huge = layers.Rescaling(1e38)(layers.Rescaling(1e38)(first))
    net = keras.Model(inputs, layers.BatchNormalization(name="second")(huge))
    with unchanged(net), pytest.raises(ValueError, match=r"input of \S*second is not"):
        recalibrate(net, X, verbose=0)


def test_a_bad_batch_does_not_spoil_the_next_recalibration(model: keras.Model) -> None:
    with pytest.raises(ValueError, match="not finite"):
        recalibrate(model, data(at=2, act=nan_batch), verbose=0)
    with recalibrated(model, X, verbose=0) as report:
        assert report.residual <= 1e-3


def test_an_audit_names_a_bad_batch_as_well(model: keras.Model) -> None:
    with unchanged(model), pytest.raises(ValueError, match="batch 2 of the data"):
        audit(model, data(at=2, act=nan_batch))


@pytest.mark.parametrize(
    ("x", "steps"),
    [
        (X, 4),
        (lambda: data(3), 4),
        (lambda: tf.data.Dataset.from_tensor_slices(X).batch(32), 4),
        (
            lambda: (
                tf.data.Dataset.from_tensor_slices(X).batch(32).filter(lambda x: True)
            ),
            4,
        ),
    ],
    ids=["array", "generator", "dataset", "dataset of unknown length"],
)
def test_running_out_of_data_is_an_error(
    model: keras.Model, x: Any, steps: int
) -> None:
    message = r"^`x` ran out of data after 3 batches\. Received: steps=4\. Pass fewer"
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, x() if callable(x) else x, steps=steps, verbose=0)


@pytest.mark.parametrize(
    "x",
    [X[:0], iter([]), tf.data.Dataset.from_tensor_slices(X[:0]).batch(4), X[:0][None]],
    ids=["array", "generator", "dataset", "one batch of nothing"],
)
def test_empty_data_are_an_error(model: keras.Model, x: Any) -> None:
    if isinstance(x, np.ndarray) and x.ndim == 3:
        x = iter(x)
    with unchanged(model), pytest.raises(ValueError, match=r"empty|reach no Batch"):
        recalibrate(model, x, verbose=0)


def test_data_without_end_are_an_error(
    model: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(32).repeat()
    with unchanged(model), pytest.raises(ValueError, match=r"infinite.*Pass `steps`"):
        recalibrate(model, dataset, verbose=0)
    monkeypatch.setattr(bn_callbacks.measuring.data, "MAX_UNSIZED_BATCHES", 20)
    endless = itertools.cycle([X[:32]])
    with unchanged(model), pytest.raises(ValueError, match=r"infinite.*Pass `steps`"):
        recalibrate(model, endless, verbose=0)


# The data do not fit.


def functional() -> keras.Model:
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    joined = layers.Concatenate()([a, b])
    return keras.Model([a, b], layers.BatchNormalization()(joined))


class ByKey(keras.Model):
    """Looks its inputs up itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = layers.BatchNormalization()

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.bn(inputs["a"], training=training)


def by_key() -> keras.Model:
    net = ByKey()
    net({"a": X})
    return net


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (dense, X[:, :5]),
        (dense, normal(32, 6, 2)),
        (functional, X),
        (functional, [X, X]),
        (functional, {"a": X}),
        (by_key, {"b": X}),
        (by_key, X),
    ],
    ids=[
        "features",
        "rank",
        "one of two inputs",
        "second input",
        "missing key",
        "missing key in a subclass",
        "no dictionary",
    ],
)
def test_data_that_do_not_fit_are_named(
    build: Callable[[], keras.Model], x: Any
) -> None:
    net = build()
    message = (
        r"^Batch 0 of the data does not fit the model\. Received: inputs of shape .* "
        r"for model '\w+', which takes .*\. Pass data as `fit` takes them, in "
        r"batches\. Keras says: \S"
    )
    with unchanged(net), pytest.raises(ValueError, match=message):
        recalibrate(net, x, verbose=0)


class Lookup(keras.layers.Layer):
    """A layer that may fail for a reason of its own."""

    is_empty = False

    def call(self, x: Any) -> Any:
        if self.is_empty:
            raise ValueError("The lookup table is empty. Fill it.")
        return x


def with_an_empty_table() -> keras.Model:
    lookup = Lookup()
    net = keras.Sequential([keras.Input((6,)), lookup, layers.BatchNormalization()])
    lookup.is_empty = True
    return net


@pytest.mark.parametrize(
    ("build", "x", "reason"),
    [
        (dense, np.array([["a"] * 6] * 8), "string to float is not supported"),
        (with_an_empty_table, X, r"The lookup table is empty\. Fill it\."),
    ],
    ids=["strings", "an error of a layer"],
)
def test_an_error_without_a_wrong_shape_is_not_blamed_on_the_shape(
    build: Callable[[], keras.Model], x: Any, reason: str
) -> None:
    net = build()
    message = (
        r"^The model fails on batch 0 of the data\. Received: inputs of shape "
        r"\(\d+, 6\) for model '\w+'\. Check their structure and type, and the model's "
        rf"own code\. Keras says: .*{reason}"
    )
    with unchanged(net), pytest.raises(ValueError, match=message):
        recalibrate(net, x, verbose=0)


def test_a_later_batch_that_does_not_fit_is_named(model: keras.Model) -> None:
    x = [X[:16], X[16:32], X[32:48, :5]]
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"^Batch 2 of the data does"),
    ):
        recalibrate(model, iter(x), verbose=0)


def test_a_model_that_only_runs_eagerly_is_refused() -> None:
    class Eager(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bn = layers.BatchNormalization()

        def call(self, x: Any, training: bool | None = None) -> Any:
            if tf.reduce_mean(x) > 0:
                x = -x
            return self.bn(x, training=training)

    net = Eager()
    net(X)
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"^The model cannot be traced"),
    ):
        recalibrate(net, X, verbose=0)


# The arguments are wrong.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"^`steps` must be .*integer.* Received: steps=0"),
        (
            {"batch_size": 0},
            r"^`batch_size` must be .*integer.* Received: batch_size=0",
        ),
        ({"refine": -1}, r"^`refine` must be 'auto' or .* Received: refine=-1"),
        ({"refine": "more"}, r"^`refine` must be .* Received: refine='more'"),
        ({"refine": 1.5}, r"^`refine` must be .* Received: refine=1\.5"),
        ({"refine": True}, r"^`refine` must be .* Received: refine=True"),
        ({"tolerance": 0}, r"^`tolerance` must be .*positive.* Received: tolerance=0"),
        (
            {"layers": "conv"},
            r"^`layers` selects no BatchNormalization layer\. Received: 'conv'\. "
            r"The model has \S+, \S+\.",
        ),
        ({"layers": lambda layer: False}, r"selects no .*Received: <function"),
        ({"layers": ["batch", "conv"]}, r"selects no .*Received: 'conv'"),
    ],
    ids=[
        "steps",
        "batch_size",
        "refine -1",
        "refine word",
        "refine 1.5",
        "refine True",
        "tolerance",
        "layers",
        "layers predicate",
        "layers list",
    ],
)
def test_wrong_arguments_are_named(
    model: keras.Model, arguments: dict[str, Any], message: str
) -> None:
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, X, verbose=0, **arguments)


def test_a_selector_of_a_wrong_kind_is_a_type_error(model: keras.Model) -> None:
    with (
        unchanged(model),
        pytest.raises(TypeError, match=r"^`layers` takes names.* Received: 3"),
    ):
        recalibrate(model, X, layers=[3], verbose=0)


# The model is wrong.


def test_a_model_without_bn_is_an_error() -> None:
    net = keras.Sequential([keras.Input((6,)), layers.Dense(2)], name="plain")
    message = (
        r"^The model has no BatchNormalization layer to recalibrate\. Received: "
        r"model='plain'\. There is nothing"
    )
    with unchanged(net), pytest.raises(ValueError, match=message):
        recalibrate(net, X, verbose=0)


@pytest.mark.parametrize("act", [recalibrate, audit])
def test_an_unbuilt_model_is_an_error(act: Callable[..., Any]) -> None:
    net = keras.Sequential([layers.Dense(2), layers.BatchNormalization(name="bn")])
    message = (
        r"^The model is not built: bn has no statistics yet\. Received: "
        r"model='\w+'\. Call the model on a batch of data"
    )
    with pytest.raises(ValueError, match=message):
        act(net, X)
    with pytest.raises(ValueError, match=message), recalibrated(net, X):
        pytest.fail("not reached")


def keras_2_model(module: str) -> Any:
    base = type("Model", (), {"__module__": module})
    return type("Mine", (base,), {"__module__": "__main__"})()


@pytest.mark.parametrize(
    "module", ["tf_keras.src.engine.training", "keras.src.engine.training"]
)
@pytest.mark.parametrize(
    "act",
    [
        recalibrate,
        audit,
        # What `fit` of tf_keras does first; it goes on to what Keras 3 has not.
        lambda model, _: BatchNormMonitor().set_model(model),
        lambda model, _: DebiasBatchNorm().set_model(model),
        lambda model, x: RecalibrateBatchNorm(x).set_model(model),
    ],
)
def test_a_keras_2_model_is_told_what_it_is(
    act: Callable[..., Any], module: str
) -> None:
    message = (
        r"^`model` must be a keras\.Model\. Received: __main__\.Mine\. This is a Keras "
        r"2 model: unset TF_USE_LEGACY_KERAS"
    )
    with pytest.raises(TypeError, match=message):
        act(keras_2_model(module), X)


@pytest.mark.parametrize(
    "wrong", [None, "model", keras.layers.Dense(2)], ids=["None", "text", "layer"]
)
def test_what_is_no_model_is_a_type_error(wrong: Any) -> None:
    message = r"^`model` must be a keras\.Model\. Received: .* Pass the model that"
    with pytest.raises(TypeError, match=message):
        recalibrate(wrong, X)


def test_another_backend_is_an_error(
    model: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras, "backend", types.SimpleNamespace(backend=lambda: "jax"))
    message = (
        r"^bn_callbacks works on Keras' TensorFlow backend only\. Received: "
        r"keras\.backend\.backend\(\)='jax'\. Set the environment variable KERAS_"
    )
    with pytest.raises(RuntimeError, match=message):
        recalibrate(model, X)


# Writing goes wrong.


def test_statistics_are_written_into_all_layers_or_into_none(
    model: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = batch_norms(model)[-1].moving_variance
    own = type(last).assign
    failed = []

    def assign(variable: Any, value: Any) -> Any:
        # Keras itself assigns, of no effect, while a model is traced.
        if variable is last and isinstance(value, np.ndarray) and not failed:
            failed.append(variable)
            raise KeyboardInterrupt
        return own(variable, value)

    monkeypatch.setattr(type(last), "assign", assign)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        recalibrate(model, X, verbose=0)
    assert failed


def test_a_mean_that_overflows_downwards_is_named_without_a_warning_of_numpy() -> None:
    net = keras.Sequential(
        [
            keras.Input((6,)),
            layers.BatchNormalization(),
            layers.Dense(
                1, "linear", bias_initializer=keras.initializers.Constant(-2e38)
            ),
            layers.BatchNormalization(name="second"),
        ]
    )
    with unchanged(net), pytest.raises(ValueError, match=r"input of \S*second is not"):
        recalibrate(net, X, verbose=0)

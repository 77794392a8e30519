"""Finding BN layers, reading and writing their state, and Keras' own internals."""

import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import (
    KERAS,
    compiled,
    dense,
    layers,
    normal,
    scatter,
    single,
    state,
    stored,
    unchanged,
)

from bn_callbacks.layers import (
    BatchNormLayer,
    Fingerprint,
    Reader,
    assign,
    batch_mode,
    count_inputs,
    find,
    forward,
    is_built,
    iterations,
    read,
    restore,
    runs_in_training_mode,
    snapshot,
    stateless,
    steps_made,
    steps_per_execution,
    uses_ema,
    versions,
)
from bn_callbacks.layers.facts import SAMPLED_VALUES, SAMPLED_WEIGHTS
from bn_callbacks.statistics.moments import Statistics

BN = layers.BatchNormalization
X = normal(32, 6)
SPEC = tf.TensorSpec([None, 6])

# Finding.


def named() -> keras.Model:
    inputs = keras.Input((6,))
    x = BN(name="first")(inputs)
    inner = keras.Sequential([keras.Input((6,)), BN(name="bn")], name="inner")
    return keras.Model(inputs, BN(name="last")(inner(x)), name="outer")


def names(found: list[BatchNormLayer]) -> list[str]:
    return [bn.layer.name for bn in found]


def test_layers_are_found_in_the_order_of_the_model() -> None:
    assert names(find(named())) == ["first", "bn", "last"]


def test_paths_are_unique_where_names_are_not() -> None:
    class Twins(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.twins = [BN(name="bn"), BN(name="bn")]

        def build(self, shape: Any) -> None:
            for bn in self.twins:
                bn.build(shape)
            self.built = True

        def call(self, x: Any, training: bool | None = None) -> Any:
            for bn in self.twins:
                x = bn(x, training=training)
            return x

    found = find(keras.Sequential([keras.Input((6,)), Twins(), Twins()]))
    assert names(found) == ["bn"] * 4
    assert len({bn.path for bn in found}) == 4


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, ["first", "bn", "last"]),
        ("last", ["last"]),
        (["last", "first"], ["first", "last"]),
        (("last", "last"), ["last"]),
        ("inner/", ["bn"]),
        (re.compile("(first|last)$"), ["first", "last"]),
        (lambda layer: layer.name.endswith("t"), ["first", "last"]),
        ([re.compile("inner"), "last"], ["bn", "last"]),
    ],
    ids=[
        "None",
        "name",
        "names",
        "twice",
        "part of a path",
        "pattern",
        "predicate",
        "inner and name",
    ],
)
def test_layers_are_chosen(selection: Any, expected: list[str]) -> None:
    model = named()
    if KERAS < (3, 4) and "bn" in expected and len(expected) < 3:
        pytest.skip("paths of this Keras do not name the models around a layer")
    assert names(find(model, selection)) == expected


def test_layers_are_chosen_by_path_and_by_object() -> None:
    model = named()
    everything = find(model)
    for bn in everything:
        assert names(find(model, bn.path)) == [bn.layer.name]
        assert names(find(model, [bn.layer])) == [bn.layer.name]


@pytest.mark.parametrize(
    ("selection", "is_named"),
    [
        ("first", True),
        (["first"], True),
        ("fir", False),
        (re.compile("first"), False),
        (lambda layer: layer.name == "first", False),
        (["fir", "first"], True),
        (["first", "fir"], True),
    ],
    ids=["name", "names", "part", "pattern", "predicate", "part, name", "name, part"],
)
def test_only_a_name_or_a_path_names_a_layer(selection: Any, is_named: bool) -> None:
    (bn,) = find(named(), selection)
    assert bn.named is is_named


def test_a_layer_of_another_model_is_not_chosen() -> None:
    with pytest.raises(ValueError, match="selects no BatchNormalization layer"):
        find(named(), [BN()])


def test_a_layer_that_nothing_has_ever_built_is_none() -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = BN(), BN()

        def build(self, shape: Any) -> None:
            self.used.build(shape)
            self.built = True

        def call(self, x: Any, training: bool | None = None) -> Any:
            return self.used(x, training=training)

    model = Model()
    assert not is_built(model)
    with pytest.raises(ValueError, match="not built"):
        find(model)
    model(X)
    assert [bn.layer for bn in find(model)] == [model.used]


def test_a_model_without_bn_has_none() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.LayerNormalization()])
    assert find(model) == []
    assert is_built(model)


def test_calls_of_a_shared_layer_are_counted() -> None:
    inputs = keras.Input((6,))
    shared, once = BN(name="shared"), BN(name="once")
    x = shared(once(shared(inputs)))
    inner = keras.Model(inputs, x)
    outer_inputs = keras.Input((6,))
    outer = keras.Model(outer_inputs, inner(inner(outer_inputs)))
    assert {bn.layer.name: bn.calls for bn in find(inner)} == {"shared": 2, "once": 1}
    assert {bn.layer.name: bn.calls for bn in find(outer)} == {"shared": 4, "once": 2}


def test_the_number_of_inputs_is_known() -> None:
    a, b = keras.Input((6,), name="a"), keras.Input((2,), name="b")
    assert count_inputs(dense()) == 1
    assert count_inputs(keras.Model([a, b], layers.Concatenate()([a, b]))) == 2
    named_inputs = keras.Model({"a": a, "b": b}, layers.Concatenate()([a, b]))
    assert count_inputs(named_inputs) == 2
    assert count_inputs(keras.Sequential([layers.Dense(2)])) is None

    class Pair(keras.Model):
        def call(self, inputs: Any) -> Any:
            return inputs[0] + inputs[1]

    class One(keras.Model):
        def call(self, inputs: Any) -> Any:
            return inputs + 1

    pair, one = Pair(), One()
    pair((X, X))
    one(X)
    assert count_inputs(pair) in (2, None)
    assert count_inputs(one) in (1, None)


# State.


def test_what_a_layer_says_of_itself() -> None:
    layer = BN(momentum=0.8, epsilon=0.25, name="bn")
    model = keras.Sequential([keras.Input((3,)), layer])
    (bn,) = find(model)
    assert (bn.momentum, bn.epsilon, bn.channels) == (0.8, 0.25, 3)
    assert (bn.trainable, bn.renorm, bn.calls, bn.named) == (True, False, 1, False)
    assert bn.initial.mean.tolist() == [0, 0, 0]
    assert bn.initial.variance.tolist() == [1, 1, 1]
    model.trainable = False
    assert not bn.trainable


def test_the_values_a_layer_starts_with_are_its_initializers() -> None:
    layer = BN(
        moving_mean_initializer=keras.initializers.Constant([1.0, 2.0]),
        moving_variance_initializer="zeros",
    )
    (bn,) = find(keras.Sequential([keras.Input((2,)), layer]))
    assert bn.initial.mean.tolist() == [1, 2] == layer.moving_mean.numpy().tolist()
    assert bn.initial.variance.tolist() == [0, 0]


def test_statistics_are_read_in_float64() -> None:
    model = scatter(dense(2))
    for statistics, (mean, variance) in zip(
        read(find(model)), stored(model), strict=True
    ):
        assert statistics.mean.dtype == statistics.variance.dtype == np.float64
        np.testing.assert_array_equal(statistics.mean, mean)
        np.testing.assert_array_equal(statistics.variance, variance)


def statistics_of(model: keras.Model, value: float) -> list[Statistics]:
    return [
        Statistics(np.full(bn.channels, value), np.full(bn.channels, value**2))
        for bn in find(model)
    ]


def test_assigning_writes_both_and_restoring_gives_them_back() -> None:
    model = scatter(dense(2))
    found = find(model)
    saved, before = snapshot(found), state(model)
    assign(found, statistics_of(model, 3.0))
    for mean, variance in stored(model):
        assert set(mean.tolist()) == {3.0}
        assert set(variance.tolist()) == {9.0}
    restore(saved)
    assert state(model) == before


def test_a_version_tells_each_assignment_and_comes_back_with_restore() -> None:
    model = dense(2)
    found = find(model)
    seen = [versions(found)]
    saved = snapshot(found)
    for value in (1.0, 2.0):
        assign(found[:1], statistics_of(model, value)[:1])
        seen.append(versions(found))
    assert len({version[0] for version in seen}) == 3
    assert len({version[1] for version in seen}) == 1
    restore(saved)
    assert versions(found) == seen[0]


def test_values_that_are_not_finite_are_not_assigned_to_any_layer() -> None:
    model = dense(2)
    found, values = find(model), statistics_of(model, 1.0)
    values[1] = Statistics(values[1].mean, values[1].variance * np.inf)
    message = r"^The statistics of \S+ do not fit .*Received: float32 .*Scale the data"
    with unchanged(model), pytest.raises(ValueError, match=message):
        assign(found, values)


def test_rounding_is_to_what_the_layer_stores() -> None:
    model = keras.Sequential([keras.Input((1,)), BN(dtype="bfloat16")])
    (bn,) = find(model)
    rounded = bn.rounded(Statistics(np.array([64.3]), np.array([1.001])))
    # 8 bits: steps of 0.5 near 64, of 1/128 near 1.
    assert (rounded.mean[0], rounded.variance[0]) == (64.5, 1.0)
    assign([bn], [rounded])
    assert read([bn])[0].mean.tolist() == [64.5]
    read_mean, _ = bn.as_read(
        tf.constant([64.3], tf.float64),
        tf.constant([1.0], tf.float64),
        tf.float32,
        True,
    )
    assert read_mean.numpy().tolist() == [64.5]
    assert read_mean.dtype == tf.float32


def test_reading_as_a_layer_does_leaves_the_layer() -> None:
    model = scatter(single(2))
    (bn,) = find(model)
    with unchanged(model):
        bn.as_read(
            tf.constant([5.0, 5.0]), tf.constant([2.0, 2.0]), tf.float32, is_stored=True
        )


# Reading all layers at once.


def test_the_reader_reads_all_averages_and_the_step() -> None:
    model = compiled(scatter(dense(3)))
    reader = Reader(model, find(model))
    step, flat = reader()
    assert step == 0
    for index, (mean, variance) in enumerate(stored(model)):
        np.testing.assert_array_equal(reader.averages(flat, index), [[mean, variance]])
    model.train_on_batch(X, X[:, :1])
    step, flat = reader()
    assert step == 1
    np.testing.assert_array_equal(reader.averages(flat, 2)[0], stored(model)[2])
    per_layer = reader.all_per_layer(flat == flat)
    assert per_layer.tolist() == [True] * 3
    assert flat.shape == (1, *reader.spread(per_layer).shape)


def test_the_reader_works_without_an_optimizer() -> None:
    step, flat = Reader(single(2), find(single(2)))()
    assert step is None
    assert flat.tolist() == [[0, 0, 1, 1]]


# Training mode.


def test_training_mode_is_what_the_models_call_makes_of_it() -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.free, self.pinned, self.idle, self.frozen = (
                BN(name=name) for name in ("free", "pinned", "idle", "frozen")
            )

        def build(self, shape: Any) -> None:
            for layer in (self.free, self.pinned, self.idle, self.frozen):
                layer.build(shape)
            self.built = True

        def call(self, x: Any, training: bool | None = None) -> Any:
            x = self.pinned(self.free(x), training=False)
            return self.frozen(x, training=training)

    model = Model()
    model(X)
    model.frozen.trainable = False
    found = find(model)
    with unchanged(model):
        asks = runs_in_training_mode(model, found, SPEC)
    assert dict(zip(names(found), asks, strict=True)) == {
        "free": True,
        "pinned": False,
        "idle": None,
        "frozen": False,
    }
    asks = runs_in_training_mode(model, find(model, names(found)), SPEC)
    assert dict(zip(names(found), asks, strict=True)) == {
        "free": True,
        "pinned": True,
        "idle": None,
        "frozen": True,
    }


# What a compiled model tells.


def test_steps_and_iterations_are_counted() -> None:
    model = dense(1)
    assert steps_made(model) == iterations(model) == 0
    assert not uses_ema(model)
    assert steps_per_execution(model) == 1
    compiled(model)
    model.train_on_batch(X, X[:, :1])
    assert steps_made(model) == iterations(model) == 1


def test_optimizer_ema_is_seen() -> None:
    model = dense(1)
    model.compile(keras.optimizers.SGD(use_ema=True), "mse", steps_per_execution=4)
    assert uses_ema(model)
    assert steps_per_execution(model) == 4


@pytest.mark.parametrize("depth", [0, 1, 40])
def test_a_fingerprint_changes_with_the_weights_and_back(depth: int) -> None:
    model = keras.Sequential([keras.Input((2,))])
    for _ in range(depth):
        model.add(layers.Dense(2))
    fingerprint = Fingerprint(model)
    sizes = list(map(len, fingerprint()))
    assert len(sizes) <= SAMPLED_WEIGHTS
    assert max(sizes, default=0) <= SAMPLED_VALUES
    before, weights = fingerprint(), model.get_weights()
    model.set_weights([weight + 1 for weight in weights])
    assert fingerprint.is_replaced(before) is (depth > 0)
    model.set_weights(weights)
    assert not fingerprint.is_replaced(before)
    # An average of weights that rest differs by thousandths.
    model.set_weights([weight * 1.001 for weight in weights])
    assert not fingerprint.is_replaced(before)


def test_one_matrix_that_is_replaced_is_not_hidden_by_others() -> None:
    model = keras.Sequential([keras.Input((200,)), layers.Dense(40), layers.Dense(2)])
    large, _, small, bias = model.trainable_variables
    large.assign(100 + large)
    fingerprint = Fingerprint(model)
    before = fingerprint()
    assert fingerprint.is_same(before)
    # A vector next to nothing may change by itself: what matters is all together.
    bias.assign(bias + 1e-3)
    assert not fingerprint.is_same(before)
    assert not fingerprint.is_replaced(before)
    small.assign(1.02 * small)
    assert fingerprint.is_replaced(before)


@pytest.mark.skipif(KERAS < (3, 4), reason="this Keras does not accumulate gradients")
def test_micro_batches_are_steps() -> None:
    model = dense(1)
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), "mse")
    for _ in range(4):
        model.train_on_batch(X, X[:, :1])
    assert (steps_made(model), iterations(model)) == (4, 2)


# A mode of our own.


def test_a_salt_makes_dropout_draw_anew_and_leaves_the_seed() -> None:
    model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, seed=1)])

    def draw(salt: int | None) -> Any:
        with stateless(model, None if salt is None else tf.constant(salt)):
            return np.asarray(forward(model, X, training=True))

    with unchanged(model):
        one, same, other = draw(None), draw(None), draw(7)
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_batch_mode_puts_every_attribute_back_also_after_an_exception() -> None:
    model = dense(2)
    found = find(model)

    def fail() -> None:
        with batch_mode(model, found, lambda bn: bn.layer._moments):
            raise KeyError

    with unchanged(model), pytest.raises(KeyError):
        fail()
    with batch_mode(model, found, lambda bn: bn.layer._moments):
        assert "call" in vars(found[0].layer)

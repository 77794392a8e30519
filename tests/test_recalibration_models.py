"""Recalibration of every kind of model: one rule each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import (
    KERAS,
    assert_close,
    batch_norms,
    compiled,
    conv,
    cut,
    dense,
    dtype_policy,
    lag,
    layer_by_layer,
    layers,
    normal,
    residual,
    rows,
    scatter,
    seen_in_inference,
    single,
    stored,
    unchanged,
    watched,
)

from bn_callbacks import RecalibrationReport, recalibrate

BN = layers.BatchNormalization
X = normal(96, 6)


def check(
    model: keras.Model, x: Any = X, limit: float = 1e-3, **arguments: Any
) -> RecalibrationReport:
    """Recalibrates; asserts what holds of every model, and returns the report.

    In inference mode every layer sees the statistics it stores; the residual says
    so; they are those found one layer after the other; nothing else has changed.
    """
    parts = cut(x, 32)
    with unchanged(model, except_for="m"):  # moving statistics and renorm averages
        report = recalibrate(model, x, verbose=0, **arguments)
    assert report.residual is not None
    assert report.residual <= limit
    seen = residual(model, parts)
    assert seen == pytest.approx(report.residual, rel=0.05, abs=5e-6)
    assert_close(model, layer_by_layer(model, parts), max(5e-3, 2 * limit))
    return report


def sequential(shape: tuple[int | None, ...], *stack: Any) -> keras.Model:
    return scatter(keras.Sequential([keras.Input(shape), *stack]))


# Axes, scale, centre.


@pytest.mark.parametrize("axis", [1, 2, -1, -3])
def test_any_axis(axis: int) -> None:
    model = sequential((3, 4, 5), BN(axis=axis), layers.ReLU(), BN(axis=axis))
    check(model, normal(64, 3, 4, 5))


@pytest.mark.parametrize("axis", [1, -1])
def test_sequences(axis: int) -> None:
    check(
        sequential((5, 4), BN(axis=axis), layers.Conv1D(3, 2), BN(axis=axis)),
        normal(64, 5, 4),
    )


def test_volumes() -> None:
    check(
        sequential((2, 3, 3, 2), BN(), layers.Conv3D(3, 2), BN()),
        normal(40, 2, 3, 3, 2),
    )


@pytest.mark.parametrize(
    ("shape", "scale", "center"),
    [
        ((6,), False, True),
        ((6,), True, False),
        ((6,), False, False),
        ((3, 3, 6), False, True),
        ((3, 3, 6), True, False),
    ],
    ids=str,
)
def test_without_scale_or_centre(
    shape: tuple[int, ...], scale: bool, center: bool
) -> None:
    def bn() -> Any:
        return BN(scale=scale, center=center, epsilon=0.1)

    check(sequential(shape, bn(), layers.ReLU(), bn()), normal(64, *shape))


def test_an_epsilon_too_small_for_some_fused_kernels() -> None:
    model = sequential((3, 3, 6), BN(epsilon=1e-7), layers.ReLU(), BN(epsilon=1e-7))
    check(model, normal(64, 3, 3, 6, std=1e-4))


@pytest.mark.parametrize("shape", [(6,), (3, 3, 6)], ids=["dense", "image"])
def test_inputs_far_from_0(shape: tuple[int, ...]) -> None:
    middle = layers.Dense(4)
    model = sequential(shape, BN(), middle, layers.ReLU(), BN())
    check(model, normal(64, *shape, mean=1e4, std=1), limit=2e-3)
    variance = stored(model)[0][1]
    exact = rows(batch_norms(model)[0], normal(64, *shape, mean=1e4, std=1)).var(0)
    np.testing.assert_allclose(variance, exact, rtol=1e-3)


def test_constant_channels() -> None:
    x = np.concatenate([X, np.full_like(X, 7)], axis=1)
    model = sequential((12,), BN(), layers.Dense(3), BN())
    check(model, x)
    np.testing.assert_allclose(stored(model)[0][1][6:], 0, atol=1e-9)


# Where layers live.


def test_nested_models_and_equal_names() -> None:
    def block(name: str) -> keras.Model:
        inputs = keras.Input((6,))
        outputs = layers.Dense(6)(BN(name="bn")(inputs))
        return keras.Model(inputs, outputs, name=name)

    inner = keras.Sequential([block("one"), layers.ReLU(), block("two")])
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(1)(inner(inputs)))
    scatter(model)
    report = check(model)
    paths = [layer.path for layer in report.before.layers]
    assert len(set(paths)) == 2
    assert all("bn" in path for path in paths)


class Held(keras.Model):
    """BN layers in an attribute, a list, a dictionary and a nested layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BN()
        self.pairs = [[layers.Dense(5), BN()], [layers.Dense(4), BN()]]
        self.named = {"last": BN()}

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.first(x, training=training)
        for linear, bn in self.pairs:
            x = keras.ops.relu(bn(linear(x), training=training))
        return self.named["last"](x)  # inherits `training`


def test_layers_in_attributes_lists_and_dictionaries() -> None:
    model = Held()
    model(X)
    report = check(scatter(model))
    assert len(report.before.layers) == 4


def test_a_layer_that_contains_layers() -> None:
    class Block(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = layers.Dense(5), BN()

        def build(self, shape: Any) -> None:
            self.linear.build(shape)
            self.bn.build((None, 5))
            self.built = True

        def call(self, x: Any, training: bool | None = None) -> Any:
            return keras.ops.relu(self.bn(self.linear(x), training=training))

    check(sequential((6,), Block(), Block()))


def test_a_functional_graph_that_says_training_false_is_recalibrated() -> None:
    # Keras overrides it in `fit`, so that the layer is updated (keras#20285).
    inputs = keras.Input((6,))
    outputs = BN()(layers.Dense(4)(BN()(inputs, training=False)))
    check(scatter(keras.Model(inputs, outputs)))


def test_several_inputs_and_outputs() -> None:
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    joined = BN()(layers.Concatenate()([BN()(a), layers.Dense(3)(b)]))
    outputs = {"one": layers.Dense(1)(joined), "two": BN()(layers.Dense(2)(joined))}
    model = scatter(keras.Model({"a": a, "b": b}, outputs))
    data = {"a": X, "b": normal(96, 4)}
    report = recalibrate(model, data, verbose=0)
    parts = [{k: v[s : s + 32] for k, v in data.items()} for s in (0, 32, 64)]
    assert residual(model, parts) == pytest.approx(report.residual, abs=1e-6)
    assert report.residual <= 1e-3
    assert_close(model, layer_by_layer(model, parts))


# Subclasses of BatchNormalization.


class Scaled(BN):
    """Changes its input first: the statistics are those of what BN sees."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(2 * inputs + 1, training=training, mask=mask)


class Brief(BN):
    """Its own signature, shorter and with another name."""

    def call(self, x: Any, training: Any = None) -> Any:
        return super().call(x, training=training)


class Long(BN):
    """Its own signature, longer."""

    def call(
        self, x: Any, shift: float = 1.0, training: Any = None, mask: Any = None
    ) -> Any:
        return super().call(x, training=training, mask=mask) + shift


class Plain(BN):
    """Nothing of its own."""


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Brief, (6,)), (Brief, (3, 3, 6)), (Long, (6,)), (Plain, (3, 3, 6))],
    ids=["brief", "brief image", "long", "plain image"],
)
def test_subclasses_that_call_super(kind: type, shape: tuple[int, ...]) -> None:
    check(sequential(shape, kind(), layers.Dense(4), kind()), normal(64, *shape))


def test_a_subclass_that_changes_its_input_stores_what_it_normalises() -> None:
    model = sequential((6,), Scaled())
    report = recalibrate(model, X, verbose=0)
    ((mean, variance),) = stored(model)
    np.testing.assert_allclose(mean, 2 * X.mean(0) + 1, rtol=1e-5)
    np.testing.assert_allclose(variance, 4 * X.var(0), rtol=1e-5)
    assert report.residual <= 1e-3


# Shared and repeated layers.


def test_a_shared_layer_pools_its_calls() -> None:
    a, b = keras.Input((6,)), keras.Input((6,))
    shared = BN()
    model = keras.Model([a, b], layers.Add()([shared(a), shared(b)]))
    other = normal(96, 6, mean=-4, seed=1)
    recalibrate(model, [X, other], verbose=0)
    ((mean, variance),) = stored(model)
    both = np.concatenate([X, other]).astype(np.float64)
    np.testing.assert_allclose(mean, both.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(variance, both.var(0), rtol=1e-5)


def test_a_layer_that_sees_its_own_output_again_is_consistent() -> None:
    inputs = keras.Input((6,))
    shared = BN()
    again = shared(layers.ReLU()(layers.Dense(6)(shared(inputs))))
    model = keras.Model(inputs, layers.Dense(1)(again))
    report = recalibrate(model, X, verbose=0)
    assert report.residual <= 1e-3
    assert residual(model, cut(X, 32)) == pytest.approx(report.residual, rel=0.05)


@pytest.mark.parametrize("steps", [5, None], ids=["known length", "unknown length"])
def test_time_distributed_pools_the_time_steps(steps: int | None) -> None:
    x = normal(64, 5, 4)
    model = sequential(
        (steps, 4), layers.TimeDistributed(BN()), layers.Dense(3), layers.ReLU()
    )
    recalibrate(model, x, verbose=0)
    ((mean, variance),) = stored(model)
    np.testing.assert_allclose(mean, x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(variance, x.var((0, 1)), rtol=1e-5)


def test_time_distributed_counts_unmasked_steps_only() -> None:
    x = padded()
    model = sequential((5, 4), layers.Masking(), layers.TimeDistributed(BN()))
    recalibrate(model, x, verbose=0)
    valid = x[np.any(x != 0, axis=-1)]
    np.testing.assert_allclose(stored(model)[0][0], valid.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stored(model)[0][1], valid.var(0), rtol=1e-5)


@keras.saving.register_keras_serializable()
class Cell(keras.layers.Layer):
    """A recurrent cell that normalises its state before it forgets it."""

    def __init__(self, units: int = 4, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.state_size = self.output_size = units
        self.inner, self.outer = layers.Dense(units), layers.Dense(units)
        self.bn = BN()

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.outer.build((None, self.state_size))
        self.bn.build((None, self.state_size))
        self.built = True

    def call(self, x: Any, states: Any, training: bool | None = None) -> Any:
        total = self.inner(x) + self.outer(states[0])
        state = keras.ops.tanh(self.bn(total, training=training))
        return state, [state]


@pytest.mark.parametrize("unroll", [True, False])
def test_a_recurrent_cell_pools_each_time_step_once(unroll: bool) -> None:
    cell, x = Cell(), normal(64, 5, 4)
    model = sequential((5, 4), layers.RNN(cell, unroll=unroll), layers.Dense(2))
    report = recalibrate(model, x, verbose=0)
    # Keras runs a cell once more before a loop, to learn the shape of its output;
    # an unrolled layer has no such call. Both share the cell.
    unrolled = keras.Sequential([keras.Input((5, 4)), layers.RNN(cell, unroll=True)])
    assert report.residual <= 1e-3
    assert residual(unrolled, cut(x, 32)) == pytest.approx(report.residual, rel=0.05)
    assert [len(seen) for seen in seen_in_inference(unrolled, cut(x, 32))] == [64 * 5]


def test_bidirectional_and_nested_in_time() -> None:
    cell, x = Cell(), normal(40, 5, 4)
    model = sequential((5, 4), layers.Bidirectional(layers.RNN(cell)))
    report = recalibrate(model, x, verbose=0)
    assert report.residual <= 1e-3
    assert len(report.before.layers) == 2


# Masks.


def padded(shape: tuple[int, int, int] = (96, 5, 4)) -> Any:
    """Sequences of which the ends are 0; those of the second batch of 32 wholly."""
    x = normal(*shape)
    x[:, 3:] = 0
    x[:20, 2:] = 0
    x[32:64] = 0
    return x


def test_masked_elements_do_not_count() -> None:
    x = padded()
    model = sequential((5, 4), layers.Masking(), BN(), layers.Dense(3), BN())
    check(model, x)
    valid = x[np.any(x != 0, axis=-1)]
    np.testing.assert_allclose(stored(model)[0][0], valid.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stored(model)[0][1], valid.var(0), rtol=1e-5)


@pytest.mark.parametrize("refine", [0, "auto"])
def test_a_wholly_masked_batch_contributes_nothing(refine: Any) -> None:
    x = padded()
    model = sequential((5, 4), layers.Masking(), BN(), layers.Dense(3), BN())
    twin = sequential((5, 4), layers.Masking(), BN(), layers.Dense(3), BN())
    twin.set_weights(model.get_weights())
    recalibrate(model, x, refine=refine, verbose=0)
    recalibrate(twin, np.delete(x, slice(32, 64), 0), refine=refine, verbose=0)
    for one, other in zip(stored(model), stored(twin), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_what_is_masked_may_be_nan() -> None:
    x = normal(64, 5, 4)
    mask = np.arange(5) < np.arange(64)[:, None] % 5 + 1
    inputs, given = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    model = keras.Model([inputs, given], BN()(inputs, mask=given))
    valid = x[mask]
    x[~mask] = np.nan
    recalibrate(model, [x, mask], verbose=0)
    np.testing.assert_allclose(stored(model)[0][0], valid.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stored(model)[0][1], valid.var(0), rtol=1e-5)


def test_data_masked_throughout_are_an_error() -> None:
    model = sequential((5, 4), layers.Masking(), BN())
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"reach no Batch.*Received: 2 .*Pass data"),
    ):
        recalibrate(model, np.zeros((64, 5, 4), "float32"), verbose=0)


# Options of the layer.


@pytest.mark.skipif(KERAS < (3, 13), reason="this Keras has no renormalisation")
def test_renormalising_layers_keep_their_statistics_in_the_next_step() -> None:
    model = compiled(
        sequential((6,), layers.Dense(4), BN(renorm=True), layers.Dense(1))
    )
    check(model)
    (bn,) = batch_norms(model)
    ((mean, variance),) = stored(model)
    sigma = np.sqrt(variance + bn.epsilon)
    np.testing.assert_allclose(bn.moving_stddev, sigma, rtol=1e-6)
    np.testing.assert_allclose(bn.renorm_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(bn.renorm_stddev, sigma, rtol=1e-6)
    model.optimizer.learning_rate = 0.0
    model.train_on_batch(X, X[:, :1])  # all of the data: the batch agrees
    np.testing.assert_allclose(stored(model)[0][1], variance, rtol=1e-4)
    np.testing.assert_allclose(stored(model)[0][0], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(KERAS < (3, 13), reason="this Keras has no renormalisation")
def test_renormalisation_plays_no_part_in_the_pass() -> None:
    plain = sequential((6,), BN(), layers.ReLU(), BN())
    renorm = sequential((6,), BN(renorm=True), layers.ReLU(), BN(renorm=True))
    for model in (plain, renorm):
        recalibrate(model, X, refine=0, verbose=0)
    for one, other in zip(stored(plain), stored(renorm), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(KERAS < (3, 13), reason="this Keras has no renormalisation")
def test_undo_covers_what_renormalisation_keeps() -> None:
    model = sequential((6,), BN(renorm=True))
    with unchanged(model):
        report = recalibrate(model, X, verbose=0)
        assert np.any(batch_norms(model)[0].renorm_stddev.numpy() != 1)
        report.undo()


def test_synchronized_layers() -> None:
    check(
        sequential((6,), BN(synchronized=True), layers.Dense(3), BN(synchronized=True))
    )


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> Iterator[str]:
    with dtype_policy(request.param):
        yield request.param


@pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "float64"], indirect=True
)
@pytest.mark.parametrize("image", [False, True], ids=["dense", "image"])
def test_policies(policy: str, image: bool) -> None:
    model = scatter(conv() if image else dense())
    check(model, normal(64, 6, 6, 3) if image else X)
    if policy == "float64":
        assert residual(model, cut(normal(64, 6, 6, 3) if image else X, 32)) < 1e-12


@pytest.mark.parametrize("policy", ["bfloat16", "float16"], indirect=True)
def test_statistics_in_few_bits_are_as_right_as_these_bits_allow(policy: str) -> None:
    # Half a unit in the last of 8 or 11 bits, of a mean up to some 5 σ.
    bits = 8 if policy == "bfloat16" else 11
    check(scatter(dense()), limit=5 * 2.0**-bits)


@pytest.mark.parametrize("policy", ["bfloat16"], indirect=True)
def test_the_residual_counts_the_rounding_of_what_is_stored(policy: str) -> None:
    model = single(4)
    report = recalibrate(model, normal(96, 4, mean=63.9, std=0.5), verbose=0)
    assert stored(model)[0][0].dtype == "bfloat16"
    assert report.residual > 1e-2  # a bfloat16 near 64 is right to 0.125


@pytest.mark.parametrize("policy", ["float16"], indirect=True)
def test_statistics_beyond_the_range_of_the_dtype_are_refused(policy: str) -> None:
    model = single(4)
    message = (
        r"^The statistics of \S+ do not fit the layer's dtype\. Received: float16 "
        r"values that are not finite\. Scale the data, or store"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, normal(96, 4, mean=0, std=2000), verbose=0)


# Which layers.


def test_frozen_layers_stay_and_are_reported() -> None:
    model = scatter(dense(2))
    frozen, free = batch_norms(model)
    frozen.trainable = False
    before = stored(model)
    report = recalibrate(model, X, verbose=0)
    np.testing.assert_array_equal(stored(model)[0], before[0])
    # The layer behind is consistent with what the frozen one stores.
    seen = seen_in_inference(model, cut(X, 32))[1]
    assert lag(free, seen, *stored(model)[1]) <= 1e-3
    assert len(report.skipped) == 1
    assert frozen.name in report.skipped[0]
    assert f"left alone, not updated in training: {report.skipped[0]}" in str(report)


def test_a_frozen_layer_is_recalibrated_when_it_is_named() -> None:
    model = scatter(dense(2))
    frozen, _ = batch_norms(model)
    frozen.trainable = False
    before = stored(model)
    recalibrate(model, X, layers=[frozen.name], verbose=0)
    assert not frozen.trainable
    seen = seen_in_inference(model, cut(X, 32))[0]
    assert lag(frozen, seen, *stored(model)[0]) <= 1e-3
    np.testing.assert_array_equal(stored(model)[1], before[1])


def test_a_frozen_layer_is_not_named_by_a_pattern() -> None:
    model = dense(2)
    batch_norms(model)[0].trainable = False
    report = recalibrate(model, X, layers="batch", verbose=0)
    assert len(report.skipped) == 1


def test_a_frozen_model_is_refused() -> None:
    model = dense(2)
    model.trainable = False
    message = r"^All .* frozen .*Received: \S+ and 1 more\. Name the layers .*layers="
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, X, verbose=0)


class Pinned(keras.Model):
    """Runs one layer in inference mode always, and another never."""

    def __init__(self, is_pinned: bool = True) -> None:
        super().__init__()
        self.pinned, self.free, self.idle = (
            BN(name=name) for name in ("pinned", "free", "idle")
        )
        self.linear = layers.Dense(4)
        self.is_pinned = is_pinned

    def build(self, shape: Any) -> None:
        for layer, size in (
            (self.pinned, 6),
            (self.linear, 6),
            (self.free, 4),
            (self.idle, 6),
        ):
            layer.build((None, size))
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.pinned(x, training=False if self.is_pinned else training)
        return self.free(self.linear(x), training=training)


def pinned() -> keras.Model:
    model = Pinned()
    model(X)
    return scatter(model)


def test_a_layer_pinned_to_inference_stays_and_is_reported() -> None:
    model = pinned()
    before = stored(model)
    report = recalibrate(model, X, verbose=0)
    np.testing.assert_array_equal(stored(model)[0], before[0])
    assert [path.rpartition("/")[2] for path in report.skipped] == ["pinned"]
    seen = seen_in_inference_of_called(model)
    assert lag(model.free, seen[id(model.free)], *stored(model)[1]) <= 1e-3


def test_a_layer_pinned_to_inference_is_recalibrated_when_it_is_named() -> None:
    model = pinned()
    report = recalibrate(model, X, layers=["pinned", "free"], verbose=0)
    np.testing.assert_allclose(stored(model)[0][0], X.mean(0), rtol=1e-5)
    assert report.skipped == ()


def test_a_layer_that_nothing_calls_keeps_its_statistics_and_is_reported() -> None:
    model = pinned()
    before = stored(model)
    report = recalibrate(model, X, verbose=0)
    np.testing.assert_array_equal(stored(model)[2], before[2])
    assert [path.rpartition("/")[2] for path in report.unreached] == ["idle"]
    assert "left alone, never reached by the data: " in str(report)
    assert str(report).startswith("Recalibrated 1 BatchNormalization layer over")


def seen_in_inference_of_called(model: keras.Model) -> dict[int, Any]:
    seen: dict[int, Any] = {}
    with watched(model, lambda bn, x, mask: seen.update({id(bn): rows(bn, x, mask)})):
        model(X, training=False)
    return seen


def test_a_branch_that_the_data_never_take_keeps_its_statistics() -> None:
    class Branching(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = BN(name="large"), BN(name="small")

        def build(self, shape: Any) -> None:
            self.large.build(shape)
            self.small.build(shape)
            self.built = True

        def call(self, x: Any, training: bool | None = None) -> Any:
            return tf.cond(
                tf.reduce_mean(x) > 1000,
                lambda: self.large(x, training=training),
                lambda: self.small(x, training=training),
            )

    model = Branching()
    model(X)
    scatter(model)
    before = stored(model)
    report = recalibrate(model, X, verbose=0)
    np.testing.assert_array_equal(stored(model)[0], before[0])
    np.testing.assert_allclose(stored(model)[1][0], X.mean(0), rtol=1e-5)
    assert [path.rpartition("/")[2] for path in report.unreached] == ["large"]


def no_training() -> keras.Model:
    class Model(keras.Model):
        """Its `call` takes no `training`, so that `fit` never trains its BN."""

        def __init__(self) -> None:
            super().__init__()
            self.bn = BN(name="bn")

        def call(self, x: Any) -> Any:
            return self.bn(x)

    model = Model()
    model(X)
    return model


class Deaf(BN):
    """In inference mode whatever it is told."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(inputs, training=False, mask=mask)


@pytest.mark.parametrize(
    "build",
    [no_training, lambda: sequential((6,), Deaf())],
    ids=["model", "layer"],
)
def test_layers_that_never_train_are_refused(build: Callable[[], keras.Model]) -> None:
    model = build()
    message = (
        r"^The model's own call never runs its BatchNormalization layers in training "
        r"mode, .*Received: \S+ and 0 more\. Pass `training` on"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, X, verbose=0)


def test_a_model_that_never_trains_is_recalibrated_when_layers_are_named() -> None:
    model = no_training()
    recalibrate(model, X, layers=["bn"], verbose=0)
    np.testing.assert_allclose(stored(model)[0][0], X.mean(0), rtol=1e-5)


def test_a_layer_that_cannot_be_measured_is_refused_even_by_name() -> None:
    model = sequential((6,), BN(), Deaf(name="deaf"))
    message = r"^The input of \S+deaf cannot be .*Received: a Deaf\. Leave it out"
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, X, layers=["deaf"], verbose=0)


# Neighbours.


def test_losses_added_in_call() -> None:
    class Penalty(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(keras.ops.mean(x**2))
            return x

    model = compiled(sequential((6,), BN(), Penalty(), layers.Dense(1)))
    check(model)
    model.train_on_batch(X, X[:, :1])
    assert len(model.losses) == 1


@pytest.mark.skipif(
    not hasattr(layers.Dense, "enable_lora"), reason="this Keras has no LoRA"
)
def test_lora_beside_bn() -> None:
    model = scatter(dense())
    model.layers[3].enable_lora(2)
    check(model)


@pytest.mark.skipif(
    not hasattr(layers.Dense, "quantize"), reason="this Keras has no quantisation"
)
def test_quantised_layers_beside_bn() -> None:
    model = scatter(dense())
    model.layers[3].quantize("int8")
    check(model)


@pytest.mark.skipif(KERAS < (3, 4), reason="its SpectralNormalization cannot be traced")
def test_other_layers_that_have_state_in_training() -> None:
    model = sequential(
        (6,),
        BN(),
        layers.GaussianNoise(0.5, seed=1),
        layers.SpectralNormalization(layers.Dense(4)),
        BN(),
    )
    check(model)
    with unchanged(model, except_for="moving"):
        recalibrate(model, X, dropout=True, verbose=0)


# Afterwards.


def test_the_model_still_trains_saves_and_clones(tmp_path: Path) -> None:
    model = compiled(scatter(dense(2)))
    model.train_on_batch(X, X[:, :1])
    recalibrate(model, X, verbose=0)
    expected, after = model.predict(X, verbose=0), stored(model)

    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(clone.predict(X, verbose=0), expected, rtol=1e-5)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, rtol=1e-5)
    for one, other in zip(after, stored(loaded), strict=True):
        np.testing.assert_array_equal(one, other)

    model.fit(X, X[:, :1], verbose=0)
    assert any(
        not np.array_equal(one, other)
        for one, other in zip(after, stored(model), strict=True)
    )


@pytest.mark.slow
def test_training_after_recalibration_is_training_as_if_without() -> None:
    one, other = compiled(scatter(dense(2))), compiled(scatter(dense(2)))
    other.set_weights(one.get_weights())
    recalibrate(one, X, verbose=0)
    for model in (one, other):
        model.fit(X, X[:, :1], shuffle=False, epochs=2, verbose=0)
    for first, second in zip(
        one.trainable_variables, other.trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_the_model_still_exports(tmp_path: Path) -> None:
    model = scatter(dense(2))
    recalibrate(model, X, verbose=0)
    model.export(str(tmp_path / "saved"))
    saved = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(saved.serve(X), model.predict(X, verbose=0), rtol=1e-5)

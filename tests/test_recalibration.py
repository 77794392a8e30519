"""`recalibrate`, `recalibrated` and `audit`: what they compute, write and leave."""

import re
from collections.abc import Iterator
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
    grouped,
    lag,
    layer_by_layer,
    layers,
    normal,
    residual,
    residual_net,
    scatter,
    seen_in_inference,
    single,
    state,
    stored,
    unchanged,
)

from bn_callbacks import audit, recalibrate, recalibrated
from bn_callbacks.measuring import sample

# One layer: the pooled moments of the data, however they are split.


@pytest.mark.parametrize("batch_size", [2, 4, 8, 16, 32, 64])
def test_one_layer_stores_pooled_moments_however_the_data_are_split(
    batch_size: int,
) -> None:
    x = normal(101, 5)  # never a multiple of the batch size
    model = scatter(single(5))
    report = recalibrate(model, x, batch_size=batch_size, verbose=0)
    ((mean, variance),) = stored(model)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(0), rtol=1e-6)  # biased
    assert (report.samples, report.batches) == (101, -(-101 // batch_size))


def test_a_batch_weighs_by_its_elements_not_as_one() -> None:
    few, many = normal(2, 3, 3, 2), normal(2, 8, 8, 2, mean=-5, seed=1)
    model = keras.Sequential(
        [keras.Input((None, None, 2)), layers.BatchNormalization()]
    )
    recalibrate(model, iter([few, many]), verbose=0)
    ((mean, variance),) = stored(model)
    elements = np.concatenate([few.reshape(-1, 2), many.reshape(-1, 2)])
    np.testing.assert_allclose(mean, elements.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, elements.var(0), rtol=1e-5)


def test_batches_of_one_sample_have_a_variance_between_them() -> None:
    x = normal(40, 3)
    model = single(3)
    recalibrate(model, x, batch_size=1, verbose=0)
    np.testing.assert_allclose(stored(model)[0][1], x.var(0), rtol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (-3e3, 1e-2), (1e-3, 1e3)])
def test_variance_does_not_cancel_however_far_the_mean(mean: float, std: float) -> None:
    x = normal(200, 3, mean=mean, std=std)
    model = single(3)
    recalibrate(model, x, verbose=0)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(stored(model)[0][0], exact.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stored(model)[0][1], exact.var(0), rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1), (150, 1), (50, 0.01)])
def test_images_far_from_0_have_the_right_variance(mean: float, std: float) -> None:
    x = normal(40, 6, 6, 3, mean=mean, std=std)
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.BatchNormalization()])
    recalibrate(model, x, verbose=0)
    ((stored_mean, variance),) = stored(model)
    exact = x.astype(np.float64).reshape(-1, 3)
    sigma = np.sqrt(exact.var(0) + 1e-3)
    np.testing.assert_allclose((stored_mean - exact.mean(0)) / sigma, 0, atol=2e-3)
    np.testing.assert_allclose(np.sqrt(variance + 1e-3) / sigma, 1, atol=1e-3)


# A whole network against float64 NumPy, written down here and not taken from Keras.


def reference(model: keras.Model, x: Any, batch_size: int, by_batch: bool) -> Any:
    """Mean and variance of each BN layer's input in `conv()`, in float64.

    Args:
        model: Where the weights come from.
        x: The data.
        batch_size: How they are cut.
        by_batch: Whether layers normalise with the statistics of each batch, as in
            the first pass, or with those of all the data, as inference does.
    """
    statistics = []

    def weights(layer: Any) -> Any:
        return [np.asarray(weight, np.float64) for weight in layer.get_weights()]

    def convolve(image: Any, layer: Any, stride: int) -> Any:
        kernel, bias = weights(layer)
        size = kernel.shape[0]
        windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), (1, 2))
        patches = windows[:, ::stride, ::stride]
        return np.einsum("nhwcij,ijco->nhwo", patches, kernel) + bias

    def normalise(parts: Any, layer: Any) -> Any:
        def moments(values: Any) -> Any:
            rows = values.reshape(-1, values.shape[-1])
            return rows.mean(0), rows.var(0)

        pooled = moments(np.concatenate(parts))
        statistics.append(pooled)
        gamma = weights(layer)[0] if layer.scale else 1.0
        beta = weights(layer)[int(layer.scale)] if layer.center else 0.0
        result = []
        for part in parts:
            mean, variance = moments(part) if by_batch else pooled
            result.append(
                (part - mean) / np.sqrt(variance + layer.epsilon) * gamma + beta
            )
        return result

    conv_1, bn_1, _, conv_2, bn_2, _, _, dense_1, bn_3 = model.layers
    kernel, bias = weights(dense_1)
    parts = cut(x.astype(np.float64), batch_size)
    parts = normalise([convolve(part, conv_1, 1) for part in parts], bn_1)
    parts = [convolve(np.maximum(part, 0), conv_2, 2) for part in parts]
    parts = [np.tanh(part) for part in normalise(parts, bn_2)]
    parts = [part.reshape(len(part), -1) @ kernel + bias for part in parts]
    normalise(parts, bn_3)
    return statistics


@pytest.fixture
def images() -> Any:
    return normal(50, 6, 6, 3)


@pytest.mark.parametrize(
    ("refine", "by_batch", "within"),
    [(0, True, 1e-5), (3, False, 1e-5), ("auto", False, 5e-3)],
)
def test_a_convolutional_net_gets_what_float64_numpy_computes(
    images: Any, refine: Any, by_batch: bool, within: float
) -> None:
    model = scatter(conv())
    exact = reference(model, images, 16, by_batch)
    recalibrate(model, images, batch_size=16, refine=refine, verbose=0)
    assert_close(model, exact, within)


def test_one_pass_and_refined_statistics_differ_here(images: Any) -> None:
    # Else the test above could not tell them apart.
    model = scatter(conv())
    by_batch, by_population = (
        reference(model, images, 16, is_batch) for is_batch in (True, False)
    )
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(by_batch[2][0], by_population[2][0], rtol=5e-3)


# Refinement.


def test_refine_0_is_one_pass_and_has_no_residual() -> None:
    report = recalibrate(dense(), normal(70, 6), refine=0, verbose=0)
    assert (report.passes, report.residual) == (1, None)
    assert "after" not in str(report)
    assert set(report.residuals) == {None}
    assert len(report.residuals) == len(report.before.layers)


@pytest.mark.parametrize("refine", [1, 2])
def test_a_number_of_passes_is_made_and_one_that_measures_the_rest(refine: int) -> None:
    model, x = scatter(dense(4)), grouped(8, 16, 6)
    report = recalibrate(model, x, batch_size=16, refine=refine, verbose=0)
    assert report.passes == 1 + refine + 1
    assert report.residual == pytest.approx(residual(model, cut(x, 16)), rel=1e-3)
    # Layer k is exact after k passes.
    assert len(report.residuals) == 4
    assert max(report.residuals[: refine + 1]) < 1e-5
    assert max(report.residuals) == report.residual


@pytest.mark.parametrize(
    ("kind", "depth"), [("plain", 1), ("plain", 3), ("plain", 10), ("residual", 10)]
)
def test_the_residual_is_small_and_honest(kind: str, depth: int) -> None:
    net = dense(depth) if kind == "plain" else residual_net(depth)
    model, x = scatter(net), normal(96, 6)
    report = recalibrate(model, x, verbose=0)
    assert report.residual <= 1e-3
    seen = residual(model, cut(x, 32))
    assert seen == pytest.approx(report.residual, rel=0.05, abs=1e-6)
    assert_close(model, layer_by_layer(model, cut(x, 32)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "policy"),
    [("residual", "float32"), ("plain", "float32"), ("plain", "float64")],
)
def test_fifty_layers_are_consistent_as_well(kind: str, policy: str) -> None:
    # In a plain net that deep a wrong statistic overflows before it is corrected.
    with dtype_policy(policy):
        model = scatter(dense(50) if kind == "plain" else residual_net(50))
    x = normal(96, 6)
    report = recalibrate(model, x, verbose=0)
    assert report.residual <= 1e-3
    seen = residual(model, cut(x, 32))
    assert seen == pytest.approx(report.residual, rel=0.05, abs=1e-4)
    if (kind, policy) != ("plain", "float32"):
        # Such a net makes a percent of the rounding of a float32 in its first layer.
        assert_close(model, layer_by_layer(model, cut(x, 32)))


def test_grouped_batches_need_refinement_and_get_it() -> None:
    x = grouped(12, 32, 6)
    one_pass, refined = scatter(dense()), scatter(dense())
    refined.set_weights(one_pass.get_weights())
    recalibrate(one_pass, x, refine=0, verbose=0)
    report = recalibrate(refined, x, verbose=0)
    assert residual(one_pass, cut(x, 32)) > 0.05
    assert residual(refined, cut(x, 32)) <= 1e-3
    assert report.passes == 1  # the sample has all of them


def test_a_single_layer_over_many_batches_needs_one_pass_only() -> None:
    x = normal(320, 4)
    model = single(4)
    report = recalibrate(model, x, batch_size=8, verbose=0)
    assert report.passes == 1
    assert residual(model, cut(x, 8)) == pytest.approx(report.residual, abs=1e-6)


def test_two_recalibrations_are_as_good_as_one() -> None:
    model, x = scatter(dense()), grouped(6, 32, 6)
    recalibrate(model, x, verbose=0)
    once = stored(model)
    report = recalibrate(model, x, verbose=0)
    for one, two in zip(once, stored(model), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    assert report.residual <= 1e-3


def test_data_that_differ_from_pass_to_pass_do_not_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample, "MEMORY", 0)
    draw = np.random.default_rng(0)

    class Random(keras.utils.PyDataset):
        """Augmented data: another draw each time."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return draw.normal(3, 2, (32, 6)).astype("float32")

    report = recalibrate(dense(8), Random(), verbose=0)
    assert report.passes < 8
    assert 1e-3 < report.residual < 0.5  # what a sample of 128 leaves, honestly


# Everything else stays, bit by bit.


class Noisy(keras.layers.Layer):
    """Adds noise from a seed generator, in training and at inference."""

    def __init__(self) -> None:
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x: Any) -> Any:
        return x + 0.01 * keras.random.normal(
            keras.ops.shape(x), seed=self.seed_generator
        )


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    """A small model with dropout, noise, metrics and a used optimizer.

    Shared: each test gives it back as it was.
    """
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=0),
            Noisy(),
            layers.Dense(4),
            layers.BatchNormalization(),
            layers.Dense(1),
        ]
    )
    compiled(model)
    model.train_on_batch(normal(16, 6), normal(16, 1))
    return model


@pytest.mark.parametrize("dropout", [False, True])
def test_nothing_but_the_statistics_changes(trained: Any, dropout: bool) -> None:
    x, y = normal(70, 6), normal(70, 1)
    with unchanged(trained, except_for="moving"):
        report = recalibrate(trained, (x, y), dropout=dropout, verbose=0)
    report.undo()


def test_measuring_the_loss_leaves_metrics_and_optimizer_alone(trained: Any) -> None:
    x = normal(64, 6)
    with recalibrated(trained, x, verbose=0):
        y = np.asarray(trained(x))
    with unchanged(trained, except_for="moving"):
        report = recalibrate(trained, x, validation_data=(x, y), verbose=0)
    report.undo()


def test_undo_gives_every_bit_back(trained: Any) -> None:
    before = state(trained)
    report = recalibrate(trained, normal(70, 6), verbose=0)
    assert state(trained) != before
    report.undo()
    assert state(trained) == before
    report.undo()  # once more does no harm
    assert state(trained) == before


def test_undo_of_infinite_statistics_gives_them_back() -> None:
    model = single(2)
    model.layers[0].moving_variance.assign([np.inf, np.nan])
    before = state(model)
    report = recalibrate(model, normal(40, 2), verbose=0)
    assert np.isfinite(stored(model)).all()
    report.undo()
    assert state(model) == before


def test_recalibrated_is_recalibrated_inside_and_as_before_outside(
    trained: Any,
) -> None:
    x = normal(70, 6)
    report = recalibrate(trained, x, refine=0, verbose=0)
    recalibrated_state = state(trained)
    report.undo()
    before = state(trained)
    with recalibrated(trained, x, refine=0, verbose=0) as report:
        assert state(trained) == recalibrated_state != before
        assert report.committed
    assert state(trained) == before


def test_recalibrated_restores_after_an_exception() -> None:
    model = single(4)
    before = state(model)

    def fail() -> None:
        with recalibrated(model, normal(40, 4), verbose=0):
            model.layers[0].moving_mean.assign([9, 9, 9, 9])
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert state(model) == before


def test_recalibrated_nests() -> None:
    model = single(4)
    states = [state(model)]
    with recalibrated(model, normal(40, 4), verbose=0):
        states.append(state(model))
        with recalibrated(model, normal(40, 4, mean=-7), verbose=0):
            states.append(state(model))
        assert state(model) == states[1]
    assert state(model) == states[0]
    assert states[0] != states[1] != states[2]


def test_recalibrated_on_bad_data_leaves_the_model() -> None:
    model = single(4)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="empty"),
        recalibrated(model, normal(0, 4), verbose=0),
    ):
        pytest.fail("not reached")


# Audit.


def test_an_audit_changes_nothing(trained: Any) -> None:
    with unchanged(trained):
        audit(trained, (normal(70, 6), normal(70, 1)))
        audit(trained, normal(70, 6), batch_size=8, steps=2)
        audit(trained)


def test_an_audit_measures_lag_against_batches() -> None:
    model, x = scatter(single(4)), normal(60, 4)
    report = audit(model, x)
    (layer,) = report.layers
    ((mean, variance),) = stored(model)
    (bn,) = batch_norms(model)
    assert layer.lag == pytest.approx(lag(bn, x, mean, variance), rel=1e-5)
    assert layer.path.endswith(bn.name)


def test_an_audit_measures_both_losses_where_targets_come_with_the_data(
    trained: Any,
) -> None:
    x, y = normal(64, 6), normal(64, 1)
    report = audit(trained, (x, y))
    expected = np.mean((np.asarray(trained(x)) - y) ** 2)
    # The model's own noise is 0.01.
    assert report.loss_inference == pytest.approx(expected, rel=0.02)
    assert report.loss_batch != report.loss_inference
    assert audit(trained, x).loss_gap is None


def test_an_audit_of_frozen_layers_sees_inference() -> None:
    model, x = scatter(dense(2)), normal(64, 6)
    model.trainable = False
    report = audit(model, x)
    expected = [
        lag(bn, seen, *statistics)
        for bn, seen, statistics in zip(
            batch_norms(model),
            seen_in_inference(model, cut(x, 32)),
            stored(model),
            strict=True,
        )
    ]
    assert [layer.lag for layer in report.layers] == pytest.approx(expected, rel=1e-4)


def test_an_audit_without_data_or_layers_is_quiet() -> None:
    assert [layer.lag for layer in audit(dense(2)).layers] == [None, None]
    plain = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    assert audit(plain, normal(8, 3)).layers == ()


def test_an_audit_of_statistics_that_overflow_is_a_finding_not_an_error() -> None:
    model = dense(2)
    batch_norms(model)[0].moving_mean.assign(np.full(8, np.nan))
    assert audit(model, normal(64, 6)).worst.cause == "non_finite"
    batch_norms(model)[0].moving_mean.assign(np.full(8, 3e38))
    with np.errstate(all="ignore"):
        report = audit(model, normal(64, 6))
    assert report.max_lag > 1


# What goes in.

X = normal(40, 6)
MEAN = X.mean(0)


class Rows(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return X[8 * index : 8 * index + 8], X[:8, :1]


def batches() -> Iterator[Any]:
    for index in range(5):
        yield Rows()[index]


def repeated() -> Iterator[Any]:
    while True:
        yield from batches()


def dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, X[:, :1])).batch(8)


@pytest.mark.parametrize(
    ("x", "steps"),
    [
        (X, None),
        ((X, X[:, :1]), None),
        ((X, X[:, :1], X[:, 0]), None),
        (tf.constant(X), None),
        (X.astype("float64"), None),
        (dataset(), None),
        (dataset().repeat(), 5),
        (dataset().filter(lambda x, y: True), None),
        (dataset().map(lambda x, y: (x, y, y[:, 0])), None),
        (Rows(), None),
        (batches, None),
        (repeated, 5),
    ],
    ids=[
        "array",
        "x, y",
        "x, y, sample weights",
        "tensor",
        "float64",
        "dataset",
        "infinite dataset",
        "dataset of unknown length",
        "dataset with weights",
        "PyDataset",
        "generator",
        "infinite generator",
    ],
)
def test_every_kind_of_data_gives_the_same(x: Any, steps: int | None) -> None:
    model = single(6)
    report = recalibrate(model, x() if callable(x) else x, steps=steps, verbose=0)
    np.testing.assert_allclose(stored(model)[0][0], MEAN, rtol=1e-5)
    assert report.samples == 40


def test_sample_weights_do_not_enter_the_statistics() -> None:
    model = single(6)
    recalibrate(model, (X, X[:, :1], np.arange(40.0)), verbose=0)
    np.testing.assert_allclose(stored(model)[0][0], MEAN, rtol=1e-5)


@pytest.fixture(scope="module")
def two_inputs() -> keras.Model:
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    joined = layers.Concatenate()([layers.BatchNormalization()(a), layers.Dense(4)(b)])
    outputs = [layers.Dense(1)(joined), layers.Dense(2)(joined)]
    return keras.Model([a, b], outputs)


B, Y = normal(40, 4), normal(40, 1)


@pytest.mark.parametrize(
    "x",
    [
        [X, B],
        (X, B),
        {"a": X, "b": B},
        ([X, B], [Y, B[:, :2]]),
        ((X, B), Y),
        ({"a": X, "b": B}, Y),
        ([X, B], Y, Y),
        tf.data.Dataset.from_tensor_slices(({"a": X, "b": B}, Y)).batch(32),
        tf.data.Dataset.from_tensor_slices(((X, B), Y)).batch(32),
        tf.data.Dataset.from_tensor_slices({"a": X, "b": B}).batch(32),
    ],
    ids=[
        "list",
        "tuple",
        "dict",
        "list and targets",
        "tuple and targets",
        "dict and targets",
        "list, targets and weights",
        "dataset of dicts and targets",
        "dataset of tuples and targets",
        "dataset of dicts",
    ],
)
def test_several_inputs_come_in_any_structure(two_inputs: Any, x: Any) -> None:
    scatter(two_inputs)
    recalibrate(two_inputs, x, verbose=0)
    np.testing.assert_allclose(stored(two_inputs)[0][0], MEAN, rtol=1e-5)


# How often the model is traced.


class Traced(keras.layers.Layer):
    """Counts the calls of Python, which in a graph happen once a trace."""

    count = 0

    def call(self, x: Any) -> Any:
        type(self).count += 1
        return x


def traces(x: Any, **arguments: Any) -> int:
    model = keras.Sequential(
        [keras.Input((6,)), Traced(), layers.BatchNormalization(), layers.Dense(2)]
    )
    Traced.count = 0
    recalibrate(model, x, verbose=0, **arguments)
    return Traced.count


def test_each_mode_is_traced_once_also_with_a_short_last_batch() -> None:
    # Once to see what training would do, once for all modes.
    assert traces(normal(64, 6), refine=0) == 2
    assert traces(normal(70, 6)) == 2
    assert traces(normal(70, 6), refine=2) == 2
    sizes = [normal(size, 6) for size in (7, 32, 1, 20)]
    assert traces(iter(sizes), refine=2) == 2


# Dropout.


def test_dropout_is_off_unless_asked_for() -> None:
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dropout(0.5), layers.BatchNormalization()]
    )
    x = np.ones((3200, 4), "float32")
    recalibrate(model, x, verbose=0)
    np.testing.assert_allclose(stored(model)[0], [np.ones(4), np.zeros(4)], atol=1e-7)
    report = recalibrate(model, x, dropout=True, verbose=0)
    # Elements are 0 or 2 with equal odds: variance 1, and a mean whose standard
    # error is 1/√3200 if each batch is drawn afresh, 1/√32 if all are alike.
    np.testing.assert_allclose(stored(model)[0][0], 1, atol=5 / np.sqrt(3200))
    np.testing.assert_allclose(stored(model)[0][1], 1, atol=5 / np.sqrt(3200))
    assert report.residual <= 1e-3


def test_dropout_draws_the_same_in_each_pass_so_that_refining_converges() -> None:
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(8),
            layers.BatchNormalization(),
        ]
    )
    report = recalibrate(model, normal(96, 6), dropout=True, verbose=0)
    assert report.residual <= 1e-3


def test_with_dropout_other_bn_layers_still_use_what_they_store() -> None:
    model = scatter(dense(2))
    _, second = batch_norms(model)
    x = normal(64, 6)
    recalibrate(model, x, layers=[second.name], dropout=True, verbose=0)
    seen = seen_in_inference(model, cut(x, 32))[1]
    assert lag(second, seen, *stored(model)[1]) <= 1e-3


# Do no harm.


def with_losses() -> keras.Model:
    """A model whose loss has every kind of part."""

    class Penalty(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
            return x

    inputs = keras.Input((6,))
    x = layers.Dense(4, kernel_regularizer="l2", activity_regularizer="l1")(inputs)
    x = Penalty()(layers.BatchNormalization()(x))
    x = layers.Dropout(0.5)(x)
    return compiled(keras.Model(inputs, layers.Dense(1)(x)))


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_those_of_evaluate(weighted: bool) -> None:
    model = with_losses()
    # Keras 3.0 lets a short last batch weigh like a full one.
    size = 70 if KERAS >= (3, 4) else 64
    x, y = normal(size, 6), normal(size, 1)
    data: Any = (x, y, np.linspace(0, 2, size)) if weighted else (x, y)

    def evaluate() -> float:
        weights = data[2] if weighted else None
        results = model.evaluate(
            x, y, sample_weight=weights, verbose=0, return_dict=True
        )
        return float(results["loss"])

    before = evaluate()
    with recalibrated(model, x, verbose=0):
        after = evaluate()
    report = recalibrate(model, x, validation_data=data, verbose=0)
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert report.loss_after == pytest.approx(after, rel=1e-5)


@pytest.mark.skipif(KERAS < (3, 4), reason="this Keras never says `training`")
def test_a_custom_compute_loss_is_asked_as_evaluate_asks_it() -> None:
    class Model(keras.Model):
        def compute_loss(
            self,
            x: Any = None,
            y: Any = None,
            y_pred: Any = None,
            sample_weight: Any = None,
            training: bool = True,
        ) -> Any:
            return keras.ops.mean(keras.ops.abs(y - y_pred)) + (100.0 * training)

    inputs = keras.Input((6,))
    outputs = layers.Dense(1)(layers.BatchNormalization()(inputs))
    model = Model(inputs, outputs)
    model.compile("sgd")
    x, y = normal(64, 6), normal(64, 1)
    report = recalibrate(model, x, validation_data=(x, y), verbose=0)
    expected = np.mean(np.abs(model.predict(x, verbose=0) - y))
    assert report.loss_after == pytest.approx(expected, rel=1e-5)


def test_better_statistics_are_kept_and_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = compiled(dense(1))
    x = normal(96, 6)
    # The targets are what the model puts out with the right statistics.
    with recalibrated(model, x, verbose=0):
        y = model.predict(x, verbose=0)
    report = recalibrate(model, x, validation_data=(x, y), verbose=1)
    assert report.committed
    assert report.loss_after < 1e-6 < report.loss_before
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Recalibrated 1 BatchNormalization layer over 96 samples")
    losses = f"{report.loss_before:.4g} -> {report.loss_after:.4g}"
    assert f"validation loss {losses}" in last


def test_worse_statistics_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    model = compiled(dense(1))
    x = normal(96, 6)
    y = model.predict(x, verbose=0)  # right as it is
    with unchanged(model):
        report = recalibrate(model, x, validation_data=(x, y), verbose=1)
    assert not report.committed
    assert report.loss_before < 1e-6 < report.loss_after
    assert capsys.readouterr().out.splitlines()[-1].startswith("Kept the old stat")
    report.undo()


def test_statistics_that_break_the_loss_are_not_written() -> None:
    inputs = keras.Input((2,))
    outputs = layers.BatchNormalization()(inputs)
    outputs = layers.Activation(lambda x: keras.ops.log(x + 9))(outputs)
    model = compiled(keras.Model(inputs, outputs))
    constant, x = np.ones((64, 2), "float32"), normal(64, 2, mean=0)
    # Divided by √ε, validation data reach below -9, where there is no logarithm.
    with unchanged(model):
        report = recalibrate(model, constant, validation_data=(x, x), verbose=0)
    assert not report.committed
    assert np.isfinite(report.loss_before)
    assert np.isnan(report.loss_after)


def test_statistics_that_heal_the_loss_are_written() -> None:
    model = compiled(dense(1))
    batch_norms(model)[0].moving_variance.assign(np.full(8, np.nan))
    x, y = normal(64, 6), normal(64, 1)
    report = recalibrate(model, x, validation_data=(x, y), verbose=0)
    assert report.committed
    assert np.isnan(report.loss_before)
    assert np.isfinite(report.loss_after)


@pytest.mark.parametrize("compiles", [False, True])
def test_validation_without_loss_or_targets_is_an_error(compiles: bool) -> None:
    model, x = dense(1), normal(64, 6)
    data: Any = (x, normal(64, 1))
    if compiles:
        compiled(model)
        data = x
    message = (
        r"^Measuring a loss needs data with targets and a compiled model\. Received: "
        rf"compiled={compiles}, targets={not compiles}\. Pass \(x, y\), and compile"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, x, validation_data=data, verbose=0)


# What is printed and reported.


def test_verbose_0_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    recalibrate(dense(1), normal(64, 6), verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("verbose", [1, "auto"])
def test_verbose_shows_progress_and_the_result(
    verbose: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = recalibrate(dense(2), normal(70, 6), verbose=verbose)
    out = capsys.readouterr().out
    assert "3/3" in out
    assert out.splitlines()[-1] == str(report)
    assert re.search(
        r"^Recalibrated 2 BatchNormalization layers over 70 samples \(3 batches, "
        r"1 pass\): lag [\d.]+ before, .* after\.$",
        str(report),
    )


def test_progress_over_data_of_unknown_length(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recalibrate(single(6), batches(), verbose=1, refine=0)
    assert re.search("5/(5|Unknown)", capsys.readouterr().out)


def test_the_report_holds_the_layers_as_they_were() -> None:
    model, x = scatter(single(4)), normal(60, 4)
    ((mean, variance),) = stored(model)
    report = recalibrate(model, x, verbose=0)
    (bn,) = batch_norms(model)
    expected = lag(bn, x, mean, variance)
    assert report.before.max_lag == pytest.approx(expected, rel=1e-5)
    assert (report.unreached, report.skipped, report.committed) == ((), (), True)
    assert (report.loss_before, report.loss_after) == (None, None)

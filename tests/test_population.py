"""One pass over data: exact moments, in every kernel, with one trace a mode."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import (
    batch_norms,
    compiled,
    cut,
    dense,
    layers,
    normal,
    rows,
    scatter,
    seen_in_inference,
    single,
    unchanged,
)

import bn_callbacks.measuring.one_pass
from bn_callbacks.layers import find, read
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.statistics.moments import Moments, Statistics


def measured(
    model: keras.Model, x: Any, *, batch_size: int = 16, **arguments: Any
) -> list[Moments]:
    population = Population(model, find(model), **arguments)
    return population.measure(Batches(x, batch_size=batch_size)).moments


def assert_moments(moments: Moments, values: Any, within: float = 1e-6) -> None:
    """Asserts that these are the moments of the rows, to a part of each σ."""
    exact = np.asarray(values, np.float64)
    sigma = exact.std(0)
    assert (moments.count == len(exact)).all()
    np.testing.assert_allclose((moments.mean - exact.mean(0)) / sigma, 0, atol=within)
    np.testing.assert_allclose(np.sqrt(moments.variance) / sigma, 1, atol=within)


SHAPES = {
    "dense": (5,),
    "sequence": (4, 5),
    "image": (3, 4, 5),
    "volume": (2, 3, 2, 5),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_moments_of_the_data(shape: tuple[int, ...], batch_size: int) -> None:
    x = normal(50, *shape)
    model = keras.Sequential([keras.Input(shape), layers.BatchNormalization()])
    (moments,) = measured(model, x, batch_size=batch_size)
    assert_moments(moments, x.reshape(-1, 5), within=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_a_mean_far_from_0_costs_no_digits(shape: tuple[int, ...], mean: float) -> None:
    x = normal(64, *shape, mean=mean, std=1)
    model = keras.Sequential([keras.Input(shape), layers.BatchNormalization()])
    (moments,) = measured(model, x)
    assert_moments(moments, x.reshape(-1, 5), within=1e-5)


def test_what_is_near_0_is_not_read_twice_and_what_is_far_is() -> None:
    class Counted(keras.utils.PyDataset):
        def __init__(self, x: Any) -> None:
            super().__init__()
            self.x, self.reads = x, 0

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            return self.x[16 * index :][:16]

    model = keras.Sequential([keras.Input((3, 4, 5)), layers.BatchNormalization()])
    limit = bn_callbacks.measuring.one_pass.FAST_LIMIT
    for mean, reads in ((limit / 10, 4), (limit * 10, 8)):
        data = Counted(normal(64, 3, 4, 5, mean=mean, std=1))
        Population(model, find(model)).measure(Batches(data))
        assert data.reads == reads


@pytest.mark.parametrize(
    "kind", ["plain", "far", "epsilon", "axis", "float64", "subclass"]
)
def test_fused_and_other_kernels_agree_on_outputs_too(kind: str) -> None:
    class Own(layers.BatchNormalization):
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            return super().call(inputs, training=training, mask=mask)

    arguments: dict[str, Any] = {
        "epsilon": {"epsilon": 1e-6},
        "axis": {"axis": 1},
        "float64": {"dtype": "float64"},
    }.get(kind, {})
    bn = Own if kind == "subclass" else layers.BatchNormalization
    model = scatter(
        keras.Sequential(
            [
                keras.Input((5, 4, 5)),
                bn(**arguments),
                layers.Activation("tanh"),
                layers.BatchNormalization(),
            ]
        )
    )
    mean, std = {"far": (1e4, 2.0), "epsilon": (0.0, 1e-3)}.get(kind, (3.0, 2.0))
    x = normal(40, 5, 4, 5, mean=mean, std=std)
    first, second = batch_norms(model)
    axis = 1 if kind == "axis" else -1
    expected = []
    for part in cut(np.moveaxis(x, axis, -1).astype(np.float64), 16):
        part_rows = part.reshape(-1, 5)
        mean, variance = part_rows.mean(0), part_rows.var(0)
        z = (part_rows - mean) / np.sqrt(variance + first.epsilon)
        gamma, beta = (np.asarray(v, np.float64) for v in (first.gamma, first.beta))
        z = np.tanh(z * gamma + beta)
        expected.append(z.reshape(part.shape))
    expected_rows = rows(second, np.moveaxis(np.concatenate(expected), -1, axis))
    moments = measured(model, x)
    assert_moments(moments[1], expected_rows, within=1e-3 if kind == "far" else 1e-5)


def test_given_statistics_are_those_of_inference() -> None:
    model, x = scatter(dense(3)), normal(50, 6)
    given = find(model)
    population = Population(model, given)
    result = population.measure(Batches(x, batch_size=16), read(given))
    for moments, seen in zip(
        result.moments, seen_in_inference(model, cut(x, 16)), strict=True
    ):
        assert_moments(moments, seen, within=1e-5)
    assert (result.batches, result.samples, result.loss) == (4, 50, None)


def test_given_statistics_need_not_be_those_stored() -> None:
    model, x = scatter(dense(2)), normal(50, 6)
    given = find(model)
    other = [Statistics(s.mean + 1, 2 * s.variance) for s in read(given)]
    with unchanged(model):
        result = Population(model, given).measure(Batches(x, batch_size=16), other)
    for bn, values in zip(batch_norms(model), other, strict=True):
        bn.moving_mean.assign(values.mean)
        bn.moving_variance.assign(values.variance)
    for moments, seen in zip(
        result.moments, seen_in_inference(model, cut(x, 16)), strict=True
    ):
        assert_moments(moments, seen, within=1e-5)


def test_other_layers_use_what_they_store() -> None:
    model, x = scatter(dense(2)), normal(50, 6)
    _, last = find(model)
    for dropout in (False, True):
        population = Population(model, [last], dropout=dropout)
        (moments,) = population.measure(Batches(x, batch_size=16)).moments
        seen = seen_in_inference(model, cut(x, 16))[1]
        assert_moments(moments, seen, within=1e-5)


def test_masked_values_do_not_count() -> None:
    x = normal(48, 5, 4)
    x[:, 3:], x[16:32] = 0, 0
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, layers.BatchNormalization()(layers.Masking()(inputs)))
    (moments,) = measured(model, x)
    assert_moments(moments, x[np.any(x != 0, axis=-1)])


def test_a_layer_that_is_not_reached_has_counted_nothing() -> None:
    model = keras.Sequential(
        [keras.Input((5, 4)), layers.Masking(), layers.BatchNormalization()]
    )
    (moments,) = measured(model, np.zeros((32, 5, 4), "float32"))
    assert moments.is_empty


def test_overflow_under_given_statistics_is_told_from_bad_data() -> None:
    model, x = dense(3), normal(50, 6)
    given = find(model)
    population = Population(model, given)
    tiny = [Statistics(s.mean, 0 * s.variance - 0.00099999) for s in read(given)]
    huge = [Statistics(s.mean, s.variance) for s in tiny]
    huge[0] = Statistics(np.full(8, -3e38), huge[0].variance)
    with np.errstate(all="ignore"):
        result = population.measure(Batches(x), huge)
    assert np.isfinite(result.moments[0].variance).all()
    assert not np.isfinite(result.moments[1].variance).all()
    x[3] = np.nan
    with pytest.raises(ValueError, match="batch 0 of the data"):
        population.measure(Batches(x), huge)


# Loss.


def test_the_loss_is_the_mean_over_samples_in_both_modes() -> None:
    model = compiled(scatter(dense(1)))
    x, y = normal(64, 6), normal(64, 1)
    population = Population(model, find(model), loss=True)
    batches = Batches((x, y), batch_size=16)
    inference = population.measure(batches, read(population.layers)).loss
    expected = np.mean((model.predict(x, verbose=0) - y) ** 2)
    assert inference == pytest.approx(expected, rel=1e-5)
    with_batch_statistics = [
        np.mean((np.asarray(model(a, training=True)) - b) ** 2)
        for a, b in zip(cut(x, 16), cut(y, 16), strict=True)
    ]
    by_batch = population.measure(batches).loss
    assert by_batch == pytest.approx(np.mean(with_batch_statistics), rel=1e-5)


def test_a_short_last_batch_weighs_as_many_samples_as_it_has() -> None:
    model = compiled(single(4))
    x, y = normal(50, 4), normal(50, 4, seed=1)
    population = Population(model, find(model), loss=True)
    loss = population.measure(Batches((x, y)), read(population.layers)).loss
    expected = np.mean((model.predict(x, verbose=0) - y) ** 2)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_without_targets_there_is_no_loss() -> None:
    model = compiled(single(4))
    population = Population(model, find(model), loss=True)
    assert population.measure(Batches(normal(8, 4))).loss is None


# Traces.


class Traced(keras.layers.Layer):
    """Counts the calls of Python, which in a graph happen once a trace."""

    count = 0

    def call(self, x: Any) -> Any:
        type(self).count += 1
        return x


def in_loop() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((None, 6)),
            Traced(),
            layers.TimeDistributed(layers.BatchNormalization()),
        ]
    )


def outside() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), Traced(), layers.BatchNormalization()])


def image() -> keras.Model:
    return keras.Sequential(
        [keras.Input((3, 3, 6)), Traced(), layers.BatchNormalization()]
    )


@pytest.mark.parametrize(
    ("build", "shape"), [(outside, (6,)), (image, (3, 3, 6)), (in_loop, (4, 6))]
)
def test_all_modes_share_one_trace_for_all_batch_sizes(
    build: Callable[[], keras.Model], shape: tuple[int, ...]
) -> None:
    model = build()
    population = Population(model, find(model))
    statistics = read(population.layers)
    Traced.count = 0
    for _ in range(2):
        for size in (7, 32, 64):
            population.measure(Batches(normal(33, *shape), batch_size=size))
            population.measure(Batches(normal(33, *shape), batch_size=size), statistics)
    assert Traced.count == 1


def test_nothing_behind_the_last_layer_is_computed() -> None:
    computed = []

    def costly(x: Any) -> Any:
        def note(values: Any) -> Any:
            computed.append(len(values))
            return values

        result = tf.numpy_function(note, [x], tf.float32, stateful=False)
        result.set_shape(x.shape)
        return result

    class Costly(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return costly(x)

    model = keras.Sequential(
        [keras.Input((6,)), Costly(), layers.BatchNormalization(), Costly()]
    )
    computed.clear()
    measured(model, normal(32, 6), batch_size=16)
    assert computed == [16, 16]


def test_dropout_draws_anew_for_each_batch_and_the_same_in_each_pass() -> None:
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dropout(0.5), layers.BatchNormalization()]
    )
    x = np.ones((64, 4), "float32")
    population = Population(model, find(model), dropout=True)
    means = []
    for _ in range(2):
        for part in ([x[:32]], [x[:32], x[:32]]):
            (moments,) = population.measure(Batches(iter(part))).moments
            means.append(moments.mean)
    np.testing.assert_array_equal(means[:2], means[2:])
    assert np.any(means[0] != means[1])


def test_the_library_leaves_no_trace_in_the_model() -> None:
    model = scatter(dense(2))
    with unchanged(model):
        measured(model, normal(64, 6))
        measured(model, normal(64, 6), dropout=True)


def test_an_exception_in_the_middle_leaves_nothing_for_the_next_pass() -> None:
    def failing() -> Iterator[Any]:
        yield normal(16, 4, 6)
        yield normal(16, 4, 6)
        raise KeyboardInterrupt

    for build, shape in ((in_loop, (4, 6)), (outside, (6,))):
        model = build()
        population = Population(model, find(model))
        x = normal(33, *shape)
        bad = failing() if build is in_loop else (part[:, 0] for part in failing())
        with pytest.raises(KeyboardInterrupt):
            population.measure(Batches(bad))
        (moments,) = population.measure(Batches(x)).moments
        assert_moments(moments, x.reshape(-1, 6), within=1e-5)


def test_a_subset_of_layers_is_measured_in_its_own_order() -> None:
    model, x = scatter(dense(3)), normal(40, 6)
    first, _, last = find(model)
    given = [last, first]
    result = Population(model, given).measure(Batches(x), read(given))
    seen = seen_in_inference(model, [x])
    assert_moments(result.moments[0], seen[2], within=1e-5)
    assert_moments(result.moments[1], seen[0], within=1e-5)


def test_the_entry_is_the_layer_that_no_statistics_reach() -> None:
    model = dense(2)
    population = Population(model, find(model))
    population.measure(Batches(normal(32, 6)))
    assert population.entry is population.layers[0]
    shared = layers.BatchNormalization()
    inputs = keras.Input((6,))
    twice = keras.Model(inputs, shared(layers.ReLU()(shared(inputs))))
    population = Population(twice, find(twice))
    population.measure(Batches(normal(32, 6)))
    assert population.entry is None

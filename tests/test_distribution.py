"""tf.distribute on one machine: the result of a single device, on every replica."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from cluster import mirrored
from models import (
    KERAS,
    batch_norms,
    compiled,
    conv,
    dense,
    layers,
    normal,
    scatter,
    single,
    stored,
)

import bn_callbacks as bn

STRATEGIES: dict[str, Callable[[], tf.distribute.Strategy]] = {
    "mirrored 2": lambda: mirrored(2),
    "mirrored 4": lambda: mirrored(4),
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:1"),
    "multi-worker, alone": tf.distribute.MultiWorkerMirroredStrategy,
}


QUICK = "mirrored 2"


@pytest.fixture(
    params=[
        name if name == QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in STRATEGIES
    ]
)
def strategy(request: pytest.FixtureRequest) -> tf.distribute.Strategy:
    return STRATEGIES[request.param]()


def twin(
    strategy: tf.distribute.Strategy, build: Callable[[], keras.Model], **arguments: Any
) -> tuple[keras.Model, keras.Model]:
    """The same model without and with a strategy."""
    reference = compiled(scatter(build()), **arguments)
    with strategy.scope():
        model = compiled(build(), **arguments)
    model.set_weights(reference.get_weights())
    return model, reference


def copies(model: keras.Model) -> list[list[bytes]]:
    """Each copy of each statistic, bit by bit."""
    return [
        [copy.numpy().tobytes() for copy in getattr(v.value, "values", (v.value,))]
        for layer in batch_norms(model)
        for v in (layer.moving_mean, layer.moving_variance)
    ]


def assert_same(model: keras.Model, reference: keras.Model) -> None:
    for ours, theirs in zip(stored(model), stored(reference), strict=True):
        sigma = np.sqrt(theirs[1] + 1e-3)
        np.testing.assert_allclose(ours[0] / sigma, theirs[0] / sigma, atol=1e-6)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)
    for parts in copies(model):
        assert len(set(parts)) == 1


def in_loop() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3, 6)),
            layers.TimeDistributed(layers.BatchNormalization()),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )


MODELS: dict[str, tuple[Callable[[], keras.Model], tuple[int, ...]]] = {
    "dense": (lambda: dense(3), (6,)),
    "conv": (conv, (6, 6, 3)),
    "in a loop": (in_loop, (3, 6)),
}


@pytest.mark.parametrize(
    ("name", "refine"), [*dict.fromkeys(MODELS, "auto").items(), ("dense", 0)]
)
def test_the_result_is_that_of_a_single_device(
    strategy: tf.distribute.Strategy, name: str, refine: Any
) -> None:
    build, shape = MODELS[name]
    # 70 samples in batches of 16: five batches, which two and four do not divide, and
    # the last is a smaller one.
    x = normal(70, *shape)
    model, reference = twin(strategy, build)
    ours = bn.recalibrate(model, x, batch_size=16, refine=refine, verbose=0)
    theirs = bn.recalibrate(reference, x, batch_size=16, refine=refine, verbose=0)
    assert_same(model, reference)
    assert (ours.samples, ours.batches, ours.passes) == (70, 5, theirs.passes)
    assert ours.residual == pytest.approx(theirs.residual, abs=1e-6)


@pytest.mark.slow
def test_fewer_batches_than_replicas() -> None:
    model, reference = twin(mirrored(4), lambda: dense(2))
    for x in (normal(3, 6), normal(40, 6)):
        bn.recalibrate(model, x, verbose=0)
        bn.recalibrate(reference, x, verbose=0)
        assert_same(model, reference)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"tolerance": 0.2}, {"dropout": True}])
def test_every_option_gives_what_a_single_device_gives(
    arguments: dict[str, Any],
) -> None:
    def build() -> keras.Model:
        model = dense(2)
        return keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, seed=7), model])

    model, reference = twin(mirrored(2), build)
    x = normal(1600, 6)
    ours = bn.recalibrate(model, x, verbose=0, **arguments)
    theirs = bn.recalibrate(reference, x, verbose=0, **arguments)
    assert_same(model, reference)
    assert ours.batches == theirs.batches
    assert (ours.batches < 50) == ("tolerance" in arguments)


def test_synchronized_layers_and_generators() -> None:
    model, reference = twin(
        mirrored(2), lambda: single(6, momentum=0.9, synchronized=True)
    )
    x = normal(50, 6)
    bn.recalibrate(model, (x[i : i + 10] for i in range(0, 50, 10)), verbose=0)
    bn.recalibrate(reference, x, batch_size=10, verbose=0)
    assert_same(model, reference)


@pytest.mark.slow
def test_a_distributed_dataset_is_read_as_it_is_divided() -> None:
    strategy = mirrored(4)
    model, reference = twin(strategy, lambda: single(6))
    x = normal(50, 6)
    # 16 samples in four parts; of the last two samples two replicas get none.
    dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(16)
    distributed = strategy.experimental_distribute_dataset(dataset)
    for _ in range(2):
        report = bn.recalibrate(model, distributed, verbose=0)
        assert (report.samples, report.batches) == (50, 14)
    bn.recalibrate(reference, x, verbose=0)
    assert_same(model, reference)


@pytest.mark.slow
def test_inside_the_scope_as_outside() -> None:
    strategy = mirrored(2)
    for build, x in ((lambda: dense(2), normal(50, 6)), (in_loop, normal(50, 3, 6))):
        model, reference = twin(strategy, build)
        with strategy.scope():
            bn.recalibrate(model, x, verbose=0)
            lag = bn.audit(model, x).max_lag
        bn.recalibrate(reference, x, verbose=0)
        assert_same(model, reference)
        assert lag == pytest.approx(bn.audit(reference, x).max_lag, rel=1e-4)


def test_losses_are_those_of_a_single_device(strategy: tf.distribute.Strategy) -> None:
    model, reference = twin(strategy, lambda: dense(2))
    data = (normal(50, 6), normal(50, 1))
    ours, theirs = bn.audit(model, data), bn.audit(reference, data)
    assert ours.loss_batch == pytest.approx(theirs.loss_batch, rel=1e-6)
    assert ours.loss_inference == pytest.approx(theirs.loss_inference, rel=1e-6)
    for mine, their in zip(ours.layers, theirs.layers, strict=True):
        assert mine.lag == pytest.approx(their.lag, rel=1e-6)
    report = bn.recalibrate(model, data, validation_data=data, verbose=0)
    assert report.loss_before == pytest.approx(theirs.loss_inference, rel=1e-6)


def by_replica(batches: int = 25, size: int = 16) -> tuple[Any, Any]:
    """In each batch the second half, a second replica's share, is of other data."""
    x = normal(batches * size, 6, mean=0.0, std=1.0)
    x[np.arange(len(x)) % size >= size // 2] += 5
    return x, x.sum(axis=1, keepdims=True)


def fitted(synchronized: bool, **arguments: Any) -> tuple[keras.Model, Any]:
    data = by_replica()
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(16)
    with mirrored(2).scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.BatchNormalization(momentum=0.8, synchronized=synchronized),
                layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    history = model.fit(dataset, epochs=2, verbose=0, **arguments)
    return model, history


def test_replicas_that_see_different_data_are_told() -> None:
    monitor = bn.BatchNormMonitor()
    with pytest.warns(bn.BatchNormLagWarning, match="replicas_differ.*synchronized"):
        model, _ = fitted(False, callbacks=[monitor])
    assert monitor.report.worst.cause == "replicas_differ"
    assert monitor.report.worst.disagreement > 0.5
    # The lag is that of what would be saved, behind the batches of all replicas.
    first = batch_norms(model)[0]
    x, _ = by_replica()
    sigma = np.sqrt(np.array(first.moving_variance.value) + first.epsilon)
    shift = np.sqrt(np.mean(((x.mean(0) - np.array(first.moving_mean)) / sigma) ** 2))
    assert monitor.report.worst.mean_shift == pytest.approx(shift, rel=0.1)
    for report in (bn.audit(model), bn.audit(model, x)):
        assert report.worst.cause == "replicas_differ"
    bn.recalibrate(model, x, verbose=0)
    assert bn.audit(model, x).worst.cause == "healthy"


@pytest.mark.slow
def test_synchronized_layers_do_not_differ() -> None:
    monitor = bn.BatchNormMonitor(on_lag="raise")
    model, _ = fitted(True, callbacks=[monitor])
    assert monitor.report.worst.disagreement == 0.0
    assert bn.audit(model).worst.cause == "unknown"  # without data, nothing is measured


@pytest.mark.slow
def test_random_shares_are_no_finding() -> None:
    with mirrored(2).scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.BatchNormalization(momentum=0.95),
                layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    monitor = bn.BatchNormMonitor(on_lag="raise")
    x = normal(2000, 6)
    model.fit(x, x[:, :1], batch_size=16, epochs=1, verbose=0, callbacks=[monitor])
    assert monitor.report.worst.cause == "healthy"


@pytest.mark.slow
@pytest.mark.skipif(KERAS < (3, 3), reason="Keras counts batches, not examples")
def test_the_batch_size_is_that_of_a_replica() -> None:
    monitor = bn.BatchNormMonitor(on_lag="ignore")
    fitted(False, callbacks=[monitor])
    assert monitor._watch._batch_size.batch_size == 8
    assert monitor._watch._batch_size.batch_size_of(bn_of(True)) == 16


def bn_of(synchronized: bool) -> Any:
    from bn_callbacks.layers import find

    return find(single(synchronized=synchronized))[0]


@pytest.mark.slow
def test_the_callbacks_write_every_copy_and_put_every_copy_back() -> None:
    x, y = by_replica()
    during: list[list[list[bytes]]] = []

    class Watch(keras.callbacks.Callback):
        def on_test_begin(self, logs: Any = None) -> None:
            during.append(copies(self.model))

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            during.append(copies(self.model))

    recalibrate = bn.RecalibrateBatchNorm(x, when="validation")
    model, _ = fitted(
        False, callbacks=[recalibrate, Watch()], validation_data=(x[:32], y[:32])
    )
    start, validated, resumed, *_ = during
    assert len(set(start[0])) == 1
    assert len(set(validated[0])) == 1
    assert len(set(resumed[0])) == 2
    assert all(len(set(parts)) == 1 for parts in copies(model))


def test_what_ends_a_validation_leaves_every_copy_as_it_was() -> None:
    x, _ = by_replica()
    during: list[list[list[bytes]]] = []

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            during.append(copies(self.model))

        def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
            during.append(copies(self.model))
            raise KeyboardInterrupt

    with mirrored(2).scope():
        model = compiled(scatter(single(6)))
    recalibrate = bn.RecalibrateBatchNorm(x, when="validation")
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            x,
            x,
            validation_data=(x[:32], x[:32]),
            callbacks=[recalibrate, Stop()],
            verbose=0,
        )
    assert during[-1] != during[-2]
    assert copies(model) == during[-2]


@pytest.mark.slow
def test_debiasing_pools_the_replicas() -> None:
    model, _ = fitted(False, callbacks=[bn.DebiasBatchNorm()])
    assert all(len(set(parts)) == 1 for parts in copies(model))
    x, _ = by_replica()
    np.testing.assert_allclose(stored(model)[0][0], x.mean(0), atol=0.4)
    np.testing.assert_allclose(stored(model)[0][1], x.var(0), rtol=0.2)


def failing(batches: int) -> Iterator[Any]:
    for _ in range(batches):
        yield normal(16, 6)
    raise KeyboardInterrupt


@contextlib.contextmanager
def intact(model: keras.Model) -> Iterator[None]:
    before = copies(model)
    assert len(set(before[0])) == 2
    yield
    assert copies(model) == before


def test_what_goes_wrong_leaves_each_copy_as_it_was() -> None:
    model, _ = fitted(False)
    x, _ = by_replica()
    for index in range(4):
        with intact(model), pytest.raises(KeyboardInterrupt):
            bn.recalibrate(model, failing(index), verbose=0)
    bad = x.copy()
    bad[70] = np.nan
    with intact(model), pytest.raises(ValueError, match="in batch 4 of the data"):
        bn.recalibrate(model, bad, batch_size=16, verbose=0)
    with intact(model), pytest.raises(ValueError, match="does not fit"):
        bn.recalibrate(model, x[:, :5], verbose=0)
    with intact(model), bn.recalibrated(model, x, verbose=0):
        assert len(set(copies(model)[0])) == 1
    with intact(model):
        bn.recalibrate(model, x, verbose=0).undo()


def test_other_strategies_are_refused_before_anything_runs() -> None:
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    model = single()
    model._distribute_strategy = strategy
    calls: tuple[Callable[[], Any], ...] = (
        lambda: bn.recalibrate(model, normal(8, 4)),
        lambda: bn.audit(model),
        lambda: bn.recalibrated(model, normal(8, 4)).__enter__(),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="CentralStorageStrategy"):
            call()
    for callback in (
        bn.BatchNormMonitor(),
        bn.DebiasBatchNorm(),
        bn.RecalibrateBatchNorm(normal(8, 4)),
    ):
        callback.set_model(model)
        with pytest.raises(NotImplementedError, match="CentralStorageStrategy"):
            callback.on_train_begin()

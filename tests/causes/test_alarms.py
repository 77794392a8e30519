"""Many healthy trainings, each with a seed of its own: nobody is to be alarmed."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import pytest
from kit import Listening, compiled, fitter, mlp, rng, table

FEW, MANY = 2, 50
"""Seeds of each kind: in the slow tests, and in the benchmark."""

Training = Callable[[list[Any]], Any]


@functools.cache
def traced(width: int, momentum: float, rate: float) -> keras.Model:
    """A model for all seeds, whose step and losses need to be traced only once."""
    model = mlp(8, width=width, momentum=momentum)
    return compiled(model, keras.optimizers.Adam(rate))


def renewed(*kind: Any) -> keras.Model:
    """That model as if it were new: other weights, an optimizer that has no past."""
    model = traced(*kind)
    model.set_weights(keras.models.clone_model(model).get_weights())
    for variable in model.optimizer.variables:
        if variable is not model.optimizer._learning_rate:
            variable.assign(keras.ops.zeros_like(variable))
    return model


def stationary(seed: int) -> tuple[Training, Any]:
    """A long run that has come to rest."""
    x, y = table(2048, seed=seed)
    model = renewed(16, 0.95, 0.002)
    model.fit(x, y, epochs=10, verbose=0)
    return fitter(model, x, y, epochs=4), (x[:256], y[:256])


def wobbling(seed: int) -> tuple[Training, Any]:
    """A net that fits nearly all: its tiny loss wobbles from epoch to epoch."""
    x, y = table(512, mean=0.0, std=1.0, seed=seed)
    model = renewed(24, 0.9, 0.002)
    return fitter(model, x, y, epochs=60, batch_size=32), (x[:256], y[:256])


def replayed(seed: int) -> tuple[Training, Any]:
    """A `fit` of one step on each of many minibatches."""
    x, y = table(2048, seed=seed)
    model = renewed(16, 0.95, 0.001)
    model.fit(x, y, epochs=12, verbose=0)
    draw, size = rng(seed), (16, 32)[seed % 2]

    def fit(callbacks: list[Any]) -> None:
        for _ in range(10):
            chosen = draw.choice(len(x), size, replace=False)
            model.fit(x[chosen], y[chosen], callbacks=callbacks, verbose=0)

    return fit, (x[:256], y[:256])


def by_hand(seed: int) -> tuple[Training, Any]:
    """`train_on_batch` under a `CallbackList`, `evaluate` in between."""
    x, y = table(2048, seed=seed)
    model = renewed(16, 0.95, 0.002)
    model.fit(x, y, epochs=8, verbose=0)

    def fit(callbacks: list[Any]) -> None:
        each = keras.callbacks.CallbackList(
            callbacks, model=model, epochs=3, steps=64, verbose=0
        )
        each.on_train_begin()
        for epoch in range(3):
            each.on_epoch_begin(epoch)
            rows = rng(seed + epoch).permutation(len(x)).reshape(64, 32)
            for step, chosen in enumerate(rows):
                each.on_train_batch_begin(step)
                model.train_on_batch(x[chosen], y[chosen])
                each.on_train_batch_end(step)
                if step == 40:
                    model.evaluate(x[:50], y[:50], batch_size=9, verbose=0)
            each.on_epoch_end(epoch, {})
        each.on_train_end({})

    return fit, (x[:256], y[:256])


KINDS = [stationary, wobbling, replayed, by_hand]


def messages(kind: Any, seed: int) -> tuple[list[str], list[str]]:
    """What two monitors say, with a probe and without."""
    keras.utils.set_random_seed(seed)
    fit, probe = kind(seed)
    monitors = [Listening(probe=probe), Listening()]
    fit(list(monitors))
    return monitors[0].messages, monitors[1].messages


def alarms(seeds: range) -> tuple[dict[Any, list[str]], dict[Any, list[str]]]:
    with_probe, without = {}, {}
    for kind in KINDS:
        for seed in seeds:
            said = messages(kind, seed)
            for found, where in zip(said, (with_probe, without), strict=True):
                if found:
                    where[kind.__name__, seed] = found
    return with_probe, without


@pytest.mark.slow
def test_some_healthy_trainings_are_left_in_peace() -> None:
    assert alarms(range(FEW)) == ({}, {})


@pytest.mark.benchmark
def test_200_healthy_trainings_are_left_in_peace() -> None:
    with_probe, without = alarms(range(100, 100 + MANY))
    assert not with_probe
    assert len(without) <= 1, without

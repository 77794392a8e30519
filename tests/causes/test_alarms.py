"""Many healthy trainings, each with a seed of its own: nobody is to be alarmed."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import pytest
from kit import Listening, compiled, fitter, mlp, rng, table

Training = Callable[[list[Any]], Any]


@functools.cache
def traced(width: int, momentum: float) -> keras.Model:
    """A model for all seeds, whose step and losses need to be traced only once."""
    model = mlp(8, width=width, momentum=momentum)
    return compiled(model, keras.optimizers.Adam())


def renewed(width: int, momentum: float, rate: float) -> keras.Model:
    """That model as if it were new: other weights, an optimizer that has no past."""
    model = traced(width, momentum)
    model.set_weights(keras.models.clone_model(model).get_weights())
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))
    model.optimizer.learning_rate = rate
    return model


def at_rest(x: Any, y: Any) -> keras.Model:
    """A model that has learned what there is to learn, and hardly moves."""
    model = renewed(16, 0.95, 0.005)
    model.fit(x, y, epochs=12, batch_size=128, verbose=0)
    model.optimizer.learning_rate = 0.0005
    return model


def stationary(seed: int) -> tuple[Training, Any]:
    """A long run that has come to rest."""
    x, y = table(2048, seed=seed)
    return fitter(at_rest(x, y), x, y, epochs=4), (x[:256], y[:256])


def wobbling(seed: int) -> tuple[Training, Any]:
    """A net that fits nearly all: its tiny loss wobbles from epoch to epoch."""
    x, y = table(320, mean=0.0, std=1.0, seed=seed)
    model = renewed(24, 0.9, 0.002)
    return fitter(model, x, y, epochs=60, batch_size=32), (x[:128], y[:128])


def replayed(seed: int) -> tuple[Training, Any]:
    """A `fit` of one step on each of many minibatches."""
    x, y = table(2048, seed=seed)
    model = at_rest(x, y)
    draw, size = rng(seed), (16, 32)[seed % 2]

    def fit(callbacks: list[Any]) -> None:
        for _ in range(8):
            chosen = draw.choice(len(x), size, replace=False)
            model.fit(x[chosen], y[chosen], callbacks=callbacks, verbose=0)

    return fit, (x[:256], y[:256])


def by_hand(seed: int) -> tuple[Training, Any]:
    """`train_on_batch` under a `CallbackList`, `evaluate` in between."""
    x, y = table(2048, seed=seed)
    model = at_rest(x, y)

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


KINDS = {stationary: 60, wobbling: 30, replayed: 50, by_hand: 60}
"""How many of each are in the benchmark: 200, of the slow kinds fewer."""


def messages(kind: Any, seed: int) -> tuple[list[str], list[str]]:
    """What two monitors say, with a probe and without."""
    keras.utils.set_random_seed(seed)
    fit, probe = kind(seed)
    monitors = [Listening(probe=probe), Listening()]
    fit(list(monitors))
    return monitors[0].messages, monitors[1].messages


def alarms(kind: Any, seeds: range) -> tuple[dict[int, Any], dict[int, Any]]:
    """Who is alarmed, with a probe and without: the seeds, and what they are told."""
    said = {seed: messages(kind, seed) for seed in seeds}
    with_probe = {seed: found for seed, (found, _) in said.items() if found}
    without = {seed: found for seed, (_, found) in said.items() if found}
    return with_probe, without


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_some_healthy_trainings_are_left_in_peace(kind: Any) -> None:
    assert alarms(kind, range(2)) == ({}, {})


@pytest.mark.benchmark
def test_200_healthy_trainings_are_left_in_peace() -> None:
    assert sum(KINDS.values()) == 200
    found = {
        kind.__name__: alarms(kind, range(100, 100 + count))
        for kind, count in KINDS.items()
    }
    assert not any(with_probe for with_probe, _ in found.values()), found
    assert sum(len(without) for _, without in found.values()) <= 1, found

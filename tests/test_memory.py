"""What is traced is remembered with the model, and forgotten when the model changes."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from models import dense, layers, normal, scatter, stored

from bn_callbacks import audit, recalibrate
from bn_callbacks.layers import CallWatch, find
from bn_callbacks.layers.memory import KEPT, memory_of

X = normal(64, 6)


class Traced(keras.layers.Layer):
    """Counts the calls of Python, which in a graph happen once a trace."""

    count = 0
    factor = 1.0

    def call(self, x: Any) -> Any:
        type(self).count += 1
        return self.factor * x


def network() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            Traced(),
            layers.Dense(5),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.BatchNormalization(),
        ]
    )


def traces(model: keras.Model, x: Any = X, **arguments: Any) -> int:
    Traced.count = 0
    recalibrate(model, x, verbose=0, **arguments)
    return Traced.count


def test_a_second_recalibration_does_not_trace_again() -> None:
    model = network()
    assert traces(model) == 1
    assert traces(model) == 0
    assert traces(model, x=normal(70, 6), batch_size=7) == 0
    assert traces(model, refine=2) == 0


def test_whoever_counts_the_calls_of_training_causes_no_new_trace() -> None:
    model = network()
    assert traces(model) == 1
    watch = CallWatch(model, find(model))
    watch.begin()
    assert traces(model) == 0
    watch.end(0)
    assert traces(model) == 0


def test_new_weights_need_no_new_trace() -> None:
    model = network()
    recalibrate(model, X, verbose=0)
    once = stored(model)
    weights = model.get_weights()
    weights[0] = -2 * weights[0]
    model.set_weights(weights)
    assert traces(model) == 0
    np.testing.assert_allclose(stored(model)[0][0], -2 * once[0][0], rtol=1e-5)
    np.testing.assert_allclose(stored(model)[0][1], 4 * once[0][1], rtol=1e-5)


def freeze(model: keras.Model) -> None:
    model.layers[-1].trainable = False


def rescale(model: keras.Model) -> None:
    model.layers[0].factor = 3.0


def activate(model: keras.Model) -> None:
    model.layers[3].activation = keras.activations.tanh


@pytest.mark.filterwarnings("ignore:The data given differ")
@pytest.mark.parametrize("change", [freeze, rescale, activate])
def test_a_model_that_has_changed_is_traced_anew(
    change: Callable[[keras.Model], None],
) -> None:
    model, other = network(), network()
    other.set_weights(model.get_weights())
    recalibrate(model, X, verbose=0)
    change(model)
    assert traces(model) == 1
    change(other)
    # What a model that was never traced before would get.
    recalibrate(other, X, verbose=0)
    for one, two in zip(stored(model)[:1], stored(other)[:1], strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.filterwarnings("ignore:Exception encountered:UserWarning")
@pytest.mark.filterwarnings("ignore:The structure of:UserWarning")
def test_another_structure_of_data_is_traced_anew() -> None:
    model = network()
    assert traces(model) == 1
    assert traces(model, x=[X]) == 1
    assert traces(model, x=[X]) == 0


@pytest.mark.filterwarnings("ignore:The data given differ")
def test_little_is_kept_and_nothing_beyond_the_life_of_the_model() -> None:
    model = network()
    for factor in range(2 * KEPT):
        model.layers[0].factor = float(factor + 1)
        recalibrate(model, X, verbose=0)
    assert len(memory_of(find(model))) <= KEPT + 1
    audit(model, X)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_two_threads_that_recalibrate_one_model_do_not_share_a_trace() -> None:
    model, expected = scatter(dense()), scatter(dense())
    expected.set_weights(model.get_weights())
    recalibrate(expected, X, verbose=0)
    threads = [
        threading.Thread(target=recalibrate, args=(model, X), kwargs={"verbose": 0})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, two in zip(stored(model), stored(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)

"""Data that are those of training, scaled and shifted, and stale statistics."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from bn_callbacks import BatchNormWarning, audit, recalibrate
from bn_callbacks.layers import assign, find, read
from bn_callbacks.statistics.moments import Statistics

layers = keras.layers
Array = NDArray[Any]


def pixels(count: int = 512) -> Array:
    """Pictures with values of [0, 255]."""
    draw = np.random.default_rng(0)
    level = draw.normal(100, 30, size=(count, 1, 1, 1))
    return np.clip(level + draw.normal(0, 40, size=(count, 8, 8, 1)), 0, 255)


def scaled(x: Array) -> Array:
    """Pixels in [-1, 1], as the network wants them."""
    return (x / 127.5 - 1).astype("float32")


X = scaled(pixels())


def network(padding: str = "same", blocks: int = 2) -> keras.Model:
    """A network whose statistics are right for `X`."""
    keras.utils.set_random_seed(3)
    stack: list[Any] = [keras.Input((8, 8, 1))]
    for width in (8, 12)[:blocks]:
        stack += [
            layers.Conv2D(width, 3, padding=padding, bias_initializer="normal"),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]
    model = keras.Sequential([*stack, layers.GlobalAveragePooling2D(), layers.Dense(2)])
    recalibrate(model, X, verbose=0)
    return model


MAPS: dict[str, tuple[Array, str]] = {
    "scaled twice": (scaled(X), r"a factor of 1/12[78] and a shift of -(1|0.99\d?) "),
    "of [0, 1]": (
        X / 2 + 0.5,
        r"a factor of 1/(2|1.99) and a shift of 0\.(5|49\d|50\d) ",
    ),
    "of [0, 255]": (pixels().astype("float32"), "a factor of 12[78] and a shift of 12"),
    "of 16 bits": (np.round(X * 32767).astype("int16"), r"a factor of 3.2[78]e\+04 in"),
    "times 1000": (X * 1000, "a factor of (1e.03|999) in"),
}


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("x", "words"), MAPS.values(), ids=MAPS)
def test_a_map_of_the_data_is_found_and_named(
    x: Array, words: str, padding: str
) -> None:
    model = network(padding)
    report = audit(model, x)
    assert report.lagging
    assert {layer.cause for layer in report.lagging} == {"rescaled_inputs"}
    advice = report.lagging[0].advice
    assert re.search(words, advice), advice
    assert "Do not recalibrate" in advice


def test_recalibrating_on_such_data_warns_and_can_be_taken_back() -> None:
    model = network("valid")
    before = model.get_weights()
    with pytest.warns(BatchNormWarning, match=r"factor of 1/2 and a shift of 0\.5"):
        report = recalibrate(model, X / 2 + 0.5, verbose=0)
    assert "`undo()`" in report.notes[0]
    assert report.notes[0] in str(report)
    assert not all(map(np.array_equal, before, model.get_weights()))
    report.undo()
    assert all(map(np.array_equal, before, model.get_weights()))


def test_the_loss_that_keeps_the_old_statistics_is_not_contradicted() -> None:
    model = network()
    model.compile(loss="mse")
    held_out = X, model.predict(X, verbose=0)
    with pytest.warns(BatchNormWarning, match="Nothing was changed. Give the data"):
        report = recalibrate(model, X * 3, validation_data=held_out, verbose=0)
    assert not report.committed


def change(model: keras.Model, how: Callable[[Statistics], Statistics]) -> None:
    found = find(model)
    assign(found, [how(one) for one in read(found)])


def grown(model: keras.Model) -> None:
    """All weights times 3, as an average of weights without its correction has them."""
    for weight in model.trainable_weights:
        weight.assign(3 * weight)


def ran_on_constants(model: keras.Model) -> None:
    for _ in range(100):
        model(np.full((4, 8, 8, 1), 2.0, "float32"), training=True)


def divided(model: keras.Model) -> None:
    change(model, lambda one: Statistics(one.mean / 900, one.variance / 900))


def too_wide(model: keras.Model) -> None:
    change(model, lambda one: Statistics(one.mean, one.variance * 9))


STALE = {each.__name__: each for each in (grown, ran_on_constants, divided, too_wide)}


@pytest.mark.parametrize("spoil", STALE.values(), ids=STALE)
@pytest.mark.parametrize("blocks", [1, 2])
def test_stale_statistics_are_no_map_of_the_data(
    spoil: Callable[[keras.Model], None], blocks: int
) -> None:
    model = network("valid", blocks)
    spoil(model)
    report = audit(model, X)
    assert {layer.cause for layer in report.lagging} == {"stale"}
    assert "preprocessed as in training" in report.lagging[0].advice
    with warnings.catch_warnings():
        warnings.simplefilter("error", BatchNormWarning)
        recalibrate(model, X, verbose=0)
    assert not audit(model, X).lagging


def test_other_maps_are_not_known_and_to_be_checked() -> None:
    model = network()
    report = audit(model, np.exp(4 * X))
    assert {layer.cause for layer in report.lagging} == {"stale"}
    assert "preprocessed as in training" in report.lagging[0].advice


def test_a_single_layer_shows_it_by_its_means() -> None:
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    x = np.random.default_rng(1).normal(np.arange(1, 7), 1, size=(512, 6))
    x *= np.arange(1, 7)
    recalibrate(model, x, verbose=0)
    assert audit(model, 255 * x).worst.cause == "rescaled_inputs"
    # With a shift, nothing tells it from statistics that are stale.
    assert audit(model, 255 * x + 3000).worst.cause == "stale"


def test_several_inputs_are_not_mapped_back() -> None:
    one, other = keras.Input((6,)), keras.Input((6,))
    z = layers.BatchNormalization()(layers.Dense(8)(one + other))
    z = layers.BatchNormalization()(layers.Dense(8, "relu")(z))
    model = keras.Model([one, other], z)
    x = [np.random.default_rng(i).normal(2, 1, size=(256, 6)) for i in range(2)]
    recalibrate(model, x, verbose=0)
    assert audit(model, [9 * part for part in x]).worst.cause == "stale"

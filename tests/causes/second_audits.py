"""A second set of unseen models that somebody holds against data with `audit`.

python tests/causes/second_audits.py  # whether each is what it says
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from audits import Audit, Given, audits
from kit import compiled, crossentropy, rng

layers = keras.layers
BN = layers.BatchNormalization

MINE: list[tuple[str, Audit]] = []
"""What recalibrating over the data given does to the model's own task, and the case."""


def case(truth: str, *expected: str) -> Callable[[Any], Any]:
    """Adds a held-back case, and what it claims."""

    def add(build: Callable[[], Given]) -> Callable[[], Given]:
        made = audits(*expected, held_back=True)(build)
        MINE.append((truth, list(audits)[-1]))
        return made

    return add


def houses(rows: int, seed: int) -> tuple[Any, Any]:
    """Area, year, rooms, distance, temperature and altitude, and a price."""
    z = rng(seed).normal(size=(rows, 6))
    y = np.tanh(z[:, :1] + z[:, 3:4]) + 0.5 * z[:, 1:2] * z[:, 2:3]
    return z.astype("float32"), y.astype("float32")


MEANS = np.array([120.0, 1970.0, 4.0, 15.0, 11.0, 400.0])
SCALES = np.array([40.0, 20.0, 1.2, 7.0, 3.0, 250.0])


# A factor for each column, columns that change places, a logarithm: none is one factor
# for all, which is what `audit` can prove. It may say what it sees, if it sends to the
# preprocessing or to the data first.


@case("harms", "rescaled_inputs", "stale")
def scaler_forgotten_at_serving() -> Given:
    # StandardScaler in the notebook only. Each column has a factor of its own.
    x, y = houses(1600, seed=301)
    inputs = keras.Input((6,))
    z = layers.Dense(32, "gelu")(BN(momentum=0.9)(inputs))
    z = layers.Activation("gelu")(BN(momentum=0.9)(layers.Dense(16)(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005))
    model.fit(x[:1280], y[:1280], epochs=10, verbose=0)
    raw = (MEANS + SCALES * x[:1280]).astype("float32")
    return Given(model, (raw, y[:1280]), (x[1280:], y[1280:]), cure=lambda: None)


def leaves(rows: int, seed: int) -> tuple[Any, Any]:
    """Green leaves with spots, red for one illness and blue for the other."""
    draw = rng(seed)
    y = draw.integers(3, size=rows)
    x = np.array([0.25, 0.6, 0.1]) + 0.05 * draw.normal(size=(rows, 8, 8, 3))
    for row in range(rows):
        i, j = draw.integers(6, size=2)
        if y[row]:
            channel, strength = ((0, 0.4), (2, 0.15))[y[row] - 1]
            x[row, i : i + 3, j : j + 3, channel] += strength
    return x.astype("float32"), y.astype("int32")


@case("harms", "rescaled_inputs", "stale")
def red_and_blue_swapped() -> Given:
    # Trained on RGB; OpenCV reads BGR.
    x, y = leaves(1280, seed=302)
    inputs = keras.Input((8, 8, 3))
    z = layers.Conv2D(12, 3, activation="relu")(BN(momentum=0.9)(inputs))
    z = layers.ReLU()(BN(momentum=0.9)(layers.Conv2D(12, 3)(z)))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling2D()(z)))
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    model.fit(x[:960], y[:960], epochs=10, verbose=0)
    swapped = np.ascontiguousarray(x[:960, ..., ::-1])
    return Given(model, (swapped, y[:960]), (x[960:], y[960:]), cure=lambda: None)


@case("harms", "rescaled_inputs", "outliers")
def powers_instead_of_decibels() -> Given:
    # Trained on decibels; whoever serves it has left out the logarithm.
    draw = rng(303)
    y = draw.integers(3, size=1600).astype("int32")
    x = -30 + 6 * draw.normal(size=(1600, 10))
    x[:, :3] += 18 * np.eye(3)[y]
    x = x.astype("float32")
    inputs = keras.Input((10,))
    z = layers.Dense(24, "relu")(BN(momentum=0.9)(inputs))
    z = layers.ReLU()(BN(momentum=0.9)(layers.Dense(24)(z)))
    model = keras.Model(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    model.fit(x[:1280], y[:1280], epochs=8, verbose=0)
    data = ((10 ** (x[:1280] / 10)).astype("float32"), y[:1280])
    return Given(model, data, (x[1280:], y[1280:]), cure=lambda: None)


def ripples(rows: int, seed: int) -> tuple[Any, Any]:
    """Two channels of waves, and by how much one runs ahead."""
    draw = rng(seed)
    shift = draw.uniform(-1.2, 1.2, size=(rows, 1))
    phase = draw.uniform(0, 6.3, size=(rows, 1)) + 0.7 * np.arange(20)
    x = np.stack([np.sin(phase), np.sin(phase + shift)], -1)
    x = 1 + x + 0.2 * draw.normal(size=x.shape)
    return x.astype("float32"), shift.astype("float32")


def net_of_ripples() -> keras.Model:
    inputs = keras.Input((20, 2))
    z = inputs
    for width in (12, 16):
        z = layers.Conv1D(width, 4, strides=2)(z)
        z = layers.ReLU()(BN(momentum=0.9)(z))
    z = layers.Dense(24, "relu")(layers.Flatten()(z))
    model = keras.Model(inputs, layers.Dense(1)(z))
    model = compiled(model, keras.optimizers.Adam(0.003))
    x, y = ripples(1280, seed=304)
    model.fit(x, y, epochs=12, verbose=0)
    return model


def equalise(model: keras.Model, with_statistics: bool) -> None:
    """Scales the channels of convolutions for eight bits, which BN undoes."""
    draw = rng(305)
    for layer in model.layers:
        if isinstance(layer, layers.Conv1D):
            factor = np.exp(0.8 * draw.normal(size=layer.filters)).astype("float32")
            layer.kernel.assign(layer.kernel.numpy() * factor)
            layer.bias.assign(layer.bias.numpy() * factor)
        if isinstance(layer, BN) and with_statistics:
            layer.moving_mean.assign(layer.moving_mean.numpy() * factor)
            layer.moving_variance.assign(layer.moving_variance.numpy() * factor**2)


@case("cures", "stale")
def equalised_for_eight_bits_without_the_statistics() -> Given:
    model = net_of_ripples()
    equalise(model, with_statistics=False)
    return Given(model, ripples(960, seed=306), ripples(320, seed=307))


@case("nothing")
def equalised_for_eight_bits_with_the_statistics() -> Given:
    model = net_of_ripples()
    equalise(model, with_statistics=True)
    return Given(model, ripples(960, seed=306), ripples(320, seed=307))


@case("nothing")
def held_against_forty_examples() -> Given:
    # All that somebody has at hand of the right kind.
    model = net_of_ripples()
    return Given(model, ripples(40, seed=308), ripples(320, seed=309))


def main() -> None:
    """Recalibrates by NumPy, and prints what that does."""
    from fresh_kit import HELPS, loss, norms, recalibrate

    for truth, audit in MINE:
        given = audit.made()
        model = given.model
        before, on_given = loss(model, given.held_out), loss(model, given.data)
        recalibrate(model, norms(model), given.data[0])
        after, on_given_after = loss(model, given.held_out), loss(model, given.data)
        is_so = HELPS[truth](before, after)
        if truth == "harms":  # and what is given is the trouble, not the model
            is_so &= on_given > 3 * before
        print(
            f"{' ' if is_so else '✗'} {audit.name:50} {truth:8} held out {before:.3g}, "
            f"recalibrated {after:.3g} | data given {on_given:.3g}, "
            f"recalibrated {on_given_after:.3g}",
            flush=True,
        )


if __name__ == "__main__":
    main()

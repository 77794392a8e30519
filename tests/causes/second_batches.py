"""A second set of unseen cases: batches too small, of one kind, or with extremes."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from cluster import mirrored
from fresh_kit import Fresh, Trial
from kit import compiled, crossentropy, fitter, rng

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


def flats(rows: int, seed: int) -> tuple[Any, Any]:
    """Flats, and what they cost, mostly by their size."""
    draw = rng(seed)
    x = draw.normal(size=(rows, 6))
    y = x[:, :1] + 0.7 * x[:, 1:2] + 0.5 * np.sin(2 * x[:, 2:3])
    return x.astype("float32"), y.astype("float32")


def dense(features: int, outputs: int, norm: Any, width: int = 24) -> keras.Model:
    inputs = keras.Input((features,))
    z = inputs
    for _ in range(2):
        z = layers.Activation("mish")(norm()(layers.Dense(width)(z)))
    return keras.Model(inputs, layers.Dense(outputs)(z))


@cases.case(
    "tiny_batch",
    recalibrating="any",
    cures={"sixteen at once": {"size": 16, "accumulated": None, "epochs": 6}},
    fails={"momentum 0.999": {"momentum": 0.999}},
)
def two_at_a_time_and_accumulated(
    size: int = 2,
    accumulated: int | None = 8,
    momentum: float = 0.95,
    epochs: int = 3,
) -> Trial:
    # Somebody holds two rows and gradients of eight steps for the same as sixteen.
    x, y = flats(960, seed=231)
    model = dense(6, 1, lambda: BN(momentum=momentum))
    optimizer = keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=accumulated, clipnorm=5.0
    )
    compiled(model, optimizer)
    fit = fitter(model, x, y, epochs=epochs, batch_size=size)
    return Trial(model, fit, (x[:320], y[:320]), size, held_out=flats(320, seed=232))


@cases.case(
    "correlated_batches",
    recalibrating="any",
    cures={
        "shuffled": {"shuffle": True},
        "LayerNormalization": {"norm": layers.LayerNormalization},
    },
    fails={"momentum 0.5": {"norm": lambda: BN(momentum=0.5)}},
)
def flats_sorted_by_price(
    shuffle: bool = False, norm: Any = lambda: BN(momentum=0.95)
) -> Trial:
    # A file in the order of its target, and `shuffle=False`.
    x, y = flats(1280, seed=233)
    order = np.argsort(y[:, 0])
    x, y = x[order], y[order]
    model = dense(6, 1, norm)
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, x, y, epochs=8, shuffle=shuffle)
    rows = (np.arange(0, 1280, 160)[:, None] + np.arange(32)).reshape(-1)
    if shuffle:
        rows = rng(1).permutation(1280)[:256]
    return Trial(model, fit, (x[rows], y[rows]), held_out=flats(320, seed=234))


def tiles(scenes: int, size: int, seed: int) -> tuple[Any, Any]:
    """Tiles of satellite scenes, each with a haze of its own; how much is water."""
    draw = rng(seed)
    haze = 1.5 * draw.normal(size=(scenes, 1, 1, 1, 3))
    water = draw.uniform(size=(scenes, size, 1, 1))
    is_water = draw.uniform(size=(scenes, size, 6, 6)) < water
    x = haze + is_water[..., None] * np.array([-1.0, 0.5, 1.0])
    x = x + 0.4 * draw.normal(size=x.shape)
    y = is_water.mean((2, 3))[..., None].reshape(-1, 1)
    return x.reshape(-1, 6, 6, 3).astype("float32"), y.astype("float32")


@cases.case(
    "correlated_batches",
    recalibrating="any",
    cures={"tiles of many scenes": {"mixed": True}},
    fails={"momentum 0.99": {"momentum": 0.99}, "momentum 0.5": {"momentum": 0.5}},
)
def a_scene_after_the_other(mixed: bool = False, momentum: float = 0.9) -> Trial:
    # A generator opens a scene, yields its tiles, and opens the next.
    x, y = tiles(40, 24, seed=235)
    order = rng(2).permutation(960) if mixed else np.arange(960)
    x, y = x[order], y[order]

    def batches() -> Any:
        for start in range(0, 960, 24):
            yield x[start : start + 24], y[start : start + 24]

    spec = (
        tf.TensorSpec((None, 6, 6, 3), tf.float32),
        tf.TensorSpec((None, 1), tf.float32),
    )
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    data = data.apply(tf.data.experimental.assert_cardinality(40))
    inputs = keras.Input((6, 6, 3))
    z = layers.ReLU()(BN(momentum=momentum)(layers.Conv2D(10, 1)(inputs)))
    z = layers.ReLU()(BN(momentum=momentum)(layers.Conv2D(10, 3, strides=2)(z)))
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(z)))
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, data, epochs=8)
    return Trial(model, fit, (x[:480], y[:480]), 24, held_out=tiles(20, 16, seed=236))


def markets(count: int, seed: int) -> tuple[Any, Any]:
    """Markets of six firms, and the logarithm of each one's share of its market."""
    draw = rng(seed)
    x = draw.normal(size=(count, 6, 5))
    value = x @ np.array([0.4, -0.3, 0.2, 0.25, -0.35])
    share = value - np.log(np.exp(value).sum(1, keepdims=True))
    return x.reshape(-1, 5).astype("float32"), share.reshape(-1, 1).astype("float32")


@cases.case(
    "batch_dependent",
    recalibrating="nothing",
    fails={
        "momentum 0.5": {"momentum": 0.5},
        "twice as long": {"epochs": 16},
    },
)
def firms_of_a_market_in_a_batch(momentum: float = 0.95, epochs: int = 8) -> Trial:
    # A share depends on the rivals, and these are the rest of the batch.
    x, y = markets(200, seed=237)
    model = dense(5, 1, lambda: BN(momentum=momentum), width=16)
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, x, y, epochs=epochs, batch_size=6, shuffle=False)
    return Trial(model, fit, (x[:480], y[:480]), 6, held_out=markets(60, seed=238))


def parcels(rows: int, seed: int, grams: int) -> tuple[Any, Any]:
    """Parcels, with weights in kilograms and lengths in metres but for some rows."""
    draw = rng(seed)
    x = np.exp(0.4 * draw.normal(size=(rows, 6)))
    y = np.log(x[:, :1] * x[:, 1:2]) + np.sin(3 * x[:, 2:3])
    bad = draw.choice(rows, grams, replace=False)
    x[bad, :4] *= 1000
    return x.astype("float32"), y.astype("float32")


@cases.case("outliers", recalibrating="any", cures={"kilograms": {"grams": 0}})
def a_few_parcels_in_grams(grams: int = 8) -> Trial:
    x, y = parcels(1920, 239, grams)
    inputs = keras.Input((6,))
    z = BN(momentum=0.97)(inputs)
    gate = layers.Dense(24, "sigmoid")(z)
    z = layers.Multiply()([gate, layers.Dense(24, "tanh")(z)])
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005), "mae")
    fit = fitter(model, x, y, epochs=8)
    return Trial(model, fit, (x[:480], y[:480]), held_out=parcels(320, 240, 0))


@cases.case("non_finite", recalibrating="cures", cures={"no gap": {"missing": False}})
def missing_value_behind_nan_to_num(missing: bool = True) -> Trial:
    # The loss never shows it: what BN makes of NaN is set to 0, and from that batch on
    # inference is without the column.
    draw = rng(241)
    x = (5 + 2 * draw.normal(size=(1280, 4))).astype("float32")
    y = np.tanh(x[:, :1] - 5) + 0.3 * x[:, 1:2]
    if missing:
        x[700, 0] = np.nan
    inputs = keras.Input((4,))
    z = BN(momentum=0.9, center=False, scale=False)(inputs)
    z = layers.Lambda(keras.ops.nan_to_num, output_shape=(4,))(z)
    z = layers.Dense(16, "elu")(layers.Dense(16, "elu")(z))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, x[:960], y[:960], epochs=8)
    return Trial(model, fit, (x[:320], y[:320]), held_out=(x[960:], y[960:]))


@cases.case(
    "replicas_differ",
    recalibrating="any",
    cures={"synchronized": {"synchronized": True}, "unsorted": {"is_sorted": False}},
)
def batches_sorted_by_length_on_three_replicas(
    synchronized: bool = False, is_sorted: bool = True
) -> Trial:
    # Each batch is random, and sorted within, as for packing; the replicas get the
    # short, the middling and the long.
    draw = rng(242)
    length = draw.uniform(0, 6, size=(1920, 1))
    x = length * np.array([1.0, -0.5, 0.8, 0.3]) + draw.normal(size=(1920, 4))
    y = (x.sum(1) + draw.normal(size=1920) > 4.8).astype("int32")
    x = x.astype("float32")
    held_out = (x[1440:], y[1440:])
    x, y, length = x[:1440], y[:1440], length[:1440]
    if is_sorted:
        order = length.reshape(-1, 48).argsort(1) + 48 * np.arange(30)[:, None]
        x, y = x[order.reshape(-1)], y[order.reshape(-1)]
    with mirrored(3).scope():
        model = dense(4, 2, lambda: BN(momentum=0.9, synchronized=synchronized), 12)
        compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    fit = fitter(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(48), epochs=4)
    return Trial(model, fit, (x[:480], y[:480]), 16, held_out=held_out)

"""Fresh cases: batches too small, of one kind, with extremes, NaN, or on replicas."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from cluster import mirrored
from fresh_averages import beats, patches, sentences
from fresh_kit import Fresh, Trial
from kit import compiled, crossentropy, fitter, normed, rng

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


def recordings(rows: int, seed: int) -> tuple[Any, Any]:
    """Long recordings at any gain, and how loud each moment is, absolutely."""
    draw = rng(seed)
    gain = np.exp(1.2 * draw.normal(size=(rows, 1, 1)))
    envelope = draw.uniform(0.5, 1.5, size=(rows, 6, 1)).repeat(8, axis=1)
    x = gain * envelope * draw.normal(size=(rows, 48, 2))
    y = np.log(gain * envelope)
    return x.astype("float32"), y.astype("float32")


@cases.case(
    "tiny_batch",
    recalibrating="any",
    cures={"batches of 24": {"size": 24, "epochs": 24}},
    fails={"clipped": {"limit": 3.0}},
)
def one_recording_a_step(size: int = 1, epochs: int = 2, limit: float = 1e9) -> Trial:
    # Sequence to sequence, "batch_size=1 because they are long".
    x, y = recordings(600, seed=31)
    x = np.clip(x, -limit, limit)
    inputs = keras.Input((48, 2))
    z = layers.Conv1D(16, 5, padding="same")(inputs)
    for dilation in (1, 2):
        z = layers.ReLU()(BN(momentum=0.9)(z))
        z = layers.Conv1D(16, 5, padding="same", dilation_rate=dilation)(z)
    z = layers.ReLU()(BN(momentum=0.9)(z))
    model = keras.Model(inputs, layers.Conv1D(1, 1)(z))
    compiled(model, keras.optimizers.Adam(0.003))
    fit = fitter(model, x, y, epochs=epochs, batch_size=size)
    return Trial(model, fit, (x[:96], y[:96]), size, held_out=recordings(200, seed=32))


class Pairs(keras.utils.PyDataset):
    """One text of either class a batch, as somebody wrote for a ranking loss."""

    def __init__(self, x: Any, y: Any, pairs: int) -> None:
        super().__init__()
        self.x, self.y, self.pairs = x, y, pairs
        self.of = [np.flatnonzero(y == label) for label in (0, 1)]

    def __len__(self) -> int:
        return min(map(len, self.of)) // self.pairs

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        rows = slice(index * self.pairs, (index + 1) * self.pairs)
        rows = np.concatenate([one[rows] for one in self.of])
        return self.x[rows], self.y[rows]


@cases.case(
    "tiny_batch",
    recalibrating="any",
    cures={"pairs by 16": {"pairs": 16, "epochs": 12}},
)
def a_pair_of_texts_a_step(pairs: int = 1, epochs: int = 2) -> Trial:
    x, y = sentences(1200, seed=33)
    model = keras.Sequential(
        [
            keras.Input((20,), dtype="int32"),
            layers.Embedding(100, 8),
            layers.GRU(16),
            BN(),
            layers.Dense(16, "relu"),
            BN(),
            layers.Dense(2),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    data = Pairs(x, y, pairs)
    fit = fitter(model, data, epochs=epochs, shuffle=False)
    batches = zip(*(data[i] for i in range(len(data))), strict=True)
    probe = tuple(np.concatenate(one)[:256] for one in batches)
    size = 2 * pairs
    return Trial(model, fit, probe, size, held_out=sentences(400, seed=34))


def queries(count: int, size: int, seed: int) -> tuple[Any, Any]:
    """Documents found for queries; the query decides where their features lie."""
    draw = rng(seed)
    weight = rng(98).normal(size=(10, 1))
    own = draw.normal(size=(count, size, 10))
    query = 4 * draw.normal(size=(count, 1, 10))
    y = np.tanh(own @ weight) + 0.3 * (own**2) @ np.abs(weight) / 3
    x = query + own
    return x.reshape(-1, 10).astype("float32"), y.reshape(-1, 1).astype("float32")


@cases.case(
    "correlated_batches",
    recalibrating="any",
    cures={"features less their query's mean": {"centred": True}},
    fails={"momentum 0.999": {"momentum": 0.999}, "momentum 0.5": {"momentum": 0.5}},
)
def documents_of_one_query_a_batch(
    centred: bool = False, momentum: float = 0.9
) -> Trial:
    # Learning to rank: a batch is what one query has found.
    x, y = queries(80, 25, seed=35)
    test = queries(40, 25, seed=36)
    if centred:
        mean = x.reshape(80, 25, 10).mean(1, keepdims=True)
        x = (x.reshape(80, 25, 10) - mean).reshape(-1, 10)
        mean = test[0].reshape(40, 25, 10).mean(1, keepdims=True)
        test = ((test[0].reshape(40, 25, 10) - mean).reshape(-1, 10), test[1])
    model = keras.Sequential(
        [
            keras.Input((10,)),
            layers.Dense(32),
            BN(momentum=momentum),
            layers.Activation("swish"),
            layers.Dense(16, "swish"),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.AdamW(0.005))
    fit = fitter(model, x, y, epochs=15, batch_size=25, shuffle=False)
    return Trial(model, fit, (x[:400], y[:400]), 25, held_out=test)


@cases.case(
    "correlated_batches",
    recalibrating="any",
    cures={
        "all shuffled": {"buffer": 4000},
        "LayerNormalization": {"norm": layers.LayerNormalization},
    },
    fails={"momentum 0.9": {"norm": lambda: BN(momentum=0.9)}},
)
def many_views_of_a_picture_in_a_row(
    buffer: int = 1, norm: Any = lambda: BN(momentum=0.97)
) -> Trial:
    # `flat_map` makes sixteen distorted copies of each picture, `batch(32)` follows.
    x, y = patches(250, seed=37)
    draw = rng(38)
    light = 1.5 * draw.normal(size=(250, 1, 1, 3))
    x = x + light
    views = x[:, None] + 0.3 * draw.normal(size=(250, 16, 10, 10, 3))
    views = views.reshape(-1, 10, 10, 3).astype("float32")
    labels = y.repeat(16)
    test = patches(512, seed=39)
    held_out = (test[0] + 1.5 * rng(40).normal(size=(512, 1, 1, 3)), test[1])
    data = tf.data.Dataset.from_tensor_slices((views, labels))
    data = data.shuffle(buffer, seed=1).batch(32)
    model = keras.Sequential(
        [
            keras.Input((10, 10, 3)),
            layers.Conv2D(16, 3),
            norm(),
            layers.ReLU(),
            layers.Conv2D(16, 3, strides=2),
            norm(),
            layers.ReLU(),
            layers.GlobalMaxPooling2D(),
            layers.Dense(4),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, data, epochs=6)
    held_out = (held_out[0].astype("float32"), held_out[1])
    # What follows the first batches of the data, in their order.
    return Trial(model, fit, (views[:640], labels[:640]), held_out=held_out)


@cases.case(
    "correlated_batches",
    recalibrating="any",
    cures={
        "a buffer for all": {"buffer": 2000},
        "LayerNormalization": {"norm": layers.LayerNormalization},
    },
    fails={"momentum 0.999": {"norm": lambda: BN(momentum=0.999)}},
)
def sorted_file_and_a_small_shuffle_buffer(buffer: int = 60, norm: Any = BN) -> Trial:
    # image_dataset_from_directory's order, `shuffle(60)`.
    x, y = beats(1800, seed=41)
    order = np.argsort(y, kind="stable")
    x, y = x[order], y[order]
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(buffer, seed=2).batch(30)
    inputs = keras.Input((40, 1))
    z = layers.ReLU()(norm()(layers.Dense(24)(layers.Flatten()(inputs))))
    z = layers.ReLU()(norm()(layers.Dense(24)(z)))
    model = keras.Model(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    fit = fitter(model, data, epochs=12)
    batches = list(data.as_numpy_iterator())[::4]
    probe = tuple(np.concatenate(one) for one in zip(*batches, strict=True))
    return Trial(model, fit, probe, 30, held_out=beats(600, seed=42))


@cases.case("outliers", recalibrating="any", cures={"filled in": {"missing": 0.0}})
def missing_values_as_minus_9999(missing: float = -9999.0) -> Trial:
    # Wide and deep; four in a thousand values are missing.
    draw = rng(43)
    x = draw.normal(size=(4000, 9))
    y = np.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    is_missing = draw.uniform(size=x.shape) < 0.002
    x = np.where(is_missing, missing, x).astype("float32")
    y = y.astype("float32")
    inputs = keras.Input((9,))
    normal = BN(momentum=0.98)(inputs)
    deep = layers.Dense(48, "relu")(normal)
    deep = layers.Dense(32, "relu")(deep)
    z = layers.Concatenate()([normal, deep])
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005), keras.losses.Huber())
    fit = fitter(model, x[:3200], y[:3200], epochs=10)
    clean = ~is_missing[3200:].any(1)
    held_out = (x[3200:][clean], y[3200:][clean])
    return Trial(model, fit, (x[:640], y[:640]), held_out=held_out)


@cases.case("outliers", recalibrating="any", cures={"clipped": {"limit": 6.0}})
def spikes_of_a_loose_contact(limit: float = 1e9) -> Trial:
    # One recording in a hundred has a sample of some thousands.
    x, y = beats(2560, seed=44)
    draw = rng(45)
    x = x / (1 + np.abs(x).max(axis=1, keepdims=True) / 3)
    for row in draw.choice(2560, 25, replace=False):
        x[row, draw.integers(40)] = draw.choice([-1, 1]) * draw.uniform(2e3, 5e3)
    x = np.clip(x, -limit, limit).astype("float32")
    clean, labels = beats(600, seed=46)
    clean = clean / (1 + np.abs(clean).max(axis=1, keepdims=True) / 3)
    inputs = keras.Input((40, 1))
    z = BN(momentum=0.98)(inputs)
    z = layers.Conv1D(16, 7, strides=2, activation="relu")(z)
    z = layers.Conv1D(16, 5, strides=2, activation="relu")(z)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(z)))
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=8)
    return Trial(
        model, fit, (x[:640], y[:640]), held_out=(clean.astype("float32"), labels)
    )


class SkipsBadSteps(keras.Model):
    """Leaves out the updates whose gradients are not finite."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            value = self.compute_loss(x, y, self(x, training=True))
        weights = self.trainable_variables
        gradients = tape.gradient(value, weights)
        good = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        gradients = [tf.where(good, g, tf.zeros_like(g)) for g in gradients]
        self.optimizer.apply(gradients, weights)
        return {"loss": tf.where(good, value, 0.0)}


@cases.case(
    "non_finite", recalibrating="cures", cures={"no silence": {"silent": False}}
)
def logarithm_of_silence(silent: bool = True) -> Trial:
    # Log energies; one recording is digitally silent for a moment.
    draw = rng(47)
    y = draw.integers(3, size=1300)
    power = np.exp(draw.normal(size=(1300, 12, 6)) + 1.5 * np.eye(3, 6)[y][:, None])
    if silent:
        power[700, 4] = 0
    with np.errstate(divide="ignore"):
        x = np.log(power).astype("float32")
    y = y.astype("int32")
    inputs = keras.Input((12, 6))
    z = layers.Conv1D(12, 3)(BN()(inputs))
    z = layers.GlobalAveragePooling1D()(layers.ReLU()(BN()(z)))
    model = SkipsBadSteps(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    fit = fitter(model, x[:1000], y[:1000], epochs=8)
    return Trial(model, fit, (x[:320], y[:320]), held_out=(x[1000:], y[1000:]))


@cases.case("non_finite", recalibrating="cures", cures={"no blank": {"blank": False}})
def blank_picture_divided_by_its_deviation(blank: bool = True) -> Trial:
    # Each picture standardised by itself; one is blank, so 0/0. The loss scaling of
    # mixed precision leaves the step out; BN does not.
    x, y = patches(1100, seed=48)
    if blank:
        x[333] = 0
    with np.errstate(invalid="ignore"):
        x = (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True)
    policy = "mixed_float16"
    inputs = keras.Input((10, 10, 3))
    z = layers.Conv2D(12, 3, dtype=policy)(inputs)
    z = layers.ReLU()(BN(momentum=0.9, dtype=policy)(z))
    z = layers.GlobalMaxPooling2D()(layers.Conv2D(12, 3, dtype=policy)(z))
    model = keras.Model(inputs, layers.Dense(4, dtype="float32")(z))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.005))
    compiled(model, optimizer, crossentropy())
    fit = fitter(model, x[:800], y[:800], epochs=6)
    return Trial(model, fit, (x[:320], y[:320]), held_out=(x[800:], y[800:]))


def in_halves(x: Any, y: Any, key: Any, size: int, mixed: bool) -> tuple[Any, Any]:
    """Batches of which each half has one kind, or both mixed."""
    first, second = np.flatnonzero(~key), np.flatnonzero(key)
    count = min(len(first), len(second)) * 2 // size
    half = size // 2
    rows = np.concatenate(
        [
            np.concatenate(
                [kind[i * half : (i + 1) * half] for kind in (first, second)]
            )
            for i in range(count)
        ]
    )
    if mixed:
        rows = rng(1).permutation(rows)
    return x[rows], y[rows]


@cases.case(
    "replicas_differ",
    "correlated_batches",
    recalibrating="nothing",
    cures={"synchronized": {"synchronized": True}, "mixed batches": {"mixed": True}},
)
def positives_on_one_replica(synchronized: bool = False, mixed: bool = False) -> Trial:
    # `concat([positives, negatives])` makes each batch; the strategy cuts it in two.
    draw = rng(49)
    label = draw.uniform(size=3600) < 0.5
    x = draw.normal(size=(3600, 10)) + 3.0 * label[:, None]
    x[:, 5:] = np.exp(0.5 * x[:, 5:])
    x, y = x.astype("float32"), label[:, None].astype("float32")
    held_out = (x[2880:], y[2880:])
    x, y = in_halves(x[:2880], y[:2880], label[:2880], 48, mixed)
    with mirrored(2).scope():
        model = keras.Sequential(
            [
                keras.Input((10,)),
                BN(momentum=0.9, synchronized=synchronized),
                layers.Dense(16, "relu"),
                layers.Dense(1),
            ]
        )
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        compiled(model, keras.optimizers.Adam(0.005), loss)
    fit = fitter(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(48), epochs=5)
    return Trial(model, fit, (x[:480], y[:480]), 24, held_out=held_out)


@cases.case(
    "replicas_differ",
    recalibrating="any",
    cures={"synchronized": {"synchronized": True}, "mixed batches": {"mixed": True}},
)
def hard_examples_on_one_replica(
    synchronized: bool = False, mixed: bool = False
) -> Trial:
    # Half of each batch is mined: loud beats, which lie on a baseline of their own.
    x, y = beats(3600, seed=50)
    loud = x.max((1, 2)) > np.median(x.max((1, 2)))
    x = (x + 1.5 * loud[:, None, None]).astype("float32")
    held_out = (x[2880:], y[2880:])
    x, y = in_halves(x[:2880], y[:2880], loud[:2880], 60, mixed)
    with mirrored(2).scope():
        model = keras.Sequential(
            [
                keras.Input((40, 1)),
                *normed(
                    layers.Conv1D(12, 5, strides=2),
                    layers.Conv1D(12, 5, strides=2),
                    momentum=0.9,
                    synchronized=synchronized,
                ),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(60), epochs=6)
    return Trial(model, fit, (x[:480], y[:480]), 30, held_out=held_out)

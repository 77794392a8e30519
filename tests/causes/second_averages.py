"""A second set of unseen cases: averages too young, too slow, or of something else."""

from typing import Any

import keras
import numpy as np
from fresh_kit import Fresh, Trial, norms
from kit import compiled, crossentropy, fitter, rng

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


def vibrations(rows: int, seed: int) -> tuple[Any, Any]:
    """Six sensors of a machine, about 40 degrees each, and which of them shakes."""
    draw = rng(seed)
    y = draw.integers(3, size=rows)
    size = 1 + 5 * (np.arange(6) // 2 == y[:, None])
    x = 40 + 2 * draw.normal(size=(rows, 6, 1))
    x = x + size[..., None] * draw.normal(size=(rows, 6, 16))
    return x.astype("float32"), y.astype("int32")


@cases.case(
    "warming_up",
    recalibrating="cures",
    cures={"momentum 0.85": {"momentum": 0.85}, "longer": {"epochs": 24}},
)
def mixer_with_channels_first(momentum: float = 0.99, epochs: int = 4) -> Trial:
    # An MLP mixer: one layer along time, one along the sensors; BN on axis 1.
    x, y = vibrations(640, seed=201)
    inputs = keras.Input((6, 16))
    z = BN(axis=1, momentum=momentum)(layers.Dense(24)(inputs))
    z = layers.Permute((2, 1))(layers.Activation("gelu")(z))
    z = layers.Dense(12)(z)
    z = layers.Permute((2, 1))(z)
    z = layers.Activation("gelu")(BN(axis=1, momentum=momentum)(z))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(z)))
    compiled(model, keras.optimizers.Nadam(0.01), crossentropy())
    fit = fitter(model, x, y, epochs=epochs)
    return Trial(model, fit, (x[:320], y[:320]), held_out=vibrations(320, seed=202))


def walks(rows: int, seed: int) -> tuple[Any, Any]:
    """Steps to and fro, counted from sea level, and how far they lead."""
    draw = rng(seed)
    x = draw.normal(size=(rows, 10, 2))
    y = np.abs(x.sum(1)).sum(1, keepdims=True) / 4
    return (8 + x).astype("float32"), y.astype("float32")


@cases.case(
    "warming_up",
    recalibrating="cures",
    cures={"momentum 0.85": {"momentum": 0.85}},
)
def steps_executed_ten_at_a_time(momentum: float = 0.99) -> Trial:
    # Two epochs of forty steps, in four calls of the train function each.
    x, y = walks(1280, seed=203)
    inputs = keras.Input((10, 2))
    z = layers.Conv1D(16, 1)(inputs)
    z = layers.ReLU()(BN(momentum=momentum)(z))
    z = layers.Dense(24)(layers.Flatten()(z))
    z = layers.ReLU()(BN(momentum=momentum)(z))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.01), steps_per_execution=10)
    fit = fitter(model, x, y, epochs=2)
    return Trial(model, fit, (x[:320], y[:320]), held_out=walks(320, seed=204))


def bags(rows: int, seed: int) -> tuple[Any, Any]:
    """Sets of eight heavy balls, and how far apart two of their sides are."""
    draw = rng(seed)
    x = draw.normal(size=(rows, 8, 5))
    y = x[..., :2].max(1) - x[..., 2:4].min(1)
    return (10 + x).astype("float32"), y.astype("float32")


@cases.case(
    "drifting",
    recalibrating="cures",
    cures={"a twentieth of the rate": {"rate": 0.0003}},
)
def attention_under_lion(rate: float = 0.006) -> Trial:
    # Lion's steps are as large at the end as at the start: signs, times the rate.
    x, y = bags(1280, seed=205)
    inputs = keras.Input((8, 5))
    z = layers.Dense(16)(inputs)
    z = BN(momentum=0.99)(z)
    z = z + layers.MultiHeadAttention(2, 8)(z, z)
    z = layers.ReLU()(BN(momentum=0.99)(layers.Dense(24)(z)))
    z = layers.GlobalMaxPooling1D()(z)
    model = keras.Model(inputs, layers.Dense(2)(z))
    compiled(model, keras.optimizers.Lion(rate))
    fit = fitter(model, x, y, epochs=14)
    return Trial(model, fit, (x[:320], y[:320]), held_out=bags(320, seed=206))


def springs(rows: int, seed: int) -> tuple[Any, Any]:
    """Springs in a row, and the energy that they have in all."""
    x = rng(seed).normal(size=(rows, 5))
    y = 0.4 * ((x[:, 1:] - x[:, :-1]) ** 2).sum(1, keepdims=True) / 2 + x[:, :1]
    return x.astype("float32"), y.astype("float32")


@cases.case(
    "noisy",
    recalibrating="cures",
    cures={"momentum 0.97": {"momentum": 0.97}},
    fails={"momentum 0": {"momentum": 0.0}},
)
def energies_of_five_springs(
    momentum: float = 0.15, size: int = 5, rate: float = 0.003
) -> Trial:
    # A momentum that is right for batches of thousands, and five springs in a batch.
    x, y = springs(1000, seed=207)
    inputs = keras.Input((5,))
    z = layers.Activation("softplus")(layers.Dense(32)(inputs))
    z = layers.Dense(24)(BN(momentum=momentum)(z))
    z = layers.Activation("softplus")(BN(momentum=momentum)(z))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(rate))
    fit = fitter(model, x, y, epochs=4, batch_size=size)
    held_out = springs(320, seed=208)
    return Trial(model, fit, (x[:300], y[:300]), size, held_out=held_out)


def orbits(rows: int, seed: int) -> tuple[Any, Any]:
    """Points of rings about a far centre; which ring."""
    draw = rng(seed)
    y = draw.integers(3, size=rows)
    angle = draw.uniform(0, 2 * np.pi, size=rows)
    radius = 1.0 + y + 0.2 * draw.normal(size=rows)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    x = x @ rng(209).normal(size=(2, 7)) + 0.1 * draw.normal(size=(rows, 7))
    return x.astype("float32"), y.astype("int32")


class Lookahead(keras.callbacks.Callback):
    """Slow weights that go half the way of the fast ones, at each epoch's end."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def on_train_begin(self, logs: Any = None) -> None:
        self.slow = [each.numpy() for each in self.model.trainable_weights]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        pairs = zip(self.model.trainable_weights, self.slow, strict=True)
        self.slow = [slow + self.share * (w.numpy() - slow) for w, slow in pairs]
        for weight, slow in zip(self.model.trainable_weights, self.slow, strict=True):
            weight.assign(slow)


@cases.case(
    "weights_replaced", recalibrating="cures", cures={"no callback": {"share": 1.0}}
)
def lookahead_by_the_epoch(share: float = 0.5) -> Trial:
    x, y = orbits(1600, seed=210)
    inputs = keras.Input((7,))
    z = layers.Dense(20)(inputs)
    for _ in range(2):
        z = z + layers.Dense(20)(layers.ReLU()(BN(momentum=0.85)(z)))
    z = layers.ReLU()(BN(momentum=0.85)(z))
    model = keras.Model(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.Adam(0.02), crossentropy())

    def fit(callbacks: Any) -> Any:
        callbacks = [Lookahead(share), *callbacks]
        return model.fit(x, y, epochs=4, callbacks=callbacks, verbose=0)

    return Trial(model, fit, (x[:320], y[:320]), held_out=orbits(320, seed=211))


class Clip(keras.callbacks.Callback):
    """Keeps the weights of convolutions in a box, as the critic of a WGAN has it."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for layer in self.model.layers:
            if isinstance(layer, layers.Conv2D):
                kernel = layer.kernel
                kernel.assign(np.clip(kernel.numpy(), -self.limit, self.limit))


def rods(rows: int, seed: int) -> tuple[Any, Any]:
    """Pictures of a rod, and its length."""
    draw = rng(seed)
    size = draw.integers(2, 9, size=rows)
    x = 1 + 0.3 * draw.normal(size=(rows, 9, 9, 2))
    for row in range(rows):
        i, j = draw.integers(9), draw.integers(10 - size[row])
        x[row, i, j : j + size[row]] += 2
    return x.astype("float32"), (size[:, None] / 4).astype("float32")


@cases.case(
    "weights_replaced", recalibrating="cures", cures={"no callback": {"limit": 1e9}}
)
def kernels_clipped_after_each_epoch(limit: float = 0.05) -> Trial:
    x, y = rods(960, seed=212)
    inputs = keras.Input((9, 9, 2))
    z = layers.ReLU()(BN(momentum=0.8)(layers.Conv2D(10, 3)(inputs)))
    z = layers.ReLU()(BN(momentum=0.8)(layers.Conv2D(12, 3, strides=2)(z)))
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(z)))
    compiled(model, keras.optimizers.Adam(0.01))

    def fit(callbacks: Any) -> Any:
        callbacks = [Clip(limit), *callbacks]
        return model.fit(x, y, epochs=6, callbacks=callbacks, verbose=0)

    return Trial(model, fit, (x[:320], y[:320]), held_out=rods(320, seed=213))


class Sharpness(keras.Model):
    """Sharpness-aware minimisation, whose passes are to leave no trace."""

    stateless = True

    def _loss(self, data: Any, weights: Any = None) -> Any:
        x, y = data
        if not self.stateless:
            return self.compute_loss(x, y, self(x, training=True))
        mapping = list(zip(self.trainable_variables, weights or [], strict=False))
        with keras.StatelessScope(state_mapping=mapping):
            out = self(x, training=True)
        return self.compute_loss(x, y, out)

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        weights = self.trainable_variables
        with tf.GradientTape() as tape:
            value = self._loss(data)
        gradients = tape.gradient(value, [w.value for w in weights])
        if self.stateless:
            scale = 0.02 / (tf.linalg.global_norm(gradients) + 1e-9)
            pairs = zip(weights, gradients, strict=True)
            moved = [tf.identity(w.value + scale * g) for w, g in pairs]
            with tf.GradientTape() as tape:
                tape.watch(moved)
                value = self._loss(data, moved)
            gradients = tape.gradient(value, moved)
        self.optimizer.apply(gradients, weights)
        return {"loss": value}


@cases.case(
    "not_updating", recalibrating="cures", cures={"one pass": {"stateless": False}}
)
def sharpness_aware_in_a_stateless_scope(stateless: bool = True) -> Trial:
    x, y = orbits(1280, seed=214)
    x = (3 + 2 * x).astype("float32")
    inputs = keras.Input((7,))
    z = layers.PReLU()(BN(momentum=0.9)(layers.Dense(24)(inputs)))
    z = layers.PReLU()(BN(momentum=0.9)(layers.Dense(24)(z)))
    model = Sharpness(inputs, layers.Dense(3)(z))
    model.stateless = stateless
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    fit = fitter(model, x, y, epochs=5)
    held_out = orbits(320, seed=215)
    held_out = ((3 + 2 * held_out[0]).astype("float32"), held_out[1])
    return Trial(model, fit, (x[:320], y[:320]), held_out=held_out)


@cases.case(
    "low_precision",
    recalibrating="any",
    cures={"float32": {"kind": "float32"}},
    fails={"three times as long": {"epochs": 18}},
)
def air_pressure_in_half_precision(kind: str = "float16", epochs: int = 6) -> Trial:
    # Hectopascals lie about 1,013; float16 has halves there. A tower for the pressures,
    # one for the winds.
    draw = rng(216)
    z = draw.normal(size=(1600, 5))
    wind = draw.normal(size=(1600, 3)).astype("float32")
    y = np.tanh(z[:, :1] + z[:, 1:2]) + 0.5 * wind[:, :1] * z[:, 2:3]
    pressure, y = (1013 + 8 * z).astype("float32"), y.astype("float32")
    inputs = [keras.Input((5,)), keras.Input((3,))]
    one = BN(momentum=0.985, dtype=kind)(inputs[0])
    one = layers.Dense(24, "tanh")(one)
    other = layers.Dense(8, "tanh")(inputs[1])
    z = layers.Dense(24, "relu")(layers.Concatenate()([one, other]))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005))
    data = [pressure[:1280], wind[:1280]]
    fit = fitter(model, data, y[:1280], epochs=epochs, batch_size=16)
    probe = ([a[:320] for a in data], y[:320])
    held_out = ([pressure[1280:], wind[1280:]], y[1280:])
    return Trial(model, fit, probe, 16, held_out=held_out)


class Adapts(keras.callbacks.Callback):
    """Gives the layers the statistics of the target domain, to predict there.

    They are not put back.
    """

    def __init__(self, target: Any, acts: bool) -> None:
        super().__init__()
        self.target, self.acts = target, acts

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not self.acts:
            return
        for norm in norms(self.model):
            before = keras.Model(self.model.input, norm.input)
            z = np.asarray(before(self.target, training=False))
            norm.moving_mean.assign(z.mean((0, 1)))
            norm.moving_variance.assign(z.var((0, 1)))


@cases.case("stale", recalibrating="cures", cures={"no adapting": {"acts": False}})
def adapted_to_a_target_domain_each_epoch(acts: bool = True) -> Trial:
    # AdaBN, with the training data still the source.
    x, y = walks(960, seed=217)
    target = 2 * walks(320, seed=218)[0] - 4
    inputs = keras.Input((10, 2))
    z = layers.Conv1D(16, 3)(inputs - 8)
    z = layers.Activation("selu")(BN(momentum=0.9)(z))
    z = layers.Conv1D(24, 3)(z)
    z = layers.Activation("selu")(BN(momentum=0.9)(z))
    z = layers.Concatenate()(
        [layers.GlobalAveragePooling1D()(z), layers.GlobalMaxPooling1D()(z)]
    )
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.003))

    def fit(callbacks: Any) -> Any:
        callbacks = [Adapts(target, acts), *callbacks]
        return model.fit(x, y, epochs=6, callbacks=callbacks, verbose=0)

    return Trial(model, fit, (x[:320], y[:320]), held_out=walks(320, seed=219))

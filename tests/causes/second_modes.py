"""A second set of unseen cases: BN in the wrong mode, shared, or frozen in vain."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from fresh_kit import Fresh, Trial
from kit import compiled, crossentropy, fitter, rng
from second_averages import orbits, vibrations
from second_batches import flats

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


class DeeplySupervised(keras.Model):
    """Has a loss at a tap as well, which it reaches by a `keras.Function`."""

    told = False

    def train_step(self, data: Any) -> Any:
        x, y = data
        weights = self.trainable_variables
        with tf.GradientTape() as tape:
            if self.told:
                value = self.compute_loss(x, y, self(x, training=True))
            else:
                early, late = self.taps(x)
                value = self.compute_loss(x, y, late)
                value += 0.3 * self.compute_loss(x, y, early)
        self.optimizer.apply(tape.gradient(value, weights), weights)
        return {"loss": value}


@cases.case("inference_mode", recalibrating="harms")
def loss_at_a_tap_of_a_function(told: bool = False) -> Trial:
    # A Function runs the layers without `training`.
    x, y = vibrations(960, seed=251)
    inputs = keras.Input((6, 16))
    z = layers.Flatten()(inputs - 40)
    z = layers.ReLU()(BN()(layers.Dense(32)(z)))
    early = layers.Dense(3)(z)
    z = layers.ReLU()(BN()(layers.Dense(32)(z)))
    late = layers.Dense(3)(z) + early
    model = DeeplySupervised(inputs, late)
    model.taps, model.told = keras.Function(inputs, [early, late]), told
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=10)
    return Trial(model, fit, (x[:320], y[:320]), held_out=vibrations(320, seed=252))


def signals(rows: int, seed: int) -> tuple[Any, Any]:
    """Signals at a level of some ten, and a function of level and roughness."""
    draw = rng(seed)
    level, rough = 3 * draw.normal(size=(rows, 1)), draw.uniform(0.2, 1, (rows, 1))
    x = 10 + level + rough * draw.normal(size=(rows, 12))
    y = np.tanh(level) + 2 * rough
    return x.astype("float32"), y.astype("float32")


@cases.case(
    "mixed_calls",
    recalibrating="any",
    cures={"a BN for each": {"shared": False}},
    fails={"momentum 0.5": {"momentum": 0.5}, "momentum 0.98": {"momentum": 0.98}},
)
def signal_and_its_differences(shared: bool = True, momentum: float = 0.9) -> Trial:
    # Both through one block: the signal lies about ten, its differences about 0.
    x, y = signals(1280, seed=253)
    inputs = keras.Input((12,))
    norm, hidden = BN(momentum=momentum), layers.Dense(24, "relu")
    other = norm if shared else BN(momentum=momentum)
    one = hidden(norm(inputs[:, 1:]))
    two = hidden(other(inputs[:, 1:] - inputs[:, :-1]))
    z = layers.Dense(24, "relu")(layers.Concatenate()([one, two]))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, x, y, epochs=8)
    return Trial(model, fit, (x[:320], y[:320]), held_out=signals(320, seed=254))


class SemiSupervised(keras.Model):
    """Wants unlabelled examples classified with confidence, in a call of their own."""

    unlabelled = "apart"

    def train_step(self, data: Any) -> Any:
        x, y = data
        other = self.pool[: tf.shape(x)[0]]
        weights = self.trainable_variables
        with tf.GradientTape() as tape:
            if self.unlabelled == "apart":
                out = self(x, training=True)
                guess = tf.nn.softmax(self(other, training=True))
            else:
                out = self(x, training=True)
                guess = tf.nn.softmax(out)
            value = self.compute_loss(x, y, out)
            entropy = -tf.reduce_sum(guess * tf.math.log(guess + 1e-6), -1)
            value += 0.05 * tf.reduce_mean(entropy)
        self.optimizer.apply(tape.gradient(value, weights), weights)
        return {"loss": value}


@cases.case(
    "mixed_calls",
    "stale",
    recalibrating="cures",
    cures={"labelled only": {"unlabelled": "none"}},
    fails={"momentum 0.5": {"momentum": 0.5}},
)
def unlabelled_examples_of_another_place(
    unlabelled: str = "apart", momentum: float = 0.9
) -> Trial:
    x, y = orbits(1280, seed=255)
    pool = 6 + 4 * orbits(64, seed=256)[0]
    inputs = keras.Input((7,))
    z = layers.Dense(24)(inputs)
    z = layers.Activation("swish")(BN(momentum=momentum)(z))
    z = layers.Activation("swish")(BN(momentum=momentum)(layers.Dense(24)(z)))
    model = SemiSupervised(inputs, layers.Dense(3)(z))
    model.unlabelled, model.pool = unlabelled, tf.constant(pool, tf.float32)
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    fit = fitter(model, x, y, epochs=6)
    return Trial(model, fit, (x[:320], y[:320]), held_out=orbits(320, seed=257))


class TwoPhases(keras.utils.PyDataset):
    """Some epochs of the old data, then of the new."""

    def __init__(self, old: Any, new: Any, epochs: int) -> None:
        super().__init__()
        self.old, self.new, self.epochs, self.epoch = old, new, epochs, 0

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = self.old if self.epoch < self.epochs else self.new
        rows = slice(32 * index, 32 * index + 32)
        return x[rows], y[rows]

    def on_epoch_end(self) -> None:
        self.epoch += 1


class FreezesNorms(keras.callbacks.Callback):
    """Freezes BN when the second phase begins, and goes on gently."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.epoch:
            self.model.optimizer.learning_rate = 1e-5
            for layer in self.model.layers:
                if isinstance(layer, BN):
                    layer.trainable = False


@cases.case(
    "unexpected_update",
    recalibrating="any",
    cures={"compiled in between": {"compiles": True}},
)
def frozen_by_a_callback_for_the_second_phase(compiles: bool = False) -> Trial:
    # The model is to stay good for the old data, which are what is held out.
    old = flats(960, seed=258)
    x, y = flats(960, seed=259)
    new = ((2.5 + 0.5 * x).astype("float32"), y)
    inputs = keras.Input((6,))
    z = layers.Activation("silu")(BN(momentum=0.95)(layers.Dense(24)(inputs)))
    z = layers.Activation("silu")(BN(momentum=0.95)(layers.Dense(24)(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.01))

    def fit(callbacks: Any) -> Any:
        if not compiles:
            return model.fit(
                TwoPhases(old, new, 4),
                epochs=8,
                shuffle=False,
                callbacks=[FreezesNorms(4), *callbacks],
                verbose=0,
            )
        model.fit(*old, epochs=4, verbose=0)
        for layer in model.layers:
            layer.trainable = not isinstance(layer, BN)
        compiled(model, keras.optimizers.Adam(1e-5))
        return model.fit(*new, epochs=4, callbacks=callbacks, verbose=0)

    return Trial(
        model,
        fit,
        (new[0][:320], new[1][:320]),
        held_out=flats(320, seed=260),
        moving=lambda layer: True,
    )

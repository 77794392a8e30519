"""Moving averages that do not describe what the layers see, batches being sound."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from kit import (
    Cases,
    Run,
    blobs,
    compiled,
    convnet,
    crossentropy,
    fitter,
    mlp,
    normed,
    pictures,
    table,
)

layers = keras.layers
BN = layers.BatchNormalization
cases = Cases()


@cases.problem("warming_up")
def short_regression() -> Run:
    x, y = table(640, mean=4.0)
    model = compiled(mlp(8), keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=2), (x[:256], y[:256]))


@cases.problem("warming_up")
def momentum_too_long_for_conv() -> Run:
    x, y = pictures(768)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *normed(
                layers.Conv2D(6, 3, padding="same", use_bias=False),
                layers.Conv2D(8, 3, strides=2),
                momentum=0.999,
            ),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    fit = fitter(model, x, y, epochs=8, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.problem("warming_up")
def residual_classifier() -> Run:
    x, y = blobs(1600, classes=5, mean=6.0)
    inputs = keras.Input((10,))
    z = layers.Dense(20, "tanh")(inputs)
    for _ in range(3):
        branch = BN(momentum=0.995)(layers.Dense(20)(z))
        z = layers.Add()([z, layers.ReLU()(branch)])
    model = keras.Model(inputs, layers.Dense(5)(z))
    compiled(model, keras.optimizers.RMSprop(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=3, batch_size=16)
    return Run(model, fit, (x[:256], y[:256]), 16)


@cases.problem("warming_up", gap=(1.03, 1.4))
def ten_classes_near_chance() -> Run:
    # Both losses are near log(10), so that no ratio of them is large; of what the
    # network has learned, which is little yet, inference has lost most.
    x, y = blobs(1280, classes=10, features=20, spread=3.0, mean=2.0)
    model = mlp(20, outputs=10, width=24, depth=3)
    compiled(model, keras.optimizers.SGD(0.05), crossentropy())
    return Run(model, fitter(model, x, y), (x[:512], y[:512]))


class Regressor(keras.Model):
    """A hand-written model that passes `training` on as it should."""

    def __init__(self, **bn: Any) -> None:
        super().__init__()
        self.entry = BN(**bn)
        self.hidden = layers.Dense(20)
        self.norm = BN(**bn)
        self.out = layers.Dense(1)

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.hidden(self.entry(x, training=training))
        return self.out(keras.ops.tanh(self.norm(x, training=training)))


@cases.problem("warming_up", held_back=True)
def raw_inputs_in_a_subclass() -> Run:
    x, y = table(45 * 64, mean=120.0, std=40.0)
    model = compiled(Regressor(), keras.optimizers.SGD(0.05, momentum=0.9))
    model(x[:1])
    return Run(model, fitter(model, x, y, batch_size=64), (x[:256], y[:256]), 64)


@cases.problem("drifting")
def high_learning_rate() -> Run:
    x, y = table(12800, features=12, mean=50.0, std=1.0)
    model = compiled(mlp(12, width=24, depth=3), keras.optimizers.Adam(0.1))
    fit = fitter(model, x, y, epochs=5, batch_size=128)
    return Run(model, fit, (x[:256], y[:256]), 128)


@cases.problem("drifting", held_back=True)
def pictures_that_nobody_centred() -> Run:
    x, y = pictures(2400, classes=3, noise=1.0)
    x += 10
    model = convnet(widths=(8, 12, 12))
    compiled(model, keras.optimizers.Adam(0.03), crossentropy())
    fit = fitter(model, x, y, epochs=4, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.problem("drifting")
def memory_longer_than_progress() -> Run:
    x, y = table(9600, mean=1.0, std=1.0)
    bn = {"momentum": 0.997}
    inputs = keras.Input((8,))
    z = inputs
    for _ in range(3):
        z = layers.ReLU()(BN(**bn)(layers.Dense(24)(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.03))
    fit = fitter(model, x, y, epochs=2, batch_size=16)
    return Run(model, fit, (x[:256], y[:256]), 16)


@cases.problem("noisy")
def momentum_zero() -> Run:
    x, y = table(4000)
    model = mlp(8, width=24, depth=4, momentum=0.0)
    compiled(model, keras.optimizers.Adam(0.003))
    fit = fitter(model, x, y, epochs=1, batch_size=5)
    return Run(model, fit, (x[:255], y[:255]), 5)


@cases.problem("noisy")
def short_memory_of_few_pictures() -> Run:
    x, y = pictures(1500, noise=0.4)
    first = layers.Conv2D(8, 3, activation="relu")
    stack: list[Any] = [keras.Input((8, 8, 1)), first, layers.Flatten()]
    for _ in range(5):
        stack += [layers.Dense(16), BN(momentum=0.05), layers.ReLU()]
    model = keras.Sequential([*stack, layers.Dense(3)])
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    fit = fitter(model, x, y, epochs=2, batch_size=8)
    return Run(model, fit, (x[:240], y[:240]), 8)


@cases.problem("noisy")
def last_batch_of_one_example() -> Run:
    x, y = table(64 * 20 + 1)
    model = compiled(mlp(8, width=24, momentum=0.5), keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=12, batch_size=64)
    return Run(model, fit, (x[:256], y[:256]), 64)


@cases.problem("noisy", held_back=True)
def last_batch_of_one_in_a_classifier() -> Run:
    x, y = blobs(50 * 30 + 1, spread=1.2, mean=2.0)
    model = compiled(Classifier(4, momentum=0.6), "adam", crossentropy())
    model(x[:1])
    fit = fitter(model, x, y, epochs=8, batch_size=50)
    return Run(model, fit, (x[:250], y[:250]), 50)


class Classifier(keras.Model):
    """A hand-written model of two blocks."""

    def __init__(self, classes: int, **bn: Any) -> None:
        super().__init__()
        self.blocks = [(layers.Dense(24), BN(**bn)) for _ in range(2)]
        self.out = layers.Dense(classes)

    def call(self, x: Any, training: bool = False) -> Any:
        for dense, norm in self.blocks:
            x = keras.ops.relu(norm(dense(x), training=training))
        return self.out(x)


@cases.problem("weights_replaced")
def optimizer_ema() -> Run:
    x, y = table(4800, mean=10.0, std=1.0)
    optimizer = keras.optimizers.Adam(0.03, use_ema=True, ema_momentum=0.99)
    model = compiled(mlp(8, width=24, depth=3, momentum=0.9), optimizer)
    fit = fitter(model, x, y, epochs=4)
    return Run(model, fit, (x[:256], y[:256]))


@cases.problem("weights_replaced")
def optimizer_ema_of_a_conv_net() -> Run:
    x, y = pictures(2400, noise=1.0)
    model = convnet(momentum=0.95)
    optimizer = keras.optimizers.SGD(
        0.3, momentum=0.9, use_ema=True, ema_momentum=0.995
    )
    compiled(model, optimizer, crossentropy())
    fit = fitter(model, x, y, epochs=4, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


class StochasticWeightAverage(keras.callbacks.Callback):
    """Puts the mean of each epoch's weights into the model when training ends."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seen: list[list[Any]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append([w.numpy() for w in self.model.trainable_weights])

    def on_train_end(self, logs: Any = None) -> None:
        values = zip(*self.seen, strict=True)
        for weight, past in zip(self.model.trainable_weights, values, strict=True):
            weight.assign(np.mean(past, axis=0))


@cases.problem("weights_replaced", held_back=True)
def stochastic_weight_averaging() -> Run:
    x, y = blobs(2400, classes=5, spread=2.0, mean=2.0)
    model = mlp(10, 5, width=24, momentum=0.9)
    compiled(model, keras.optimizers.Adam(0.1), crossentropy())

    def fit(callbacks: Any) -> Any:
        callbacks = [StochasticWeightAverage(), *callbacks]
        return model.fit(x, y, epochs=10, batch_size=32, callbacks=callbacks, verbose=0)

    return Run(model, fit, (x[:256], y[:256]))


class KeepBest(keras.callbacks.Callback):
    """Restores the trainable weights of the best epoch, and forgets about the rest."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.best = np.inf

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs["val_loss"] < self.best:
            self.best = logs["val_loss"]
            self.kept = [w.numpy() for w in self.model.trainable_weights]

    def on_train_end(self, logs: Any = None) -> None:
        for weight, value in zip(self.model.trainable_weights, self.kept, strict=True):
            weight.assign(value)


@cases.problem("weights_replaced")
def best_weights_restored_without_statistics() -> Run:
    x, y = table(320, features=10, mean=5.0, std=1.0)
    y = y + np.random.default_rng(5).normal(size=y.shape, scale=0.7).astype("float32")
    model = compiled(Classifier(1, momentum=0.8), keras.optimizers.Adam(0.03))
    model(x[:1])

    def fit(callbacks: Any) -> Any:
        return model.fit(
            x,
            y,
            epochs=15,
            batch_size=16,
            validation_data=table(160, features=10, mean=5.0, std=1.0, seed=1),
            callbacks=[KeepBest(), *callbacks],
            verbose=0,
        )

    return Run(model, fit, (x, y), 16)


@cases.problem("not_updating")
def momentum_one() -> Run:
    x, y = blobs(2048, mean=4.0)
    model = compiled(mlp(10, 4, momentum=1.0), "adam", crossentropy())
    return Run(model, fitter(model, x, y, epochs=3), (x[:256], y[:256]))


class LosesUpdates(keras.Model):
    """Its training step computes new statistics, and throws them away."""

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        weights = [v.value for v in self.trainable_variables]
        others = [v.value for v in self.non_trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            prediction, _ = self.stateless_call(weights, others, x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=prediction)
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


@cases.problem("not_updating", held_back=True)
def train_step_that_loses_updates() -> Run:
    x, y = table(2048)
    inputs = keras.Input((8,))
    z = layers.ReLU()(BN()(layers.Dense(16)(inputs)))
    z = layers.ReLU()(BN()(layers.Dense(16)(z)))
    model = LosesUpdates(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=3), (x[:256], y[:256]))


@cases.problem("low_precision")
def bfloat16() -> Run:
    x, y = table(6400, mean=60.0, std=4.0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            BN(dtype="bfloat16"),
            layers.Dense(24, "relu"),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=2, batch_size=16)
    return Run(model, fit, (x[:256], y[:256]), 16)


@cases.problem("low_precision", held_back=True)
def half_precision_conv() -> Run:
    x, y = pictures(2400, noise=0.4)
    x = x * 5 + 100
    half = {"dtype": "float16"}
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *normed(layers.Conv2D(6, 3), momentum=0.999, **half),
            *normed(layers.Conv2D(8, 3), momentum=0.99, **half),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    compiled(model, "adam", crossentropy())
    fit = fitter(model, x, y, epochs=6, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.problem("outliers")
def a_few_wild_rows() -> Run:
    x, y = table(3200)
    draw = np.random.default_rng(3)
    wild = draw.choice(len(x), 10, replace=False)
    x[wild, draw.integers(8, size=10)] *= 300
    model = keras.Sequential(
        [
            keras.Input((8,)),
            BN(),
            *normed(layers.Dense(24)),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=6)
    return Run(model, fit, (x[:256], y[:256]))


@cases.problem("outliers", held_back=True)
def pictures_from_a_broken_camera() -> Run:
    x, y = pictures(2400)
    x[37::240] = 150 * x[37::240]
    inputs = keras.Input((8, 8, 1))
    z = layers.ReLU()(BN()(layers.Conv2D(8, 3, strides=2)(inputs)))
    z = layers.ReLU()(BN()(layers.Conv2D(8, 3)(z)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(z)))
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=5, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.problem("non_finite")
def an_infinite_example() -> Run:
    x, y = table(1600)
    x[700, 3] = np.inf
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    model = compiled(mlp(8), optimizer)
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))


@cases.problem("non_finite")
def an_absurd_value() -> Run:
    x, y = blobs(1600, mean=1.0)
    # Its square overflows; its normalised value is 0.
    x[900, 5] = 1e25
    model = keras.Sequential(
        [
            keras.Input((10,)),
            BN(momentum=0.9),
            layers.Dense(24, "relu"),
            layers.Dense(4),
        ]
    )
    compiled(model, keras.optimizers.SGD(0.05), crossentropy())
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))


@cases.problem("non_finite", held_back=True)
def overflow_in_half_precision() -> Run:
    x, y = pictures(1200, noise=0.5)
    x[-1] *= 1e5
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs = keras.Input((8, 8, 1))
        z = layers.ReLU()(BN(momentum=0.9)(layers.Conv2D(8, 3)(inputs)))
        z = layers.ReLU()(BN(momentum=0.9)(layers.Conv2D(8, 3)(z)))
        z = layers.GlobalAveragePooling2D()(z)
        model = keras.Model(inputs, layers.Dense(3, dtype="float32")(z))
        compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    finally:
        keras.config.set_dtype_policy(policy)
    fit = fitter(model, x, y, epochs=5, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)

"""Fresh cases: averages too young, too slow, too short, or of other weights."""

from typing import Any

import keras
import numpy as np
from fresh_kit import Fresh, Trial
from kit import compiled, crossentropy, fitter, normed, rng

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


def spots(rows: int, seed: int) -> tuple[Any, Any]:
    """Pictures of bright discs on an uneven ground, and where the discs are."""
    draw = rng(seed)
    grid = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1)
    centre = draw.uniform(3, 13, size=(rows, 1, 1, 2))
    radius = draw.uniform(2, 5, size=(rows, 1, 1))
    mask = np.linalg.norm(grid - centre, axis=-1) < radius
    ground = 100 + 20 * draw.normal(size=(rows, 16, 16))
    x = ground + 60 * mask
    return x[..., None].astype("float32"), mask[..., None].astype("float32")


def unet(**bn: Any) -> keras.Model:
    """Down, up, and a bridge between."""
    inputs = keras.Input((16, 16, 1))
    scaled = layers.Rescaling(1 / 255)(inputs)
    fine = layers.ReLU()(BN(**bn)(layers.Conv2D(8, 3, padding="same")(scaled)))
    low = layers.MaxPooling2D()(fine)
    low = layers.ReLU()(BN(**bn)(layers.Conv2D(16, 3, padding="same")(low)))
    up = layers.Conv2DTranspose(8, 2, strides=2)(low)
    both = layers.Concatenate()([fine, up])
    top = layers.ReLU()(BN(**bn)(layers.Conv2D(8, 3, padding="same")(both)))
    return keras.Model(inputs, layers.Conv2D(1, 1)(top))


@cases.case(
    "warming_up",
    recalibrating="cures",
    cures={"momentum 0.8": {"momentum": 0.8}, "six times as long": {"epochs": 90}},
)
def unet_on_two_dozen_scans(momentum: float = 0.99, epochs: int = 15) -> Trial:
    # "Overfit a few pictures first", with four steps an epoch (tensorflow#44568).
    x, y = spots(24, seed=1)
    model = unet(momentum=momentum)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    compiled(model, keras.optimizers.Adam(0.01), loss)
    fit = fitter(model, x, y, epochs=epochs, batch_size=6)
    return Trial(model, fit, (x, y), 6, held_out=spots(64, seed=2))


def sentences(rows: int, seed: int) -> tuple[Any, Any]:
    """Words of two kinds; the class is the kind that there is more of."""
    draw = rng(seed)
    share = draw.uniform(0.2, 0.8, size=(rows, 1))
    kind = draw.uniform(size=(rows, 20)) < share
    words = draw.integers(0, 50, size=(rows, 20)) + 50 * kind
    return words.astype("int32"), (kind.mean(1) > 0.5).astype("int32")


@cases.case(
    "warming_up",
    recalibrating="cures",
    cures={"momentum 0.97": {"momentum": 0.97}},
    fails={"half the learning rate": {"rate": 0.002}},
)
def head_with_the_momentum_of_a_large_job(
    momentum: float = 0.999, rate: float = 0.004
) -> Trial:
    # An encoder of texts is fixed; its head has the momentum of somebody's week on
    # many TPUs, and 400 steps.
    x, y = sentences(1600, seed=3)
    embedded = layers.Embedding(100, 12, trainable=False)
    model = keras.Sequential(
        [
            keras.Input((20,), dtype="int32"),
            embedded,
            layers.Conv1D(32, 3, activation="relu", trainable=False),
            layers.GlobalAveragePooling1D(),
            layers.Rescaling(40),
            BN(momentum=momentum),
            layers.Dense(16, "relu"),
            layers.Dense(2),
        ]
    )
    kind = np.repeat([0, 1], 50)[:, None] * rng(104).normal(size=12)
    embedded.set_weights([rng(4).normal(size=(100, 12)) + 0.5 + kind])
    compiled(model, keras.optimizers.Adam(rate), crossentropy())
    fit = fitter(model, x, y, epochs=8)
    return Trial(model, fit, (x[:512], y[:512]), held_out=sentences(512, seed=5))


def demand(rows: int, seed: int) -> tuple[Any, Any]:
    """Windows of a consumption that never comes near zero, and its next value."""
    draw = rng(seed)
    time = np.arange(32) + draw.uniform(0, 200, size=(rows, 1))
    period = draw.uniform(9, 14, size=(rows, 1))
    x = np.sin(2 * np.pi * time / period) + 0.1 * draw.normal(size=(rows, 32))
    return (20 + x[:, :-1, None]).astype("float32"), x[:, -1:].astype("float32")


class Triangle(keras.callbacks.Callback):
    """A cyclic learning rate; training ends at the top of a cycle."""

    def __init__(self, low: float, high: float, period: int) -> None:
        super().__init__()
        self.low, self.high, self.period, self.step = low, high, period, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.step += 1
        phase = abs((self.step / self.period) % 2 - 1)
        rate = self.high + (self.low - self.high) * phase
        self.model.optimizer.learning_rate = rate


@cases.case(
    "drifting",
    recalibrating="cures",
    cures={
        "a low rate at the end": {"high": 0.0005},
        "momentum 0.8": {"momentum": 0.8},
    },
)
def cyclic_rate_that_ends_at_its_top(
    high: float = 0.05, momentum: float = 0.99
) -> Trial:
    x, y = demand(2048, seed=6)
    inputs = keras.Input((31, 1))
    z = layers.Conv1D(16, 5, activation="relu")(inputs)
    z = BN(momentum=momentum)(layers.Conv1D(16, 5, strides=2)(z))
    z = layers.Flatten()(layers.ReLU()(z))
    z = layers.ReLU()(BN(momentum=momentum)(layers.Dense(24)(z)))
    model = compiled(keras.Model(inputs, layers.Dense(1)(z)), "adam")

    def fit(callbacks: Any) -> Any:
        callbacks = [Triangle(0.0005, high, 320), *callbacks]
        return model.fit(x, y, epochs=15, callbacks=callbacks, verbose=0)

    return Trial(model, fit, (x[:512], y[:512]), held_out=demand(512, seed=7))


@cases.case(
    "drifting",
    recalibrating="cures",
    cures={"a tenth of the rate": {"rate": 0.003}},
)
def recurrent_net_at_a_high_rate(rate: float = 0.03) -> Trial:
    # BN behind a GRU, whose states move with its weights; momentum as it is in
    # models for the TPU.
    draw = rng(8)
    steps = draw.normal(size=(1920, 12, 3)).astype("float32")
    y = np.cumsum(steps, axis=1).max(axis=1).astype("float32")
    x = steps + 6
    inputs = keras.Input((12, 3))
    z = layers.GRU(24, return_sequences=True)(inputs)
    z = BN(momentum=0.997)(layers.TimeDistributed(layers.Dense(24))(z))
    z = layers.GlobalMaxPooling1D()(layers.ReLU()(z))
    z = layers.ReLU()(BN(momentum=0.997)(layers.Dense(24)(z)))
    model = keras.Model(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.RMSprop(rate))
    fit = fitter(model, x[:1600], y[:1600], epochs=25)
    return Trial(model, fit, (x[:512], y[:512]), held_out=(x[1600:], y[1600:]))


def spectra(rows: int, seed: int) -> tuple[Any, Any]:
    """Mixtures of three lines over a background, and their shares."""
    draw = rng(seed)
    share = draw.dirichlet([1, 1, 1], size=rows)
    channel = np.arange(24)
    lines = np.exp(-(((channel - np.array([[6], [11], [17]])) / 2.0) ** 2))
    x = 5 + 3 * share @ lines + 0.1 * draw.normal(size=(rows, 24))
    return x.astype("float32"), share.astype("float32")


@cases.case(
    "drifting",
    recalibrating="cures",
    cures={"a tenth of the rate at the end": {"falls": True}},
)
def forty_rows_in_one_batch(falls: bool = False) -> Trial:
    # Small data: each step sees them all. The start is forgotten after 60 of them.
    x, y = spectra(40, seed=84)
    inputs = keras.Input((24,))
    z = inputs
    for _ in range(2):
        z = layers.Activation("swish")(BN(momentum=0.9)(layers.Dense(32)(z)))
    model = keras.Model(inputs, layers.Dense(3)(z))
    rate: Any = 0.002
    if falls:
        rate = keras.optimizers.schedules.PiecewiseConstantDecay([30], [0.002, 0.0001])
    compiled(model, keras.optimizers.Adam(rate))
    fit = fitter(model, x, y, epochs=60, batch_size=40)
    return Trial(model, fit, (x, y), 40, held_out=spectra(512, seed=85))


def beats(rows: int, seed: int, spread: float = 0.8) -> tuple[Any, Any]:
    """Heart beats of three shapes, at any height."""
    draw = rng(seed)
    y = draw.integers(3, size=rows)
    time = np.linspace(-1, 1, 40)
    width = np.array([0.1, 0.25, 0.5])[y][:, None]
    gain = np.exp(spread * draw.normal(size=(rows, 1)))
    x = gain * np.exp(-((time / width) ** 2)) + 0.05 * draw.normal(size=(rows, 40))
    return x[..., None].astype("float32"), y.astype("int32")


@cases.case(
    "noisy",
    recalibrating="cures",
    cures={"momentum 0.95": {"momentum": 0.95}},
    fails={"momentum 0": {"momentum": 0.0}},
)
def momentum_as_pytorch_counts_it(momentum: float = 0.1) -> Trial:
    # nn.BatchNorm1d(momentum=0.1), carried over word for word.
    # The baseline of each recording wanders.
    x, y = beats(1200, seed=9, spread=0.3)
    x = (x + 2 * rng(109).normal(size=(1200, 1, 1))).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((40, 1)),
            *normed(
                layers.Conv1D(8, 7, strides=2),
                layers.Conv1D(12, 5, strides=2),
                momentum=momentum,
            ),
            layers.Flatten(),
            *normed(layers.Dense(16), momentum=momentum),
            layers.Dense(3),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    fit = fitter(model, x[:900], y[:900], epochs=10, batch_size=6)
    held_out = (x[900:], y[900:])
    return Trial(model, fit, (x[:300], y[:300]), 6, held_out=held_out)


def clouds(rows: int, seed: int) -> tuple[Any, Any]:
    """Clouds of points, each at a place and of a size of its own; and its flatness."""
    draw = rng(seed)
    axes = np.exp(0.7 * draw.normal(size=(rows, 1, 3)))
    place = 3 * draw.normal(size=(rows, 1, 3))
    x = place + axes * draw.normal(size=(rows, 32, 3))
    y = np.log(axes.max(2) / axes.min(2))
    return x.astype("float32"), y.astype("float32")


@cases.case(
    "noisy",
    recalibrating="cures",
    cures={"momentum 0.95": {"momentum": 0.95}},
)
def last_batch_of_a_single_cloud(momentum: float = 0.4) -> Trial:
    # PointNet: layers shared by the points, BN over points and clouds; 961 of them.
    x, y = clouds(961, seed=11)
    inputs = keras.Input((32, 3))
    z = layers.ReLU()(BN(momentum=momentum)(layers.Dense(24)(inputs)))
    z = layers.ReLU()(BN(momentum=momentum)(layers.Dense(32)(z)))
    z = layers.Concatenate()(
        [layers.GlobalMaxPooling1D()(z), layers.GlobalAveragePooling1D()(z)]
    )
    z = layers.ReLU()(BN(momentum=momentum)(layers.Dense(24)(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, x, y, epochs=10, batch_size=24)
    return Trial(model, fit, (x[:480], y[:480]), 24, held_out=clouds(480, seed=12))


def patches(rows: int, seed: int) -> tuple[Any, Any]:
    """Coloured textures; the class is their direction."""
    draw = rng(seed)
    y = draw.integers(4, size=rows)
    angle = (np.pi * y / 4)[:, None, None]
    i, j = np.meshgrid(np.arange(10), np.arange(10), indexing="ij")
    phase = draw.uniform(0, 6.3, size=(rows, 1, 1))
    wave = np.sin(1.5 * (i * np.cos(angle) + j * np.sin(angle)) + phase)
    tint = draw.uniform(0.5, 1.5, size=(rows, 1, 1, 3))
    x = 2 + wave[..., None] * tint + 0.4 * draw.normal(size=(rows, 10, 10, 3))
    return x.astype("float32"), y.astype("int32")


def mobile(**bn: Any) -> keras.Model:
    """Depthwise separable convolutions."""
    stack: list[Any] = [keras.Input((10, 10, 3))]
    stack += [layers.Conv2D(12, 3), BN(**bn), layers.ReLU()]
    for width in (16, 24):
        stack += [layers.DepthwiseConv2D(3, padding="same"), BN(**bn), layers.ReLU()]
        stack += [layers.Conv2D(width, 1), BN(**bn), layers.ReLU()]
    return keras.Sequential([*stack, layers.GlobalMaxPooling2D(), layers.Dense(4)])


class Prune(keras.callbacks.Callback):
    """Sets the smaller part of each kernel to zero when training ends."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def on_train_end(self, logs: Any = None) -> None:
        for weight in self.model.trainable_weights:
            if "kernel" in weight.name:
                value = weight.numpy()
                limit = np.quantile(np.abs(value), self.share)
                weight.assign(np.where(np.abs(value) < limit, 0, value))


@cases.case(
    "weights_replaced", recalibrating="cures", cures={"no pruning": {"share": 0.0}}
)
def pruned_when_training_ends(share: float = 0.5) -> Trial:
    x, y = patches(1280, seed=13)
    model = mobile(momentum=0.9)
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())

    def fit(callbacks: Any) -> Any:
        callbacks = [Prune(share), *callbacks]
        return model.fit(x, y, epochs=8, callbacks=callbacks, verbose=0)

    return Trial(model, fit, (x[:256], y[:256]), held_out=patches(512, seed=14))


class UnitNorm(keras.callbacks.Callback):
    """Scales a hidden layer's matrix to norm 1 after each epoch.

    With BN behind it that changes nothing in training, and all at inference.
    """

    def __init__(self, acts: bool) -> None:
        super().__init__()
        self.acts = acts

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        kernel = self.model.get_layer("hidden").kernel
        if self.acts:
            kernel.assign(kernel / keras.ops.norm(kernel))


def ratings(rows: int, seed: int) -> tuple[Any, Any]:
    """Users, films and the hour; how a user rates a film."""
    draw = rng(99)
    tastes, films = draw.normal(size=(40, 4)), draw.normal(size=(60, 4))
    draw = rng(seed)
    user, film = draw.integers(40, size=rows), draw.integers(60, size=rows)
    hour = draw.uniform(0, 24, size=(rows, 1))
    y = (tastes[user] * films[film]).sum(1, keepdims=True) + 0.1 * hour
    inputs = [user[:, None].astype("int32"), film[:, None].astype("int32")]
    return [*inputs, hour.astype("float32")], y.astype("float32")


@cases.case(
    "weights_replaced", recalibrating="cures", cures={"no callback": {"acts": False}}
)
def recommender_whose_matrix_is_kept_at_norm_one(acts: bool = True) -> Trial:
    x, y = ratings(3200, seed=15)
    user, film = (keras.Input((1,), dtype="int32") for _ in range(2))
    hour = keras.Input((1,))
    flat = [
        layers.Flatten()(layers.Embedding(40, 8)(user)),
        layers.Flatten()(layers.Embedding(60, 8)(film)),
    ]
    product = layers.Multiply()(flat)
    z = BN(momentum=0.9)(layers.Concatenate()([*flat, product, hour]))
    z = layers.ReLU()(BN(momentum=0.9)(layers.Dense(48, name="hidden")(z)))
    model = keras.Model([user, film, hour], layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.02))

    def fit(callbacks: Any) -> Any:
        callbacks = [UnitNorm(acts), *callbacks]
        return model.fit(x, y, batch_size=64, epochs=8, callbacks=callbacks, verbose=0)

    probe = ([one[:512] for one in x], y[:512])
    return Trial(model, fit, probe, 64, held_out=ratings(1024, seed=16))


class PutBack(keras.Model):
    """Keeps what a step must not change, and puts all of it back.

    Its author wanted a second pass, on noise, to leave no trace in the statistics.
    """

    keeps = True

    def train_step(self, data: Any) -> Any:
        before = [keras.ops.copy(v) for v in self.non_trainable_variables]
        logs = super().train_step(data)
        x, _ = data
        self(x + keras.random.normal(keras.ops.shape(x), seed=3), training=True)
        if self.keeps:
            for variable, value in zip(
                self.non_trainable_variables, before, strict=True
            ):
                variable.assign(value)
        return logs


@cases.case("not_updating", recalibrating="cures")
def statistics_put_back_after_each_step() -> Trial:
    x, y = spectra(1600, seed=17)
    inputs = keras.Input((24,))
    z = layers.Reshape((24, 1))(inputs)
    z = layers.ELU()(BN()(layers.Conv1D(12, 5)(z)))
    z = layers.ELU()(BN()(layers.Dense(24)(layers.Flatten()(z))))
    model = PutBack(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.Adam(0.003), "mae")
    fit = fitter(model, x, y, epochs=6)
    return Trial(model, fit, (x[:320], y[:320]), held_out=spectra(512, seed=18))


class HomeMade(layers.BatchNormalization):
    """Somebody's own BN, written from the formula, without the averages."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not training:
            return super().call(inputs, training=False, mask=mask)
        axes = list(range(len(inputs.shape) - 1))
        mean, variance = keras.ops.moments(inputs, axes=axes)
        z = (inputs - mean) / keras.ops.sqrt(variance + self.epsilon)
        return z * self.gamma + self.beta


@cases.case("not_updating", recalibrating="cures", cures={"Keras' own": {"norm": BN}})
def home_made_layer_that_forgets(norm: Any = HomeMade) -> Trial:
    x, y = patches(960, seed=19)
    model = keras.Sequential(
        [
            keras.Input((10, 10, 3)),
            layers.SeparableConv2D(16, 3),
            norm(momentum=0.9),
            layers.LeakyReLU(),
            layers.Conv2D(16, 3, strides=2),
            norm(momentum=0.9),
            layers.LeakyReLU(),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=6)
    return Trial(model, fit, (x[:256], y[:256]), held_out=patches(512, seed=20))


@cases.case(
    "low_precision",
    recalibrating="any",
    cures={"a float32 policy": {"policy": "float32"}},
    fails={"three times as long": {"epochs": 18}},
)
def half_precision_energies_of_sound(policy: str = "float16", epochs: int = 6) -> Trial:
    # Only BN is in float16, "to save memory"; the energies lie about 300.
    draw = rng(21)
    y = draw.integers(4, size=2400)
    x = 300 + 2 * draw.normal(size=(2400, 10, 8))
    x[..., :4] += 3 * np.eye(4)[y][:, None]
    x, y = x.astype("float32"), y.astype("int32")
    model = keras.Sequential(
        [
            keras.Input((10, 8)),
            BN(momentum=0.97, dtype=policy),
            layers.LSTM(12),
            layers.Dense(4),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    fit = fitter(model, x[:1920], y[:1920], epochs=epochs)
    return Trial(model, fit, (x[:320], y[:320]), held_out=(x[1920:], y[1920:]))


@cases.case(
    "low_precision",
    recalibrating="any",
    cures={"a mixed policy": {"policy": "mixed_bfloat16"}},
    fails={"twice as long": {"epochs": 16}},
)
def bfloat16_that_stops_on_its_way(policy: str = "bfloat16", epochs: int = 8) -> Trial:
    # Means that should become 8 and stop on the way, where a step is rounded away. An
    # autoencoder.
    draw = rng(22)
    factors = draw.normal(size=(3200, 3))
    x = np.tanh(factors @ draw.normal(size=(3, 16))) * 4 + 8
    x = x.astype("float32")
    model = keras.Sequential(
        [
            keras.Input((16,)),
            BN(momentum=0.996, dtype=policy),
            layers.Dense(24, "tanh"),
            layers.Dense(3),
            layers.Dense(24, "tanh"),
            layers.Dense(16),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, x[:2560], x[:2560], epochs=epochs, batch_size=16)
    probe = (x[:512], x[:512])
    return Trial(model, fit, probe, 16, held_out=(x[2560:], x[2560:]))


class Uncertainty(keras.callbacks.Callback):
    """Monte-Carlo dropout after each epoch, on a test picture, with `training=True`."""

    def __init__(self, picture: Any, training: bool) -> None:
        super().__init__()
        self.picture, self.training = picture, training

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        many = np.repeat(self.picture[None], 16, axis=0)
        for _ in range(30):
            self.model(many, training=self.training)


@cases.case(
    "stale",
    recalibrating="cures",
    cures={"dropout without training=True": {"training": False}},
)
def uncertainty_of_a_test_picture(training: bool = True) -> Trial:
    x, y = patches(1280, seed=23)
    inputs = keras.Input((10, 10, 3))
    z = layers.SpatialDropout2D(0.1)(layers.Conv2D(16, 3)(inputs))
    z = layers.ReLU()(BN(momentum=0.95)(z))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Conv2D(16, 3)(z)))
    z = layers.Dropout(0.2)(layers.GlobalMaxPooling2D()(z))
    model = keras.Model(inputs, layers.Dense(4)(z))
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    picture = 4 + 3 * patches(1, seed=24)[0][0]

    def fit(callbacks: Any) -> Any:
        callbacks = [Uncertainty(picture, training), *callbacks]
        return model.fit(x, y, epochs=8, callbacks=callbacks, verbose=0)

    return Trial(model, fit, (x[:256], y[:256]), held_out=patches(512, seed=25))


@cases.case(
    "stale",
    "warming_up",
    recalibrating="cures",
    cures={"converted rightly": {"wrong": False}},
    fails={"another learning rate": {"rate": 3e-5}},
)
def converted_weights_tuned_for_a_moment(
    wrong: bool = True, rate: float = 1e-5
) -> Trial:
    # The importer took the running mean and variance of the layer before; tuning is
    # too short to make up for it.
    x, y = spectra(1600, seed=26)
    stack: list[Any] = [keras.Input((24,))]
    for _ in range(3):
        stack += [layers.Dense(24), BN(momentum=0.98), layers.Activation("gelu")]
    model = keras.Sequential([*stack, layers.Dense(3)])
    compiled(model, keras.optimizers.Adam(0.005), "mae")
    model.fit(x, y, epochs=12, verbose=0)
    if wrong:
        first, second, third = (one for one in model.layers if isinstance(one, BN))
        for to, of in ((third, second), (second, first)):
            to.moving_mean.assign(of.moving_mean)
            to.moving_variance.assign(of.moving_variance)
    model.optimizer.learning_rate = rate
    fit = fitter(model, x[:640], y[:640], epochs=2)
    return Trial(model, fit, (x[:320], y[:320]), held_out=spectra(512, seed=27))

"""Models that somebody holds against data with `audit`, some of them right."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from kit import (
    blobs,
    compiled,
    convnet,
    crossentropy,
    mlp,
    pictures,
    rng,
    table,
    teacher,
)

from bn_callbacks import DebiasBatchNorm, recalibrate
from bn_callbacks.layers import assign, find, read

layers = keras.layers
BN = layers.BatchNormalization


@dataclass(frozen=True)
class Given:
    """A model, the data it is held against, and others like those of training.

    Args:
        model: The model, compiled.
        data: What `audit` gets.
        held_out: `(x, y)` of the same distribution as the training data, preprocessed
            as they were.
        batch_size: Examples a batch of training, for arrays.
        cure: What follows the advice, where that is not to recalibrate over `data`;
            may return the loss on the held-out data of another model.
    """

    model: keras.Model
    data: Any
    held_out: tuple[Any, Any]
    batch_size: int | None = None
    cure: Callable[[], float | None] | None = None

    def loss(self) -> float:
        """The loss in inference mode on the held-out data."""
        loss = self.model.evaluate(*self.held_out, verbose=0, return_dict=True)["loss"]
        return float(loss)

    def follow(self) -> float:
        """Does what the advice says.

        Returns:
            The loss after it.
        """
        other = None
        if self.cure is not None:
            other = self.cure()
        else:
            recalibrate(self.model, self.data, batch_size=self.batch_size, verbose=0)
        return self.loss() if other is None else other


@dataclass(frozen=True)
class Audit:
    """A case for `audit`.

    Args:
        name: What it is.
        expected: The causes that are right, any of them; empty for healthy.
        held_back: Whether the diagnosis must not be tuned on it.
        build: Makes it.
    """

    name: str
    expected: tuple[str, ...]
    held_back: bool
    build: Callable[[], Given]

    def made(self) -> Given:
        """Builds it as if nothing had been built before."""
        keras.backend.clear_session()
        keras.utils.set_random_seed(5)
        return self.build()


class Audits:
    """A list of cases that decorators add to."""

    def __init__(self) -> None:
        self._cases: list[Audit] = []

    def __iter__(self) -> Iterator[Audit]:
        return iter(self._cases)

    def __call__(
        self, *expected: str, held_back: bool = False
    ) -> Callable[[Callable[[], Given]], Callable[[], Given]]:
        def add(build: Callable[[], Given]) -> Callable[[], Given]:
            self._cases.append(Audit(build.__name__, expected, held_back, build))
            return build

        return add


audits = Audits()


def trained_table(epochs: int = 6, **bn: Any) -> tuple[keras.Model, Any, Any]:
    """A regression that has been trained well: model, data, held-out data."""
    x, y = table(2400)
    model = compiled(mlp(8, width=24, momentum=0.9, **bn), keras.optimizers.Adam(0.01))
    model.fit(x, y, epochs=epochs, verbose=0)
    return model, (x, y), table(512, seed=1)


def trained_pictures(epochs: int = 6) -> tuple[keras.Model, Any, Any]:
    """A classifier of pictures that has been trained well."""
    x, y = pictures(1920, noise=0.5)
    model = compiled(convnet(momentum=0.9), keras.optimizers.Adam(0.01), crossentropy())
    model.fit(x, y, epochs=epochs, batch_size=24, verbose=0)
    return model, (x, y), pictures(480, noise=0.5, seed=1)


# --- Statistics that are not those of the weights


def averaged(student: keras.Model, steps: int) -> keras.Model:
    """A copy that has got the trainable weights only."""
    other = keras.models.clone_model(student)
    for to, value in zip(
        other.trainable_variables, student.trainable_variables, strict=True
    ):
        to.assign(value)
    return other


@audits("warming_up", "not_updating", "stale")
def teacher_of_trainable_weights() -> Given:
    student, data, held_out = trained_table()
    other = compiled(averaged(student, 0))
    return Given(other, data, held_out)


@audits("warming_up", "not_updating", "stale", held_back=True)
def target_network_of_pictures() -> Given:
    student, data, held_out = trained_pictures()
    other = compiled(averaged(student, 0), loss=crossentropy())
    return Given(other, data, held_out, 24)


class Ramp(keras.callbacks.Callback):
    """A search for a learning rate: it rises, and at the end the weights go back."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.kept = [w.numpy() for w in self.model.trainable_weights]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 1e-4 * 10 ** (4 * batch / 60)

    def on_train_end(self, logs: Any = None) -> None:
        for weight, value in zip(self.model.trainable_weights, self.kept, strict=True):
            weight.assign(value)


@audits("stale")
def learning_rate_finder() -> Given:
    model, data, held_out = trained_table()
    x, y = data
    compiled(model, keras.optimizers.Adam(0.01))
    model.fit(x[:1920], y[:1920], callbacks=[Ramp()], verbose=0)
    return Given(model, data, held_out)


@audits("stale", held_back=True)
def learning_rate_finder_on_pictures() -> Given:
    model, data, held_out = trained_pictures()
    x, y = data
    compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    model.fit(x[:1440], y[:1440], batch_size=24, callbacks=[Ramp()], verbose=0)
    return Given(model, data, held_out, 24)


@audits("stale")
def dropout_by_training_true() -> Given:
    model, data, held_out = trained_table()
    # A single example at a time, and far from the rest.
    far = np.full((16, 8), 30.0, "float32") + rng(3).normal(size=(16, 8))
    for _ in range(20):
        model(far.astype("float32"), training=True)
    return Given(model, data, held_out)


@audits("stale", held_back=True)
def dropout_by_training_true_on_pictures() -> Given:
    model, data, held_out = trained_pictures()
    for _ in range(15):
        model(np.ones((4, 8, 8, 1), "float32") * 2, training=True)
    return Given(model, data, held_out, 24)


def convert(model: keras.Model, change: Callable[[Any], Any]) -> None:
    found = find(model)
    assign(found, [change(one) for one in read(found)])


@audits("stale")
def deviation_for_variance() -> Given:
    model, data, held_out = trained_table()
    convert(model, lambda one: one._replace(variance=np.sqrt(one.variance)))
    return Given(model, data, held_out)


@audits("stale", held_back=True)
def forgotten_factor_of_caffe() -> Given:
    model, data, held_out = trained_pictures()
    convert(model, lambda one: type(one)(one.mean * 999.98, one.variance * 999.98))
    return Given(model, data, held_out, 24)


@audits("stale")
def mean_and_variance_swapped() -> Given:
    model, data, held_out = trained_table()
    convert(model, lambda one: type(one)(one.variance, one.mean))
    return Given(model, data, held_out)


# --- Start values


@audits("warming_up")
def unscaled_inputs_far_from_the_start() -> Given:
    z = rng(2).normal(size=(300 * 16, 6))
    x, y = (1260 + 10 * z).astype("float32"), teacher(z)
    model = keras.Sequential(
        [keras.Input((6,)), BN(), layers.Dense(24, "tanh"), layers.Dense(1)]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    model.fit(x, y, batch_size=16, verbose=0)
    z = rng(4).normal(size=(512, 6))
    held_out = (1260 + 10 * z).astype("float32"), teacher(z)
    return Given(model, (x, y), held_out, 16)


@audits("warming_up", held_back=True)
def raw_pictures_in_a_short_run() -> Given:
    x, y = pictures(1440, noise=0.5)
    raw = lambda v: (v * 40 + 2000).astype("float32")  # noqa: E731
    stack: list[Any] = [keras.Input((8, 8, 1)), BN(momentum=0.98)]
    model = keras.Sequential([*stack, *convnet(momentum=0.9).layers])
    compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    model.fit(raw(x), y, batch_size=8, verbose=0)
    x_new, y_new = pictures(480, noise=0.5, seed=1)
    return Given(model, (raw(x), y), (raw(x_new), y_new), 8)


# --- Other data than those of training


@audits("rescaled_inputs")
def table_in_other_units() -> Given:
    model, (x, y), held_out = trained_table()
    return Given(model, (x * 1000, y), held_out, cure=lambda: None)


@audits("rescaled_inputs", held_back=True)
def pictures_not_divided_by_255() -> Given:
    x, y = pictures(1920, noise=0.5)
    x = (x - x.min()) / (x.max() - x.min())
    model = compiled(convnet(momentum=0.9), keras.optimizers.Adam(0.01), crossentropy())
    model.fit(x[:1600], y[:1600], epochs=6, batch_size=24, verbose=0)
    data = 255 * x[:1600], y[:1600]
    return Given(model, data, (x[1600:], y[1600:]), 24, cure=lambda: None)


# --- Batches that are no random sample


def stream(x: Any, y: Any, size: int, weight: Any = None) -> tf.data.Dataset:
    """The data in batches, as they come."""
    parts = (x, y) if weight is None else (x, y, weight)
    return tf.data.Dataset.from_tensor_slices(parts).batch(size)


def filled(x: Any, y: Any, size: int, seed: int) -> tuple[Any, Any, Any]:
    """Batches of some real examples, filled up with zeros of weight 0."""
    draw, rows, parts = rng(seed), 0, []
    while rows < len(x):
        count = int(draw.integers(size // 8, size + 1))
        part = [v[rows : rows + count] for v in (x, y)]
        fill = size - len(part[0])
        zeros = [np.zeros((fill, *v.shape[1:]), v.dtype) for v in part]
        weight = np.r_[np.ones(len(part[0])), np.zeros(fill)].astype("float32")
        parts.append((*map(np.concatenate, zip(part, zeros, strict=True)), weight))
        rows += count
    return tuple(map(np.concatenate, zip(*parts, strict=True)))  # type: ignore[return-value]


@audits("correlated_batches", "outliers")
def batches_filled_with_zeros() -> Given:
    z = rng(6).normal(size=(3200, 8))
    x, y = (8 + z).astype("float32"), teacher(z)
    model = compiled(mlp(8, width=24, momentum=0.9), keras.optimizers.Adam(0.01))
    data = stream(*filled(x, y, 32, 0)[:2], 32, filled(x, y, 32, 0)[2])
    model.fit(data, epochs=8, verbose=0)
    z = rng(7).normal(size=(512, 8))
    held_out = (8 + z).astype("float32"), teacher(z)

    def leave_them_out() -> None:
        model.fit(x, y, epochs=8, verbose=0)

    return Given(model, data, held_out, cure=leave_them_out)


@audits("correlated_batches", "outliers", held_back=True)
def sequences_filled_with_zeros() -> Given:
    z = rng(16).normal(size=(1920, 6, 4))
    x, y = (6 + z).astype("float32"), teacher(z.reshape(len(z), -1)[:, :8])
    stack: list[Any] = [keras.Input((6, 4))]
    for _ in range(2):
        stack += [layers.Conv1D(12, 3), BN(momentum=0.9), layers.ReLU()]
    model = keras.Sequential([*stack, layers.Flatten(), layers.Dense(1)])
    compiled(model, keras.optimizers.Adam(0.01))
    parts = filled(x, y, 24, 1)
    data = stream(*parts[:2], 24, parts[2])
    model.fit(data, epochs=8, verbose=0)
    z = rng(17).normal(size=(512, 6, 4))
    held_out = (6 + z).astype("float32"), teacher(z.reshape(len(z), -1)[:, :8])

    def leave_them_out() -> None:
        model.fit(x, y, epochs=8, batch_size=24, verbose=0)

    return Given(model, data, held_out, cure=leave_them_out)


def series(rows: int, seed: int, wander: float) -> tuple[Any, Any]:
    """Windows of a series that wanders; what counts is the shape of the window."""
    draw = rng(seed)
    steps = draw.normal(size=rows + 12)
    level = np.cumsum(draw.normal(size=rows + 12)) * wander
    windows = np.lib.stride_tricks.sliding_window_view(steps + level, 12)[:rows]
    shape = windows - windows.mean(axis=1, keepdims=True)
    return windows.astype("float32"), teacher(shape)


@audits("correlated_batches")
def windows_of_a_series_in_order() -> Given:
    x, y = series(3200, 8, 0.15)
    model = compiled(mlp(12, width=24, momentum=0.9), keras.optimizers.Adam(0.005))
    data = stream(x, y, 32)
    model.fit(data, epochs=8, verbose=0)
    order = rng(9).permutation(3200)

    def shuffle() -> None:
        model.fit(x[order], y[order], epochs=8, verbose=0)

    return Given(model, data, (x[order[:512]], y[order[:512]]), cure=shuffle)


@audits("correlated_batches", held_back=True)
def recordings_one_after_the_other() -> Given:
    draw = rng(10)
    z = draw.normal(size=(60, 48, 5))
    x = (z + 3 * draw.normal(size=(60, 1, 5))).reshape(-1, 5).astype("float32")
    y = teacher(z.reshape(-1, 5))
    stack: list[Any] = [keras.Input((5,)), BN(momentum=0.9)]
    model = keras.Sequential([*stack, layers.Dense(24, "tanh"), layers.Dense(1)])
    compiled(model, keras.optimizers.Adam(0.01))
    data = stream(x, y, 24)
    model.fit(data, epochs=10, verbose=0)
    order = rng(11).permutation(len(x))

    def shuffle() -> None:
        model.fit(x[order], y[order], epochs=10, batch_size=24, verbose=0)

    return Given(model, data, (x[order[:512]], y[order[:512]]), cure=shuffle)


def with_rare_columns(rows: int, seed: int) -> tuple[Any, Any]:
    """Features, and indicators of categories that hardly any row belongs to."""
    draw = rng(seed)
    z = draw.normal(size=(rows, 4))
    rare = draw.random(size=(rows, 6)) < 0.004
    y = teacher(z) + 3 * rare.sum(axis=1, keepdims=True).astype("float32")
    return np.hstack([z, rare]).astype("float32"), y


@audits("outliers")
def rare_categories() -> Given:
    x, y = with_rare_columns(4800, 12)
    stack: list[Any] = [keras.Input((10,)), BN(momentum=0.95)]
    model = keras.Sequential([*stack, layers.Dense(24, "relu"), layers.Dense(1)])
    compiled(model, keras.optimizers.Adam(0.01))
    model.fit(x, y, epochs=10, verbose=0)

    held_out = with_rare_columns(512, 13)

    def past_bn() -> float:
        """Leads the rare columns past BN."""
        inputs = keras.Input((10,))
        usual = BN(momentum=0.95)(inputs[:, :4])
        z = layers.Concatenate()([usual, inputs[:, 4:]])
        other = keras.Model(inputs, layers.Dense(1)(layers.Dense(24, "relu")(z)))
        compiled(other, keras.optimizers.Adam(0.01))
        other.fit(x, y, epochs=10, verbose=0)
        return float(other.evaluate(*held_out, verbose=0))

    return Given(model, (x, y), held_out, cure=past_bn)


# --- Nothing wrong, whatever the steps or the batches say


@audits()
def recalibrated_after_a_short_run() -> Given:
    x, y = table(640)
    model = compiled(mlp(8), keras.optimizers.Adam(0.01))
    model.fit(x, y, verbose=0)
    recalibrate(model, x, verbose=0)
    return Given(model, (x, y), table(256, seed=1))


@audits()
def recalibrated_without_targets() -> Given:
    x, y = table(640)
    model = compiled(mlp(8, depth=8), keras.optimizers.Adam(0.01))
    model.fit(x, y, verbose=0)
    recalibrate(model, x, verbose=0)
    return Given(model, x, table(256, seed=1))


@audits(held_back=True)
def debiased_pictures() -> Given:
    x, y = pictures(960, noise=0.5)
    model = compiled(
        convnet(momentum=0.9), keras.optimizers.Adam(0.001), crossentropy()
    )
    for bn in find(model):
        bn.layer.momentum = 0.99
    model.fit(x, y, batch_size=24, verbose=0, callbacks=[DebiasBatchNorm()])
    return Given(model, x, pictures(480, noise=0.5, seed=1), 24)


@audits()
def trained_for_long_and_compiled_anew() -> Given:
    x, y = table(9600)
    model = compiled(mlp(8, width=24, momentum=0.9), keras.optimizers.Adam(0.003))
    model.fit(x, y, epochs=3, verbose=0)
    compiled(model, keras.optimizers.Adam(1e-4))
    model.fit(x[:64], y[:64], verbose=0)
    return Given(model, (x, y), table(256, seed=1))


@audits(held_back=True)
def blobs_trained_for_long() -> Given:
    x, y = blobs(6400, spread=1.5)
    model = mlp(10, 4, width=24, momentum=0.98)
    rate = keras.optimizers.schedules.CosineDecay(0.003, 800)
    compiled(model, keras.optimizers.Adam(rate), crossentropy())
    model.fit(x, y, epochs=4, verbose=0)
    return Given(model, (x, y), blobs(512, spread=1.5, seed=0))


def is_better(after: float, before: float) -> bool:
    """Whether following the advice has helped."""
    return after < before or math.isnan(before)

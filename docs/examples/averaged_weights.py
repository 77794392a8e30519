"""Averaged weights: what recalibrating is worth after four ways to average, measured.

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/averaged_weights.py

The weights of several moments, or of several networks, become one network. Its moving
statistics are an average too, or those of the last step: not its own.
For each way the script prints loss and accuracy on held-out pictures before and after
`recalibrate`, and by how much the loss differs if only some batches are used for that.
The two networks of the last way have the same initial weights. Those of independently
trained ones would first have to be permuted to match, which is not done here.
"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import bn_callbacks as bn

# The same figures in each run on a machine, however many cores are busy.
tf.config.experimental.enable_op_determinism()

BATCH_SIZE = 64
BATCHES = (4, 16, 64)
DRAWS = 3
POINTS = 21

layers = keras.layers


def placed(pictures):
    """Each picture in the four corners of a frame that is larger by a pixel."""
    places = [((i, 1 - i), (j, 1 - j)) for i in range(2) for j in range(2)]
    return np.concatenate([np.pad(pictures, ((0, 0), *place)) for place in places])


digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
x, y = (digits.images[order] / 16).astype("float32")[..., None], digits.target[order]
x_train, y_train = placed(x[:1397, ..., 0])[..., None], np.tile(y[:1397], 4)
x_test, y_test = placed(x[1397:, ..., 0])[..., None], np.tile(y[1397:], 4)


class Counted(layers.Layer):
    """Gives back its input, and counts how often Python calls it: once a trace."""

    calls = 0

    def call(self, inputs):
        Counted.calls += 1
        return inputs


def make_model(**average):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((9, 9, 1)), Counted()])
    for filters in (16, 32, 32):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    model.compile(
        keras.optimizers.Adam(0.03, **average),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def fit(model, epochs, seed=1, start=None):
    """Trains, from other weights if they are given; returns those of each epoch."""
    if start is not None:
        model.set_weights(start)
    keras.utils.set_random_seed(seed)
    kept = []
    after = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kept.append(model.get_weights())
    )
    model.fit(
        x_train,
        y_train,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        verbose=0,
        callbacks=[after],
    )
    return kept


def mixed(weights, shares=None):
    """The average of some networks, moving statistics included."""
    each = zip(*weights, strict=True)
    return [np.average(parts, axis=0, weights=shares) for parts in each]


def evaluate(model):
    return model.evaluate(x_test, y_test, batch_size=600, verbose=0)


def recalibrate(model, batches=None, draw=0):
    """With all training data, or with so many random batches of them."""
    data = x_train
    if batches is not None:
        rng = np.random.default_rng(draw)
        data = x_train[rng.choice(len(data), batches * BATCH_SIZE, replace=False)]
    return bn.recalibrate(model, data, batch_size=BATCH_SIZE, verbose=0)


def show(name, model, last):
    """A row of the table: `last` are loss and accuracy of the last step's weights."""
    before = evaluate(model)
    report = recalibrate(model)
    after = evaluate(model)
    report.undo()
    cells = [f"{loss:.4f}, {right:.1%}" for loss, right in (last, before, after)]
    for batches in BATCHES:
        found = []
        for draw in range(DRAWS):
            report = recalibrate(model, batches, draw)
            found.append(abs(evaluate(model)[0] / after[0] - 1))
            report.undo()
        cells.append(f"{np.median(found):.2%}")
    print(f"| {name} |", " | ".join(cells), "|", flush=True)


def optimizer_ema():
    """The optimizer's moving average of the weights, which `fit` puts in at its end."""
    model = make_model(use_ema=True, ema_momentum=0.99)
    (*_, last) = fit(model, 4)
    averaged = model.get_weights()
    model.set_weights(last)
    loss = evaluate(model)
    model.set_weights(averaged)
    show("optimizer EMA", model, loss)


def stochastic_weight_averaging():
    """The mean of the weights after each of the last epochs."""
    model = make_model()
    kept = fit(model, 8)
    last = evaluate(model)
    model.set_weights(mixed(kept[2:]))
    show("SWA of 6 epochs", model, last)
    return kept[-1]


def soup(start):
    """The mean of several trainings that go on from the same weights."""
    model = make_model()
    each = [fit(model, 2, seed, start)[-1] for seed in range(4)]
    last = evaluate(model)
    model.set_weights(mixed(each))
    show("soup of 4", model, last)


def interpolation():
    """Networks between two that were trained from one start, in other orders."""
    model = make_model()
    start = model.get_weights()
    ends = [fit(model, 3, seed, start)[-1] for seed in (2, 3)]
    shares = np.linspace(0, 1, POINTS)
    rows, passes = [], 0
    recalibrate(model)
    evaluate(model)
    calls = Counted.calls
    for share in shares:
        model.set_weights(mixed(ends, [1 - share, share]))
        before = evaluate(model)
        passes += recalibrate(model).passes
        rows.append((*before, *evaluate(model)))
    traces = Counted.calls - calls
    losses = np.array(rows)[:, ::2]
    for share, (loss, right, new_loss, new_right) in zip(shares, rows, strict=True):
        cells = f"{loss:.4f}, {right:.1%} | {new_loss:.4f}, {new_right:.1%}"
        print(f"| {share:.2f} | {cells} |")
    straight = np.outer(1 - shares, losses[0]) + np.outer(shares, losses[-1])
    before, after = (losses - straight).max(axis=0)
    print(f"barrier: {before:.4f} as averaged, {after:.4f} recalibrated")
    print(f"{POINTS} points: {passes} passes, {traces} new traces")


if __name__ == "__main__":
    off = " | ".join(f"{batches} batches" for batches in BATCHES)
    print(f"| weights | of the last step | averaged | recalibrated | {off} |")
    optimizer_ema()
    soup(stochastic_weight_averaging())
    print("\n| share | as averaged | recalibrated |")
    interpolation()

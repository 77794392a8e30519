"""The pictures of the guide.

    python -m pip install -e ".[dev]"
    python docs/pictures/make.py            # writes the SVG files beside itself
    python docs/pictures/make.py DIRECTORY  # or elsewhere

Each function computes what it shows and returns a figure; the file has its name. Text
stays text in the files, so that they are small and a test can read them.
"""

import sys
from pathlib import Path

import keras
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import bn_callbacks as bn
from bn_callbacks.statistics.lag import lag
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import (
    average_noise,
    start_weight,
    window_statistic,
)

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bn_callbacks",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.figsize": (6.4, 3.0),
    "figure.constrained_layout.use": True,
}


def why():
    """One training, three losses: as fit reports it, as inference has it, repaired."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16).astype("float32"), y[order]
    x_train, y_train, x_val, y_val = x[:1280], y[:1280], x[1280:], y[1280:]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,))])
    for _ in range(3):
        model.add(keras.layers.Dense(128))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy")

    repaired = []

    def measure(epoch, logs):
        with bn.recalibrated(model, x_train, batch_size=64, verbose=0):
            repaired.append(model.evaluate(x_val, y_val, verbose=0))

    history = model.fit(
        x_train,
        y_train,
        batch_size=64,
        epochs=15,
        validation_data=(x_val, y_val),
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=measure)],
        verbose=0,
    ).history
    figure, axes = plt.subplots()
    epochs = np.arange(1, 16)
    axes.plot(epochs, history["val_loss"], "o-", color=ORANGE, ms=3)
    axes.plot(epochs, repaired, "o-", color=GREEN, ms=3)
    axes.plot(epochs, history["loss"], "--", color=GREY)
    axes.set(yscale="log", xlabel="epoch of 20 steps", ylabel="loss", xlim=(0.5, 22))
    axes.set_xticks(range(1, 16, 2))
    axes.annotate(
        "validation, as fit shows it", (15.3, history["val_loss"][-1]), va="bottom"
    )
    axes.annotate(
        "validation, statistics\nrecalibrated", (15.3, repaired[-1]), va="top"
    )
    axes.annotate("training", (15.3, history["loss"][-1]), va="center")
    return figure


def start():
    """What is left of the start values after so many updates."""
    figure, axes = plt.subplots()
    updates = np.unique(np.geomspace(1, 10_000, 70).astype(int))
    for momentum, colour in ((0.9, BLUE), (0.99, ORANGE), (0.999, GREEN)):
        weights = [start_weight(momentum, int(t)) for t in updates]
        axes.plot(updates, weights, color=colour, label=f"momentum {momentum}")
    axes.plot(100, start_weight(0.99, 100), "o", color=ORANGE)
    axes.annotate(
        f"{start_weight(0.99, 100):.3f} at 100",
        (100, start_weight(0.99, 100)),
        xytext=(6, 3),
        textcoords="offset points",
    )
    axes.set(xscale="log", xlabel="updates t", ylabel="weight of the start, m^t")
    axes.legend()
    return figure


def window():
    """Batch statistics recovered from two readings of their moving average."""
    rng = np.random.default_rng(3)
    momentum, length, count = 0.95, 10, 8
    times = np.arange(length * count)
    batches = 1 + 0.5 * np.sin(times / 14) + rng.normal(0, 0.25, len(times))
    moving = [0.0]
    for batch in batches:
        moving.append(momentum * moving[-1] + (1 - momentum) * batch)
    figure, axes = plt.subplots()
    axes.plot(times + 1, batches, ".", color=GREY, ms=4, label="mean of each batch")
    axes.plot(
        np.arange(len(moving)), moving, color=ORANGE, label="moving average, from 0"
    )
    readings = range(0, len(moving), length)
    axes.plot(readings, [moving[t] for t in readings], "o", color=ORANGE, ms=5)
    for number, begin in enumerate(range(0, len(times), length)):
        end = begin + length
        value = float(window_statistic(moving[begin], moving[end], momentum, length))
        axes.plot(
            [begin, end],
            [value, value],
            color=BLUE,
            lw=3,
            label=None if number else "W, from two readings",
        )
    axes.set(xlabel="updates", ylabel="mean of one channel")
    axes.legend(loc="upper right")
    return figure


def momentum():
    """Noise and drift pull the momentum in opposite directions."""
    figure, (left, right) = plt.subplots(1, 2, sharey=True)
    momenta = 1 - np.geomspace(1, 1e-4, 81)
    cases = (
        (left, "weights that move fast", 0.04, 1e-3),
        (right, "noisy batches", 1.0, 1e-5),
    )
    for axes, title, noise, drift in cases:
        of_noise = noise * np.array([average_noise(m) for m in momenta])
        of_drift = drift * momenta**2 / (1 - momenta**2)
        total = np.sqrt(of_noise + of_drift)
        best = int(np.argmin(total))
        axes.plot(1 - momenta, np.sqrt(of_noise), "--", color=BLUE, label="noise")
        axes.plot(1 - momenta, np.sqrt(of_drift), "--", color=ORANGE, label="drift")
        axes.plot(1 - momenta, total, color="black", label="both")
        axes.plot(1 - momenta[best], total[best], "o", color="black")
        axes.annotate(
            f"m = {momenta[best]:.3f}",
            (1 - momenta[best], total[best]),
            xytext=(0, 14),
            textcoords="offset points",
            ha="center",
        )
        axes.set(xscale="log", yscale="log", xlabel="1 − momentum", title=title)
        axes.set(xlim=(2e-4, 1.2), ylim=(0.01, 3))
    left.set_ylabel("error of the average, in σ")
    left.legend(loc="upper right")
    return figure


def passes():
    """Layer k is exact after k passes."""
    rng = np.random.default_rng(0)
    # Forty groups, each with a level of its own, one group a batch.
    levels = rng.normal(0, 2, (40, 1, 16))
    x = (levels + rng.normal(size=(40, 32, 16))).reshape(-1, 16).astype("float32")
    keras.utils.set_random_seed(0)
    inputs = z = keras.Input((16,))
    seen = []
    for number in range(1, 6):
        z = keras.layers.Dense(32)(z)
        seen.append(z)
        z = keras.layers.BatchNormalization(name=f"bn_{number}")(z)
        z = keras.layers.ReLU()(z)
    model = keras.Model(inputs, z)
    inside = keras.Model(inputs, seen)
    norms = [model.get_layer(f"bn_{number}") for number in range(1, 6)]
    figure, axes = plt.subplots()
    for count, colour in zip(
        range(1, 6), plt.cm.viridis(np.linspace(0, 0.9, 5)), strict=True
    ):
        with bn.recalibrated(model, x, refine=count - 1, verbose=0):
            rest = []
            for norm, values in zip(norms, inside.predict(x, verbose=0), strict=True):
                rows = values.astype("float64")
                truth = Statistics(rows.mean(axis=0), rows.var(axis=0))
                stored = Statistics(
                    norm.moving_mean.numpy(), norm.moving_variance.numpy()
                )
                rest.append(max(lag(truth, stored, norm.epsilon), 1e-7))
        label = f"{count} pass{'es' * (count > 1)}"
        axes.plot(range(1, 6), rest, "o-", color=colour, ms=4, label=label)
    axes.set(yscale="log", xlabel="BatchNormalization layer", ylim=(1e-8, 3))
    axes.set_ylabel("lag of stored statistics, in σ")
    axes.set_xticks(range(1, 6))
    axes.set_xlim(0.8, 6.4)
    axes.legend(loc="center right")
    return figure


PICTURES = (why, start, window, momentum, passes)


def main(directory):
    directory.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for picture in PICTURES:
            path = directory / f"{picture.__name__}.svg"
            picture().savefig(path, metadata={"Date": None})
            plt.close("all")
            print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)

"""What a handful of examples does to the loss: four ways to recalibrate with them.

    python tests/benchmarks/handful.py [--models dense ...] [--seeds 8] [--draws 3]
                                       [--examples 8 16] [--markdown docs/benchmarks.md]

Networks for scikit-learn's digits are trained until they are healthy, or for 100 steps
only, which leaves their averages warming up; or they get data of half the contrast.
Each network takes some minutes; rows of others that the page has stay there.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from page import Section, new_parser, table
from sklearn.datasets import load_digits

from bn_callbacks import recalibrate
from bn_callbacks.measuring import handful
from bn_callbacks.statistics.moments import Moments, Statistics, pool
from bn_callbacks.statistics.shrinkage import Shrunk

layers = keras.layers
TRAINING = 1280
BATCH_SIZE = 64
EPOCHS = {"healthy": 40, "warming up": 5}
PSEUDO_COUNT = 16
PAGE = """\
Validation loss, the median over {seeds} trainings × {draws} draws of so many examples:
with the statistics as stored; with plain recalibration; with a mixture in which what is
stored counts as {count} examples; with the estimator of James and Stein, for the means
and for the logarithms of the variances of each layer; and with `prior="stored"`. Bold
is the lowest of the last four. Where all {training} examples are used, that is plain
recalibration, and `prior="stored"` is the same.

{table}
"""


def dense() -> keras.Model:
    """Three dense layers of 128, each with BN."""
    stack: list[Any] = [keras.Input((8, 8, 1)), layers.Flatten()]
    for _ in range(3):
        stack += [layers.Dense(128), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([*stack, layers.Dense(10)])


def convolutional() -> keras.Model:
    """Three convolutions, each with BN."""
    stack: list[Any] = [keras.Input((8, 8, 1))]
    for filters, stride in ((16, 1), (32, 2), (64, 1)):
        stack += [
            layers.Conv2D(filters, 3, stride, "same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    return keras.Sequential(stack)


def residual() -> keras.Model:
    """Three residual blocks of two convolutions; eight BN layers."""
    inputs = keras.Input((8, 8, 1))

    def block(x: Any, filters: int, stride: int) -> Any:
        x = layers.Conv2D(filters, 3, stride, "same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = layers.ReLU()(block(inputs, 24, 1))
    for filters, stride in ((24, 1), (48, 2), (48, 1)):
        y = block(layers.ReLU()(block(x, filters, stride)), filters, 1)
        if stride > 1:
            x = layers.Conv2D(filters, 1, stride, use_bias=False)(x)
            x = layers.BatchNormalization()(x)
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "dense": dense,
    "convolutional": convolutional,
    "residual": residual,
}


class Case(NamedTuple):
    """A model, data to recalibrate with, and data to judge by."""

    model: keras.Model
    x: Any
    validation: tuple[Any, Any]


def cases(network: str, seed: int) -> Iterator[tuple[str, Case]]:
    """The three cases of one training."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = (digits.images[order] / 16).astype("float32")[..., None]
    y = digits.target[order]
    x_train, x_val, y_val = x[:TRAINING], x[TRAINING:], y[TRAINING:]
    trained = {}
    for name, epochs in EPOCHS.items():
        keras.utils.set_random_seed(seed)
        model = NETWORKS[network]()
        steps = epochs * TRAINING // BATCH_SIZE
        falling = keras.optimizers.schedules.CosineDecay(3e-3, steps)
        rate = falling if name == "healthy" else 2e-3
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(rate), loss)
        model.fit(
            x_train, y[:TRAINING], batch_size=BATCH_SIZE, epochs=epochs, verbose=0
        )
        trained[name] = model
        yield name, Case(model, x_train, (x_val, y_val))
    shifted = Case(
        trained["healthy"], x_train / 2 + 0.25, (x_val / 2 + np.float32(0.25), y_val)
    )
    yield "shifted", shifted


def mixture(
    examples: Sequence[Moments], stored: Statistics, *_: Any, count: int = PSEUDO_COUNT
) -> Shrunk:
    """What is stored counts as so many examples (Schneider et al., 2020)."""
    share = len(examples) / (len(examples) + count)
    new = pool(examples).statistics
    mean, variance = (
        (1 - share) * old + share * one for old, one in zip(stored, new, strict=True)
    )
    return Shrunk(Statistics(mean, variance), 0.0, 1.0, share, 0.0)


def james_stein(
    examples: Sequence[Moments],
    stored: Statistics,
    start: Statistics,
    epsilon: float,
    *_: Any,
) -> Shrunk:
    """Positive-part James–Stein, for the means and the logarithms of variances."""
    means = np.stack([one.mean for one in examples])
    mean, variance = pool(examples).statistics
    squares = np.stack([one.variance for one in examples]) + np.square(means - mean)
    count = len(examples)
    error = np.maximum(means.var(0, ddof=1), 1e-8 * (variance + epsilon)) / count
    relative = squares.var(0, ddof=1) / np.maximum(variance, 1e-30) ** 2
    log_error = np.maximum(relative, 1e-8) / count
    old, new = np.log(stored.variance + epsilon), np.log(variance + epsilon)
    shares = [
        max(0.0, 1 - (len(mean) - 2) / max(np.sum(np.square(d) / e), 1e-30))
        for d, e in ((mean - stored.mean, error), (new - old, log_error))
    ]
    moved = Statistics(
        stored.mean + shares[0] * (mean - stored.mean),
        np.exp(old + shares[1] * (new - old)) - epsilon,
    )
    return Shrunk(moved, 0.0, 1.0, float(np.mean(shares)), 0.0)


WAYS: dict[str, Callable[..., Shrunk] | None] = {
    "plain": None,
    "mixture": mixture,
    "James–Stein": james_stein,
    'prior="stored"': handful.shrunk,
}


def loss_of(case: Case) -> float:
    """The model's loss on the validation data."""
    return float(case.model.evaluate(*case.validation, batch_size=1024, verbose=0))


def loss_with(case: Case, way: Callable[..., Shrunk] | None, x: Any) -> float:
    """The loss after recalibrating with some examples in some way."""
    # In place of what the library does.
    with mock.patch.object(handful, "shrunk", way):
        prior = None if way is None else "stored"
        report = recalibrate(case.model, x, prior=prior, verbose=0)
    loss = loss_of(case)
    report.undo()
    return loss


def rows(
    network: str, seeds: int, draws: int, sizes: Sequence[int]
) -> Iterator[tuple[str, ...]]:
    """The rows of one network."""
    losses: dict[tuple[str, str, int], list[float]] = {}
    for seed in range(seeds):
        for name, case in cases(network, seed):
            losses.setdefault((name, "stored", 0), []).append(loss_of(case))
            of_all = loss_with(case, None, case.x)
            losses.setdefault((name, "plain", TRAINING), []).append(of_all)
            for size in sizes:
                for draw in range(draws):
                    rng = np.random.default_rng([seed, draw])
                    x = case.x[rng.choice(TRAINING, size, replace=False)]
                    for way, function in WAYS.items():
                        found = loss_with(case, function, x)
                        losses.setdefault((name, way, size), []).append(found)
    names = list(dict.fromkeys(name for name, _, _ in losses))
    for name in names:
        before = np.median(losses[name, "stored", 0])
        for size in sizes:
            each = {way: np.median(losses[name, way, size]) for way in WAYS}
            cells = [
                f"**{loss:.3f}**" if loss == min(each.values()) else f"{loss:.3f}"
                for loss in each.values()
            ]
            yield network, name, str(size), f"{before:.3f}", *cells
        whole = np.median(losses[name, "plain", TRAINING])
        yield network, name, str(TRAINING), f"{before:.3f}", f"{whole:.3f}", "", "", ""


def kept(page: Path | None, measured: Sequence[str]) -> dict[str, list[list[str]]]:
    """Rows that the page has of networks that are not measured now."""
    text = page.read_text("utf-8") if page is not None and page.exists() else ""
    _, _, section = text.partition("<!-- section handful -->")
    found: dict[str, list[list[str]]] = {name: [] for name in NETWORKS}
    for line in section.partition("<!-- end -->")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] in set(NETWORKS) - set(measured):
            found[cells[0]].append(cells)
    return found


def main() -> None:
    """Prints the table."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS)
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--examples", nargs="+", type=int, default=[8, 16])
    options = parser.parse_args()
    section = Section("handful")
    head = ("network", "case", "examples", "stored", *WAYS)
    found = kept(options.markdown, options.models)
    for network in options.models:
        for row in rows(network, options.seeds, options.draws, options.examples):
            print(*row, flush=True)
            found[network].append(list(row))
        body = PAGE.format(
            seeds=options.seeds,
            draws=options.draws,
            count=PSEUDO_COUNT,
            training=TRAINING,
            table=table(head, [row for each in found.values() for row in each]),
        )
        # After each, so that an interrupted run leaves what it has.
        section.write(body, options.markdown)


if __name__ == "__main__":
    main()

"""What watching a `fit` costs: the time of `fit` with the monitor over that without.

    python tests/benchmarks/overhead.py [--models mlp densenet201 ...] [--repeats 7]
                                        [--steps 500] [--markdown docs/benchmarks.md]

All variants of a model run in one process, in turn and in an order that changes, after
one `fit` of each that is not counted. Each `fit` gets a callback of its own. What the
methods of the monitor take themselves is measured as well, for the times of two fits
differ by more than what is sought.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from page import Section, quartiles, table

from bn_callbacks import BatchNormMonitor
from bn_callbacks.callbacks.monitor import WRITING_SHARE

EPOCHS = 2


class Case(NamedTuple):
    """A model, its data, and the ratio that the monitor must not exceed."""

    build: Callable[[], keras.Model]
    shape: tuple[int, ...]
    batch_size: int
    steps: int
    repeats: int
    bar: float


def mlp() -> keras.Model:
    """Three dense layers with BN: steps of some milliseconds, the hard case."""
    stack: list[Any] = [keras.Input((256,))]
    for _ in range(3):
        stack += [keras.layers.Dense(256), keras.layers.BatchNormalization()]
        stack += [keras.layers.ReLU()]
    return keras.Sequential([*stack, keras.layers.Dense(10)])


def application(name: str) -> Callable[[], keras.Model]:
    """A network of `keras.applications` with random weights."""

    def build() -> keras.Model:
        make = getattr(keras.applications, name)
        return make(
            weights=None,
            input_shape=IMAGE,
            classes=10,
            classifier_activation=None,
        )

    return build


IMAGE = (96, 96, 3)
CASES = {
    "mlp": Case(mlp, (256,), 128, 1500, 3, 1.02),
    "mobilenetv2": Case(application("MobileNetV2"), IMAGE, 8, 100, 1, 1.01),
    "resnet50": Case(application("ResNet50"), IMAGE, 8, 30, 1, 1.01),
    "densenet201": Case(application("DenseNet201"), IMAGE, 8, 30, 1, 1.01),
}
VARIANTS = ("without", "default", "with log_dir")
HEAD = (
    *("model", "BN layers", "ms a step", "steps", "monitor"),
    *("ratio", "quartiles", "own time", "at most"),
)

PAGE = """\
The time of a `fit` of {epochs} epochs with `BatchNormMonitor` over that of the same
`fit` without: the median of {repeats} repeats, {more} for the *mlp*, and the quartiles.
All run in one process, one after the other in changing order, traced before; each `fit`
has a new monitor. The *mlp* has three dense layers of 256 in batches of 128; the others
are those of `keras.applications` at 96×96 in batches of 8.

Two times of one and the same `fit` differ by the quartiles of the ratio, which is more
than what is sought. *Own time* is not touched by that: it is the share of a `fit` that
passes in the methods of the monitor, which is all that a `fit` has more than without.
The last column is the limit that we set ourselves for the ratio. Writing takes
{budget:.1%} of the time at most between the ends of epochs; on top of that come the
ends of epochs, of which there are few in a long training, and the last heat map.

{table}
"""


class TimedMonitor(BatchNormMonitor):
    """The monitor, which counts the seconds that its methods take."""

    own_time = 0.0


def timed(method: Callable[..., None]) -> Callable[..., None]:
    """The same method, timed."""

    def call(monitor: TimedMonitor, *arguments: Any, **named: Any) -> None:
        start = time.perf_counter()
        method(monitor, *arguments, **named)
        monitor.own_time += time.perf_counter() - start

    return call


for hook, method in vars(BatchNormMonitor).items():
    if hook.startswith("on_"):
        setattr(TimedMonitor, hook, timed(method))


def measure(name: str, repeats: int, steps: int | None) -> list[tuple[str, ...]]:
    """Lines of the table for one model."""
    case = CASES[name]
    case = case._replace(steps=steps or case.steps)
    keras.utils.set_random_seed(0)
    model = case.build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3), loss)
    rng = np.random.default_rng(0)
    count = case.batch_size * case.steps
    x = rng.normal(size=(count, *case.shape)).astype("float32")
    y = rng.integers(0, 10, count)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    shares: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    orders = itertools.cycle(itertools.permutations(VARIANTS))
    for repeat in range(repeats * case.repeats + 1):
        for variant in next(orders):
            with tempfile.TemporaryDirectory() as directory:
                log_dir = directory if variant == "with log_dir" else None
                monitor = TimedMonitor(log_dir, on_lag="ignore")
                start = time.perf_counter()
                model.fit(
                    x,
                    y,
                    batch_size=case.batch_size,
                    epochs=EPOCHS,
                    verbose=0,
                    callbacks=[] if variant == "without" else [monitor],
                )
                passed = time.perf_counter() - start
            if repeat:
                times[variant].append(passed)
                shares[variant].append(monitor.own_time / passed)
    return lines(name, case, model, times, shares)


def lines(
    name: str,
    case: Case,
    model: keras.Model,
    times: dict[str, list[float]],
    shares: dict[str, list[float]],
) -> list[tuple[str, ...]]:
    """The measured times as text."""
    base = np.array(times["without"])
    layers = sum(
        isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers
    )
    step = 1e3 * float(np.median(base)) / (EPOCHS * case.steps)
    found = []
    for variant in VARIANTS[1:]:
        low, middle, high = quartiles(np.array(times[variant]) / base)
        found.append(
            (
                name,
                str(layers),
                f"{step:.1f}",
                f"{EPOCHS} x {case.steps}",
                variant,
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{np.median(shares[variant]):.2%}",
                f"{case.bar:.2f}",
            )
        )
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--repeats", type=int, default=7, help="three times as many for the mlp"
    )
    parser.add_argument("--steps", type=int, help="of an epoch, whatever the model")
    parser.add_argument("--markdown", type=Path, help="the page to write this into")
    options = parser.parse_args()
    section = Section("overhead")
    rows = []
    for name in options.models:
        for row in measure(name, options.repeats, options.steps):
            rows.append(row)
            print("  ".join(cell.ljust(14) for cell in row), flush=True)
    body = PAGE.format(
        epochs=EPOCHS,
        repeats=options.repeats,
        more=options.repeats * CASES["mlp"].repeats,
        budget=WRITING_SHARE,
        table=table(HEAD, rows),
    )
    section.write(body, options.markdown)


if __name__ == "__main__":
    main()

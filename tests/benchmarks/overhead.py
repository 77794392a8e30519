"""What watching a `fit` costs: the time of `fit` with the monitor over that without.

    python tests/benchmarks/overhead.py [--models mlp densenet201 ...] [--repeats 7]
                                        [--steps 500] [--markdown docs/benchmarks.md]

All variants of a model run in one process, in turn and in an order that changes, after
one `fit` of each that is not counted. Each `fit` gets a callback of its own. What the
methods of the monitor take themselves is measured as well, for the times of two fits
differ by more than what is sought.
"""

import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from page import Section, new_parser, quartiles, table

from bn_callbacks import BatchNormMonitor
from bn_callbacks.callbacks.monitor import WRITING_SHARE
from bn_callbacks.tensorboard.writer import PICTURE_SHARE

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
    "mobilenetv2": Case(application("MobileNetV2"), IMAGE, 8, 200, 1, 1.01),
    "resnet50": Case(application("ResNet50"), IMAGE, 8, 60, 1, 1.01),
    "densenet201": Case(application("DenseNet201"), IMAGE, 8, 60, 1, 1.01),
}
VARIANTS = ("without", "default", "with log_dir")
HEAD = (
    *("model", "BN layers", "ms a step", "steps", "monitor"),
    *("ratio", "quartiles", "own time", "at most"),
)
HOOKS = {
    "on_train_begin": "its beginning",
    "on_train_batch_begin": "an epoch's batches",
    "on_epoch_end": "an epoch's end",
    "on_train_end": "its end",
}
"""Methods in which the time passes, and what they are called in the table."""

PAGE = """\
The time of a `fit` of {epochs} epochs with `BatchNormMonitor` over that of the same
`fit` without: the median of {repeats} repeats, {more} for the *mlp*, and the quartiles.
All run in one process, one after the other in changing order, traced before; each `fit`
has a new monitor. The *mlp* has three dense layers of 256 in batches of 128; the others
are those of `keras.applications` at 96×96 in batches of 8.

Two times of one and the same `fit` differ by the quartiles of the ratio, which is more
than what is sought. *Own time* is not touched by that: it is the share of a `fit` that
passes in the methods of the monitor, which is what a `fit` does more than without.
The last column is the limit that we set ourselves for the ratio. Epochs of the large
models take about half a minute here, which is short for them.

{table}

Where the time goes, in milliseconds of a `fit`, from which shorter and longer ones can
be reckoned: most of it does not grow with the steps. Between the ends of epochs writing
takes {writing:.1%} of the time at most; drawing, at their ends, takes {drawing:.1%} at
most but for the last heat map.

{hooks}
"""


class TimedMonitor(BatchNormMonitor):
    """The monitor, which counts the seconds that its methods take."""

    def __init__(self, log_dir: str | None) -> None:
        super().__init__(log_dir, on_lag="ignore")
        self.seconds: Counter[str] = Counter()


def timed(hook: str, method: Callable[..., None]) -> Callable[..., None]:
    """The same method, timed."""

    def call(monitor: TimedMonitor, *arguments: Any, **named: Any) -> None:
        start = time.perf_counter()
        method(monitor, *arguments, **named)
        monitor.seconds[hook] += time.perf_counter() - start

    return call


for hook, method in vars(BatchNormMonitor).items():
    if hook.startswith("on_"):
        setattr(TimedMonitor, hook, timed(hook, method))


class Fit(NamedTuple):
    """What was measured in one `fit`: its seconds, and those of each hook."""

    whole: float
    hooks: Counter[str]


Fits = dict[str, list[Fit]]


def measure(name: str, repeats: int, steps: int | None) -> tuple[list[Any], list[Any]]:
    """Lines of both tables for one model."""
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
    fits: Fits = {variant: [] for variant in VARIANTS}
    orders = itertools.cycle(itertools.permutations(VARIANTS))
    for repeat in range(repeats * case.repeats + 1):
        for variant in next(orders):
            with tempfile.TemporaryDirectory() as directory:
                log_dir = directory if variant == "with log_dir" else None
                monitor = TimedMonitor(log_dir)
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
                fits[variant].append(Fit(passed, monitor.seconds))
    return shares(name, case, model, fits), milliseconds(name, fits)


def shares(name: str, case: Case, model: keras.Model, fits: Fits) -> list[Any]:
    """Lines of the first table."""
    base = np.array([fit.whole for fit in fits["without"]])
    layers = sum(
        isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers
    )
    step = 1e3 * float(np.median(base)) / (EPOCHS * case.steps)
    found = []
    for variant in VARIANTS[1:]:
        ratios = np.array([fit.whole for fit in fits[variant]]) / base
        low, middle, high = quartiles(ratios)
        own = [fit.hooks.total() / fit.whole for fit in fits[variant]]
        found.append(
            (
                name,
                str(layers),
                f"{step:.1f}",
                f"{EPOCHS} x {case.steps}",
                variant,
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{np.median(own):.2%}",
                f"{case.bar:.2f}",
            )
        )
    return found


def milliseconds(name: str, fits: Fits) -> list[Any]:
    """Lines of the second table."""
    found = []
    for variant in VARIANTS[1:]:
        cells = [name, variant]
        for hook in HOOKS:
            in_epochs = "epoch" in HOOKS[hook]
            times = [1e3 * fit.hooks[hook] for fit in fits[variant]]
            cells.append(f"{np.median(times) / (EPOCHS if in_epochs else 1):.0f}")
        found.append(cells)
    return found


def main() -> None:
    """Prints the tables."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--repeats", type=int, default=7, help="three times as many for the mlp"
    )
    parser.add_argument("--steps", type=int, help="of an epoch, whatever the model")
    options = parser.parse_args()
    section = Section("overhead")
    rows: list[Any] = []
    hooks: list[Any] = []
    for name in options.models:
        found = measure(name, options.repeats, options.steps)
        rows += found[0]
        hooks += found[1]
        for row in (*found[0], *found[1]):
            print("  ".join(cell.ljust(14) for cell in row), flush=True)
    body = PAGE.format(
        epochs=EPOCHS,
        repeats=options.repeats,
        more=options.repeats * CASES["mlp"].repeats,
        writing=WRITING_SHARE,
        drawing=PICTURE_SHARE,
        table=table(HEAD, rows),
        hooks=table(("model", "monitor", *HOOKS.values()), hooks),
    )
    section.write(body, options.markdown)


if __name__ == "__main__":
    main()

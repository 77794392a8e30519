"""How often recalibration reads the data, and how long it takes.

    python tests/benchmarks/recalibration.py [--repeats 3] [--batch-size 32]
        [--models mlp6 ResNet50 ...] [--markdown docs/benchmarks.md]

Times are taken in one process, in turn, and are medians over the repeats.
"""

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from networks import NETWORKS, trained
from numpy.typing import NDArray
from page import Section, new_parser, table

from bn_callbacks import recalibrate
from bn_callbacks.layers import find
from bn_callbacks.report import RecalibrationReport

ENOUGH = 15.0
"""Seconds of repeats after which there are no more of them."""


class Counted(keras.utils.PyDataset):  # type: ignore[misc]
    """Counts the batches that are asked for.

    Args:
        x: The data.
        batch_size: Examples in a batch.
    """

    def __init__(self, x: NDArray[np.float32], batch_size: int) -> None:
        super().__init__()
        self._x = x
        self._batch_size = batch_size
        self.asked = 0

    def __len__(self) -> int:
        return math.ceil(len(self._x) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any]:
        self.asked += 1
        start = index * self._batch_size
        return (self._x[start : start + self._batch_size],)

    @property
    def reads(self) -> float:
        """How often all has been read."""
        return self.asked / len(self)


class Clock:
    """Times a `with` block: seconds, and seconds of all cores."""

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._start[0]
        self.cpu = time.process_time() - self._start[1]


class Inference:
    """Calls a model in inference mode, as fast as it can be.

    Args:
        model: The model.
        x: What to call it with.
        batch_size: Examples in a batch.

    Attributes:
        first: The time of the first call: its trace and one batch.
    """

    def __init__(
        self, model: keras.Model, x: NDArray[np.float32], batch_size: int
    ) -> None:
        # In parts made before, as recalibration also finds its batches in memory.
        self._parts = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
        self._call: Callable[..., Any] = tf.function(
            lambda batch: model(batch, training=False),
            autograph=False,
            reduce_retracing=True,
        )
        with Clock() as self.first:
            self._call.get_concrete_function(
                tf.TensorSpec((None, *x.shape[1:]), tf.float32)
            )
            np.asarray(self._call(tf.constant(self._parts[0])))

    def __call__(self) -> Clock:
        """One pass over the data."""
        with Clock() as clock:
            for part in self._parts:
                outputs = self._call(tf.constant(part))
            np.asarray(outputs)
        return clock


def timed(model: keras.Model, data: Any) -> tuple[RecalibrationReport, Clock]:
    """Recalibrates, and says how long it took."""
    with Clock() as clock:
        report = recalibrate(model, data, verbose=0)
    return report, clock


class Solved(NamedTuple):
    """A network recalibrated: a line of the first table."""

    name: str
    layers: int
    shape: str
    lag: float
    reads: float
    passes: int
    residual: float
    time: float
    cpu: float


SOLVED_HEAD = (
    *("network", "BN layers", "images", "lag before", "reads", "passes", "residual"),
    *("time", "CPU time"),
)


def solved_cells(line: Solved) -> tuple[str, ...]:
    """A line of the first table, as text."""
    return (
        line.name,
        str(line.layers),
        line.shape,
        f"{line.lag:.2g}",
        f"{line.reads:.3g}",
        str(line.passes),
        f"{line.residual:.1e}",
        f"{line.time:.1f}",
        f"{line.cpu:.1f}",
    )


def solve(name: str, batch_size: int, repeats: int, steps: int | None) -> Solved:
    """Trains a network, recalibrates it several times, and compares with inference."""
    network = NETWORKS[name]
    model, x = trained(name, network, steps)
    inference = Inference(model, x, batch_size)
    data = Counted(x, batch_size)
    inference()
    report, _ = timed(model, data)
    reads = data.reads
    pairs: list[tuple[Clock, Clock]] = []
    for _ in range(repeats):
        if sum(one.wall + other.wall for one, other in pairs) > ENOUGH:
            break
        report.undo()
        own = inference()
        report, again = timed(model, data)
        pairs.append((own, again))
    return Solved(
        name=name,
        layers=len(find(model)),
        shape=f"{len(x):,} of {network.size}×{network.size}",
        lag=report.before.max_lag,
        reads=reads,
        passes=report.passes,
        residual=residual_of(report),
        time=float(np.median([again.wall / own.wall for own, again in pairs])),
        cpu=float(np.median([again.cpu / own.cpu for own, again in pairs])),
    )


def residual_of(report: RecalibrationReport) -> float:
    """The residual; infinite where nothing was committed."""
    if report.residual is None or not report.committed:
        return float("inf")
    return report.residual


PAGE = """\
`recalibrate(model, data)` with default settings, on networks after a short training on
images made for this, in batches of {batch_size} from a `PyDataset` that counts how
often it is read. Layer by layer, which is the simple way to the same statistics, needs
as many reads as there are layers. *Passes* includes, where there are more passes than
reads, those over data in memory. *Residual* is the largest of any layer, in standard
deviations, measured in inference mode; `inf` would mean that nothing was committed.

*Time* is that of a second recalibration, which traces nothing, in inference passes over
the same batches: the median of up to {repeats}. *CPU time* is the same in time of all
cores, which other work on the machine disturbs less.

{table}
"""


def main() -> None:
    """Prints the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, help="steps of training, in place of ours")
    parser.add_argument(
        "--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS)
    )
    options = parser.parse_args()
    section = Section("recalibration")
    rows = []
    for name in options.models:
        line = solve(name, options.batch_size, options.repeats, options.steps)
        rows.append(solved_cells(line))
        print("  ".join(cell.ljust(16) for cell in rows[-1]), flush=True)
        body = PAGE.format(
            batch_size=options.batch_size,
            repeats=options.repeats,
            table=table(SOLVED_HEAD, rows),
        )
        # After each, so that an interrupted run leaves what it has.
        section.write(body, options.markdown)


if __name__ == "__main__":
    main()

"""How the cost of a reading and of a recalibration grows, and with what.

    python tests/benchmarks/growth.py [--repeats 5] [--markdown docs/benchmarks.md]

Readings, reports: against the number of layers and channels, with a plane fitted to the
medians. Recalibration: against the amount of data, layers and passes.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from page import Section, new_parser, table

from bn_callbacks import recalibrate
from bn_callbacks.layers import find
from bn_callbacks.report import layer_reports
from bn_callbacks.watching.windows import KEPT_WINDOWS, Windows

SIZES = ((1, 64), (50, 64), (100, 64), (200, 64), (50, 512), (50, 2048), (200, 512))
FACTORS = (1, 2, 4, 8)
BATCH, WIDTH = 64, 256

PAGE = """\
### A reading, and a report

A *reading* is what the monitor does every 10 to 100 steps: it fetches the moving
averages of all layers and closes a window. A *report* is made at the ends of epochs,
from {kept} windows. Medians over {readings} readings and {reports} reports.

{sizes}

The least squares fit of a constant, a cost for each layer and one for each channel of
each layer (median relative error of the fit in brackets):

{slopes}

### A recalibration

Seconds of a whole `recalibrate`, tracing included, with so many times the data, layers
or passes: medians over {repeats}. The base are {base}. Where the cost is linear, the
increase doubles from column to column.

{recalibration}
"""


def network(layers: int, channels: int) -> keras.Model:
    """BN layers of so many channels, and nothing that costs."""
    stack: list[Any] = [keras.Input((channels,))]
    stack += [keras.layers.BatchNormalization() for _ in range(layers)]
    model = keras.Sequential([*stack, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def seconds(act: Callable[[], Any], repeats: int) -> float:
    """Median time of an act, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def reading_and_report(
    layers: int, channels: int, readings: int, reports: int
) -> tuple[float, float]:
    """Seconds that a reading and a report take."""
    model = network(layers, channels)
    windows = Windows(model, find(model), 10)
    rng = np.random.default_rng(0)
    shape = windows.readings()[1].shape
    moves = [rng.normal(size=shape) * 0.01 + 1 for _ in range(KEPT_WINDOWS)]

    def read() -> None:
        windows.close(windows.readings()[1], 10)

    def report() -> None:
        layer_reports(windows.evidence(1000, 0.2))

    time_of_reading = seconds(read, readings)
    for move in moves:
        windows.close(windows.readings()[1] + move, 10)
    return time_of_reading, seconds(report, reports)


def plane(values: Sequence[float]) -> str:
    """The fitted costs, in words."""
    columns = [(1.0, layers, layers * channels) for layers, channels in SIZES]
    matrix, target = np.array(columns), np.array(values)
    # Relative errors count: otherwise the largest sizes alone would decide.
    weighted = matrix / target[:, None]
    costs, *_ = np.linalg.lstsq(weighted, np.ones(len(target)), rcond=None)
    error = float(np.median(np.abs(weighted @ costs - 1)))
    constant, layer, channel = costs
    return (
        f"{1e6 * constant:.0f} µs + {1e6 * layer:.1f} µs a layer + "
        f"{1e9 * channel:.2f} ns a channel ({error:.0%})"
    )


def deep(layers: int) -> keras.Model:
    """Dense layers with BN, to recalibrate."""
    stack: list[Any] = [keras.Input((WIDTH,))]
    for _ in range(layers):
        stack += [keras.layers.Dense(WIDTH), keras.layers.BatchNormalization()]
        stack += [keras.layers.ReLU()]
    return keras.Sequential(stack)


def recalibration_lines(repeats: int, batches: int) -> list[tuple[str, ...]]:
    """Lines of the table, one for each thing that grows."""
    rng = np.random.default_rng(0)
    largest = batches * BATCH * FACTORS[-1]
    x = rng.normal(3, 2, (largest, WIDTH)).astype("float32")
    rows = []
    for name in ("data", "layers", "passes"):
        cells = [name]
        for factor in FACTORS:
            model = deep(4 * factor if name == "layers" else 4)
            count = batches * BATCH * (factor if name == "data" else 1)
            refine = 3 * factor - 2 if name == "passes" else 1
            part = x[:count]

            def act(model: Any = model, part: Any = part, refine: int = refine) -> None:
                recalibrate(
                    model, part, batch_size=BATCH, refine=refine, verbose=0
                ).undo()

            cells.append(f"{seconds(act, repeats):.2f}")
        rows.append(tuple(cells))
        print("  ".join(cell.ljust(12) for cell in rows[-1]), flush=True)
    return rows


def main() -> None:
    """Prints the tables."""
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of a recalibration")
    parser.add_argument("--batches", type=int, default=100, help="of its base")
    parser.add_argument("--readings", type=int, default=50)
    parser.add_argument("--reports", type=int, default=7)
    options = parser.parse_args()
    section = Section("growth")
    pairs, rows = [], []
    for layers, channels in SIZES:
        pair = reading_and_report(layers, channels, options.readings, options.reports)
        pairs.append(pair)
        cells = [str(layers), str(channels), *(f"{1e3 * each:.2f}" for each in pair)]
        rows.append(cells)
        print("  ".join(cell.ljust(12) for cell in cells), flush=True)
    readings, reports = zip(*pairs, strict=True)
    slopes = f"- a reading: {plane(readings)}\n- a report: {plane(reports)}"
    print(slopes)
    base = f"{options.batches} batches of {BATCH}, 4 layers of {WIDTH} and 3 passes"
    body = PAGE.format(
        kept=KEPT_WINDOWS,
        readings=options.readings,
        reports=options.reports,
        sizes=table(("layers", "channels each", "reading, ms", "report, ms"), rows),
        slopes=slopes,
        repeats=options.repeats,
        base=base,
        recalibration=table(
            ("with more", *(f"{factor}×" for factor in FACTORS)),
            recalibration_lines(options.repeats, options.batches),
        ),
    )
    section.write(body, options.markdown)


if __name__ == "__main__":
    main()

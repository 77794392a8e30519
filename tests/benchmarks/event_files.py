"""What the TensorBoard view costs: bytes and time for models of some sizes.

    python tests/benchmarks/event_files.py

prints the table of docs/tensorboard.md. No model is trained: the reports are made up,
and written as BatchNormMonitor writes them.
"""

import io
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

import bn_callbacks.tensorboard.writer
from bn_callbacks.pictures import HeatMap
from bn_callbacks.report import BatchNormReport, layer_reports
from bn_callbacks.statistics.evidence import Evidence
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.tensorboard import ReportWriter
from bn_callbacks.tensorboard.event_file import EventFile

CHANNELS = 256
STEPS = 20
"""Reports in an epoch."""


class Cost(NamedTuple):
    """What was written and how long it took.

    Args:
        step: Bytes of a report within an epoch, all files together.
        epoch: Bytes that the end of an epoch adds, its picture included.
        seconds: Time of a report within an epoch.
        epoch_seconds: Time that the end of an epoch adds, with a picture.
    """

    step: float
    epoch: float
    seconds: float
    epoch_seconds: float


def make_report(layers: int, seed: int = 0) -> tuple[BatchNormReport, list[Evidence]]:
    """A report on layers of which every fifth is off, and what it is made of."""
    rng = np.random.default_rng(seed)
    evidence = []
    for index in range(layers):
        mean = rng.normal(0, 1, CHANNELS)
        shift = 0.05 if index % 5 else 0.8
        windows = Statistics(
            mean + rng.normal(0, 0.02, (6, CHANNELS)), np.ones((6, CHANNELS))
        )
        evidence.append(
            Evidence(
                path=f"resnet/stage_{index // 20}/block_{index % 20}/bn",
                momentum=0.99,
                epsilon=1e-3,
                moving=Statistics(
                    mean + rng.normal(0, shift, CHANNELS), np.ones(CHANNELS)
                ),
                batch=Statistics(windows.mean[-1], windows.variance[-1]),
                updates=100_000,
                start=Statistics(np.zeros(CHANNELS), np.ones(CHANNELS)),
                windows=windows,
                window_updates=50,
                window_share=0.02,
                batch_size=64,
            )
        )
    report = BatchNormReport(
        layer_reports(evidence), loss_batch=1.0, loss_inference=2.0
    )
    return report, evidence


def measure(layers: int, directory: Path) -> Cost:
    """Writes three epochs: the first opens and imports, the quicker one counts."""
    # As in a long training, of which each epoch pays for its picture.
    with mock.patch.object(bn_callbacks.tensorboard.writer, "PICTURE_SHARE", math.inf):
        writer = ReportWriter(directory)
    report, evidence = make_report(layers)
    clock = itertools.count(1)

    def write(ends_epoch: bool = False) -> tuple[int, float]:
        before, start = size(directory), time.perf_counter()
        writer.write(report, next(clock), evidence, ends_epoch)
        seconds = time.perf_counter() - start
        return size(directory) - before, seconds

    costs = []
    for _ in range(3):
        steps = [write() for _ in range(STEPS)]
        written, seconds = (
            statistics.median(each) for each in zip(*steps, strict=True)
        )
        epoch, epoch_seconds = write(ends_epoch=True)
        costs.append(Cost(written, epoch - written, seconds, epoch_seconds - seconds))
    writer.close()
    return min(costs[1:], key=lambda cost: cost.epoch_seconds)


def timed(do: Callable[[], Any]) -> float:
    """Milliseconds that something takes, the median of twenty times."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def write_singly(count: int, directory: Path) -> float:
    """Milliseconds for so many scalars, each by `tf.summary.scalar`."""

    def write() -> None:
        with writer.as_default():
            for index in range(count):
                tf.summary.scalar(f"bn/lag/bn_{index}", 0.5, 1)

    writer = tf.summary.create_file_writer(str(directory))
    return timed(write)


def write_by_summary_writer(count: int, directory: Path) -> float:
    """Milliseconds for the same as one event, by the writer of `tf.summary`."""

    def write() -> None:
        event = Summary(value=[scalar.value[0] for scalar in scalars])
        with writer.as_default():
            tf.summary.experimental.write_raw_pb(event.SerializeToString(), 1)

    writer = tf.summary.create_file_writer(str(directory))
    scalars = [scalar_pb(f"bn/lag/bn_{index}", 0.5) for index in range(count)]
    return timed(write)


def write_together(count: int, directory: Path) -> float:
    """Milliseconds for the same as one event, as we do it."""
    file = EventFile()
    summaries = [scalar_pb(f"bn/lag/bn_{index}", 0.5) for index in range(count)]
    return timed(lambda: file.write(str(directory), [(1, summaries)]))


def draw_by_pillow(layers: int, columns: int = 128) -> float:
    """Milliseconds for the heat map of a card."""
    rng = np.random.default_rng(0)
    lags = rng.uniform(0, 1, (layers, columns))
    marks = np.full(lags.shape, "", "<U1")
    marks[:, 40:60] = "C"
    paths = [f"stage_{index}/bn" for index in range(layers)]
    edges = list(range(columns + 1))
    shown = HeatMap(paths, edges, lags, marks, 0.2, "A title", {"C": "a cause"})
    return timed(shown.card)


def draw_by_matplotlib(layers: int, columns: int = 128) -> float:
    """Milliseconds for about the same, without the legend."""
    from matplotlib.figure import Figure

    lags = np.random.default_rng(0).uniform(0, 1, (layers, columns))

    def draw() -> None:
        figure = Figure((3.03, 2.15), dpi=100)
        axes = figure.add_axes((0.3, 0.2, 0.7, 0.7))
        axes.imshow(lags, aspect="auto")
        names = [f"stage_{index}/bn" for index in range(layers)]
        axes.set_yticks(range(layers), names, fontsize=7)
        for row in range(layers):
            axes.text(50, row, "C", fontsize=7)
        figure.savefig(io.BytesIO())

    return timed(draw)


def size(directory: Path) -> int:
    """Bytes of all files under a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> None:
    """Prints the table."""
    print("| layers | bytes a report | more at an epoch's end | ms a report | more |")
    print("|---:|---:|---:|---:|---:|")
    for layers in (1, 12, 54, 200, 500):
        with tempfile.TemporaryDirectory() as directory:
            cost = measure(layers, Path(directory))
        print(
            f"| {layers} | {cost.step:,.0f} | {cost.epoch:,.0f} "
            f"| {cost.seconds * 1e3:.1f} | {cost.epoch_seconds * 1e3:.0f} |"
        )
    with tempfile.TemporaryDirectory() as directory:
        ways = (write_singly, write_by_summary_writer, write_together)
        singly, other, ours = (write(60, Path(directory)) for write in ways)
    print(
        f"\n60 scalars: {singly:.1f} ms by tf.summary.scalar, as one event "
        f"{other:.2f} ms by its writer, {ours:.2f} ms by ours"
    )
    pillow, matplotlib = draw_by_pillow(15), draw_by_matplotlib(15)
    print(f"a heat map: {pillow:.0f} ms by Pillow, {matplotlib:.0f} ms by matplotlib")


if __name__ == "__main__":
    main()

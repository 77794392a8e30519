"""What the TensorBoard view costs: bytes and time for models of some sizes.

    python tests/benchmarks/event_files.py

prints the table of docs/tensorboard.md. No model is trained: the reports are made up,
and written as BatchNormMonitor writes them.
"""

import itertools
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

import bn_callbacks.tensorboard.writer
from bn_callbacks.report import BatchNormReport, layer_reports
from bn_callbacks.statistics.evidence import Evidence
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.tensorboard import ReportWriter

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


if __name__ == "__main__":
    main()

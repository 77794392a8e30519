"""What the TensorBoard view costs: bytes and time for models of some sizes.

    python tests/benchmarks/event_files.py

prints the table of docs/tensorboard.md. No model is trained: the reports are made up,
and written as BatchNormMonitor writes them.
"""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
        windows = [
            Statistics(mean + rng.normal(0, 0.02, CHANNELS), np.ones(CHANNELS))
            for _ in range(6)
        ]
        evidence.append(
            Evidence(
                path=f"resnet/stage_{index // 20}/block_{index % 20}/bn",
                momentum=0.99,
                epsilon=1e-3,
                moving=Statistics(
                    mean + rng.normal(0, shift, CHANNELS), np.ones(CHANNELS)
                ),
                batch=windows[-1],
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
    """Writes two epochs and a step, to which the first contributes no figure."""
    writer = ReportWriter(directory)
    step = 0
    costs = []
    for seed in range(2):
        report, evidence = make_report(layers, seed)
        before, start = size(directory), time.perf_counter()
        for _ in range(STEPS):
            step += 1
            writer.write(report, step, evidence)
        seconds = time.perf_counter() - start
        flush(writer)
        written, start = size(directory) - before, time.perf_counter()
        writer.write(report, step + 1, evidence, ends_epoch=True)
        step += 1
        epoch_seconds = time.perf_counter() - start
        epoch = size(directory) - before - written
        per_step = written / STEPS
        costs.append(
            Cost(
                per_step,
                epoch - per_step,
                seconds / STEPS,
                epoch_seconds - seconds / STEPS,
            )
        )
    writer.close()
    return costs[-1]


def flush(writer: ReportWriter) -> None:
    """What is still in memory has no size."""
    for file in writer._files():
        file.flush()


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

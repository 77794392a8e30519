"""What recalibration costs, as ratios to an inference pass over the same batches.

    python tests/benchmarks/recalibration.py [--repeats 9] [--models mlp resnet50 ...]
                                             [--markdown docs/benchmarks.md]

Time: all variants of a model run in one process, interleaved, each traced before; the
figures are medians over the repeats, with the quartiles of the ratio. Memory: the peak
of a fresh process that builds the model and makes one pass, tracing included.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from page import Section, quartiles, table

from bn_callbacks import recalibrate
from bn_callbacks.layers import find, read
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Population


def mlp() -> tuple[keras.Model, tuple[int, ...]]:
    """Three dense layers of 1024, each with BN."""
    layers: list[Any] = [keras.Input((1024,))]
    for _ in range(3):
        layers += [
            keras.layers.Dense(1024),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*layers, keras.layers.Dense(10)]), (1024,)


def application(name: str) -> Callable[[], tuple[keras.Model, tuple[int, ...]]]:
    """A network of `keras.applications` at 96×96, with random weights."""

    def build() -> tuple[keras.Model, tuple[int, ...]]:
        shape = (96, 96, 3)
        make = getattr(keras.applications, name)
        return make(weights=None, input_shape=shape, classes=10), shape

    return build


MODELS = {
    "mlp": mlp,
    "mobilenetv2": application("MobileNetV2"),
    "resnet50": application("ResNet50"),
}


def variants(model: keras.Model) -> dict[str, Callable[[Batches], None]]:
    """Each way to pass over batches, by name."""
    layers = find(model)
    population = Population(model, layers)
    stored = read(layers)
    infer = tf.function(lambda x: model(x, training=False), autograph=False)
    train = tf.function(lambda x: model(x, training=True), autograph=False)

    def each(function: Callable[[Any], Any]) -> Callable[[Batches], None]:
        def run(batches: Batches) -> None:
            for batch in batches:
                function(batch[0])

        return run

    return {
        "inference": each(infer),
        "first pass": lambda batches: void(population.measure(batches)),
        "refinement pass": lambda batches: void(population.measure(batches, stored)),
        "Keras training forward": each(train),
        "eager training forward": each(lambda x: model(x, training=True)),
    }


def void(_: Any) -> None:
    """Makes a measurement a statement."""


PEAKS = ("inference", "recalibrate(refine=0)")
MB = 2**20


class Time(NamedTuple):
    """One line of the table of times: milliseconds a batch, ratio and quartiles."""

    model: str
    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float


class Peak(NamedTuple):
    """One line of the table of memory: MB of both processes, the medians."""

    model: str
    inference: float
    recalibration: float
    difference: float
    low: float
    high: float


def prepare(name: str, options: argparse.Namespace) -> tuple[keras.Model, Any]:
    """A model and data for it; more batches for the one that is fast."""
    keras.utils.set_random_seed(0)
    model, shape = MODELS[name]()
    count = options.batches * (10 if name == "mlp" else 1) * options.batch_size
    return model, np.random.default_rng(0).normal(size=(count, *shape)).astype("f")


def measure_times(name: str, options: argparse.Namespace) -> list[Time]:
    """Times all variants of one model."""
    model, x = prepare(name, options)
    tensors = list(Batches(x, batch_size=options.batch_size))
    # Read once, so that they stay what they are: tensors.
    batches = Batches(iter(tensors))
    runs = variants(model)
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    for repeat in range(options.repeats + 1):
        for variant, run in runs.items():
            start = time.perf_counter()
            run(batches)
            if repeat:
                times[variant].append((time.perf_counter() - start) / len(tensors))
    base = np.array(times["inference"])
    lines = []
    for variant, seconds in times.items():
        ratios = np.array(seconds) / base
        low, middle, high = quartiles(ratios)
        lines.append(
            Time(name, variant, 1e3 * float(np.median(seconds)), middle, low, high)
        )
    return lines


def measure_peaks(name: str, options: argparse.Namespace) -> Peak:
    """Compares the peaks of processes that make one pass of either kind."""
    command = [sys.executable, __file__, "--models", name]
    command += ["--batches", str(options.batches)]
    command += ["--batch-size", str(options.batch_size)]
    peaks: dict[str, list[float]] = {variant: [] for variant in PEAKS}
    for _ in range(options.memory_repeats):
        for variant, values in peaks.items():
            output = subprocess.run(
                [*command, "--peak", variant], check=True, stdout=subprocess.PIPE
            ).stdout
            values.append(int(output.split()[-1]) / MB)
    inference, recalibration = (np.array(values) for values in peaks.values())
    difference = recalibration - inference
    low, middle, high = quartiles(difference)
    return Peak(
        name,
        float(np.median(inference)),
        float(np.median(recalibration)),
        middle,
        low,
        high,
    )


def make_pass(name: str, variant: str, options: argparse.Namespace) -> None:
    """Builds a model, makes one pass over its data, prints this process' peak."""
    model, x = prepare(name, options)
    if variant == "inference":
        infer = tf.function(
            lambda x: model(x, training=False),
            autograph=False,
            reduce_retracing=True,
        )
        for batch in Batches(x, batch_size=options.batch_size):
            infer(batch[0])
    else:
        recalibrate(model, x, batch_size=options.batch_size, refine=0, verbose=0)
    print(peak_memory())


def peak_memory() -> int:
    """Most memory, in bytes, that this process has had resident at a time."""
    try:
        # `ru_maxrss` would begin with what the parent had when it forked.
        status = Path("/proc/self/status").read_text("ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


TIMES_HEAD = ("model", "pass", "ms a batch", "ratio", "quartiles")
PEAKS_HEAD = ("model", *PEAKS, "difference", "quartiles")


def time_cells(line: Time) -> tuple[str, ...]:
    """A line of the table of times, as text."""
    return (
        line.model,
        line.variant,
        f"{line.milliseconds:.2f}",
        f"{line.ratio:.2f}",
        f"{line.low:.2f} to {line.high:.2f}",
    )


def peak_cells(line: Peak) -> tuple[str, ...]:
    """A line of the table of memory, as text."""
    return (
        line.model,
        f"{line.inference:.0f} MB",
        f"{line.recalibration:.0f} MB",
        f"{line.difference:+.0f} MB",
        f"{line.low:+.0f} to {line.high:+.0f} MB",
    )


PAGE = """\
As ratios to an inference pass over the same batches of {batch_size}. *mlp* has three
dense layers of 1024, each with `BatchNormalization`; the others are those of
`keras.applications` at 96×96.

### Time

All passes over one model run in one process, in turn, traced before. The ratio is to
the inference pass of the same repeat: the median of {repeats}, and the quartiles. The
limit that we set ourselves is 1.15 for the first pass. The *eager training forward* is
the loop that people write by hand.

{times}

### Memory

The peak (resident set) of a fresh process that builds the model and makes one pass,
tracing included: medians over {memory_repeats} processes each. The limit that we set
ourselves is a difference of 64 MB.

{peaks}
"""


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory-repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--markdown", type=Path, help="the page to write this into")
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        make_pass(options.models[0], options.peak, options)
        return
    section = Section("recalibration")
    peaks = []
    for name in options.models:
        peaks.append(peak_cells(measure_peaks(name, options)))
        print("memory  " + "  ".join(peaks[-1]))
    print()
    times = []
    for name in options.models:
        for line in measure_times(name, options):
            times.append(time_cells(line))
            print("  ".join(cell.ljust(22) for cell in times[-1]))
    body = PAGE.format(
        repeats=options.repeats,
        batch_size=options.batch_size,
        memory_repeats=options.memory_repeats,
        times=table(TIMES_HEAD, times),
        peaks=table(PEAKS_HEAD, peaks),
    )
    section.write(body, options.markdown)


if __name__ == "__main__":
    main()

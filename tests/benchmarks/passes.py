"""What a pass over data costs: time and memory, beside an inference pass.

    python tests/benchmarks/passes.py [--repeats 5] [--batch-size 32] [--models mlp ...]
        [--peaks mlp ...] [--markdown docs/benchmarks.md]

Each table has a list of what it is made for; an empty list leaves it out. Times are
taken in one process, in turn, and are medians over the repeats; each peak of memory is
that of a fresh process.
"""

import argparse
import math
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
from networks import CLASSES, application, plain
from page import Section, new_parser, quartiles, table

from bn_callbacks import recalibrate
from bn_callbacks.layers import find, read
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.measuring.sample import JOINED, Joined


def wide_mlp(size: int) -> keras.Model:
    """Three dense layers of 1024, each with BN; of rows of `size` numbers."""
    layers: list[Any] = [keras.Input((size,))]
    for _ in range(3):
        layers += [
            keras.layers.Dense(1024),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*layers, keras.layers.Dense(CLASSES)])


class Model(NamedTuple):
    """A model with random weights, and how much data it is measured with.

    Args:
        build: Makes it for a size.
        size: Width and height of images, or the width of rows.
        examples: How many there are.
    """

    build: Callable[[int], keras.Model]
    size: int
    examples: int


MODELS = {
    "mlp": Model(wide_mlp, 1024, 4096),
    "mobilenetv2": Model(application("MobileNetV2"), 96, 256),
    "resnet50": Model(application("ResNet50"), 96, 256),
}
PEAKS = {
    "mlp": Model(wide_mlp, 1024, 4096),
    "plain16": Model(plain, 32, 2048),
    "mobilenetv2": Model(application("MobileNetV2"), 96, 256),
    "resnet50": Model(application("ResNet50"), 96, 256),
    "resnet50-224": Model(application("ResNet50"), 224, 96),
}
"""With more examples than the sample holds, where these are few."""


def variants(model: keras.Model) -> dict[str, Callable[[Batches], object]]:
    """Each way to pass over batches, by name."""
    layers = find(model)
    population = Population(model, layers)
    stored = read(layers)
    infer = tf.function(lambda x: model(x, training=False), autograph=False)
    train = tf.function(lambda x: model(x, training=True), autograph=False)

    def each(function: Callable[[Any], Any]) -> Callable[[Batches], None]:
        def run(batches: Batches) -> None:
            for batch in batches:
                outputs = function(batch[0])
            np.asarray(outputs)

        return run

    return {
        "inference": each(infer),
        "statistics given": lambda batches: population.measure(batches, stored),
        "statistics given, batches joined": lambda batches: population.measure(
            Joined(batches, JOINED), stored
        ),
        "statistics by batch": population.measure,
        "Keras training forward": each(train),
        "eager training forward": each(lambda x: model(x, training=True)),
    }


class Bytes(NamedTuple):
    """One line of the table of bytes: a batch of one model."""

    model: str
    megabytes: float
    milliseconds: float
    inference: float


def bytes_read_more(name: str, batch_size: int, inference: float) -> Bytes:
    """What one more reading of every layer's input costs, if it comes from memory."""
    model, _ = prepare(MODELS[name])
    sizes = [math.prod(bn.layer.input.shape[1:]) for bn in find(model)]
    total = 4 * batch_size * sum(sizes)
    # Too large for any cache.
    block = tf.zeros(64 * MB // 4)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        np.asarray(tf.reduce_sum(block))
        times.append(time.perf_counter() - start)
    cost = float(np.median(times)) * total / (64 * MB)
    return Bytes(name, total / MB, 1e3 * cost, inference)


MB = 2**20
WAYS = ("inference", "refine=0", "default")
"""Ways to pass over data whose peaks are compared."""


class Time(NamedTuple):
    """One line of the table of times: milliseconds a batch, ratio and quartiles."""

    model: str
    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float


class Peak(NamedTuple):
    """One line of the table of memory: what it is for, and medians in MB."""

    model: str
    examples: int
    size: int
    medians: dict[str, float]


def prepare(model: Model) -> tuple[keras.Model, Any]:
    """A model, and noise for it."""
    keras.utils.set_random_seed(0)
    made = model.build(model.size)
    shape = (model.examples, *made.input_shape[1:])
    return made, np.random.default_rng(0).normal(size=shape).astype("f")


def measure_times(name: str, options: argparse.Namespace) -> list[Time]:
    """Times all variants of one model."""
    model, x = prepare(MODELS[name])
    tensors = list(Batches(x, batch_size=options.batch_size))[: options.batches]
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
    """Compares the peaks of processes that make passes of each kind."""
    command = [sys.executable, __file__, "--peaks", name]
    command += ["--batch-size", str(options.batch_size)]
    medians = {}
    for way in WAYS:
        peaks = [
            int(
                subprocess.run(
                    [*command, "--peak", way], check=True, stdout=subprocess.PIPE
                ).stdout.split()[-1]
            )
            for _ in range(options.memory_repeats)
        ]
        medians[way] = float(np.median(peaks)) / MB
    model = PEAKS[name]
    return Peak(name, model.examples, model.size, medians)


def make_passes(name: str, way: str, batch_size: int) -> None:
    """Builds a model, passes over its data, prints this process' peak."""
    model, x = prepare(PEAKS[name])
    if way == "inference":
        infer = tf.function(
            lambda x: model(x, training=False),
            autograph=False,
            reduce_retracing=True,
        )
        for batch in Batches(x, batch_size=batch_size):
            infer(batch[0])
    else:
        refine: Any = "auto" if way == "default" else 0
        recalibrate(model, x, batch_size=batch_size, refine=refine, verbose=0)
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


def bytes_cells(line: Bytes) -> tuple[str, ...]:
    """A line of the table of bytes, as text."""
    return (
        line.model,
        f"{line.megabytes:.0f} MB",
        f"{line.milliseconds:.1f} ms",
        f"{line.inference:.1f} ms",
        f"{1 + line.milliseconds / line.inference:.2f}",
        f"{1 + 2 * line.milliseconds / line.inference:.2f}",
    )


BYTES_HEAD = (
    *("model", "inputs of BN layers", "to read them once", "inference"),
    *("ratio with one reading more", "with two"),
)
TIMES_HEAD = ("model", "pass", "ms a batch", "ratio", "quartiles")
PEAKS_HEAD = ("model", "size", "examples", "inference", "`refine=0`", "default")


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
    base = line.medians["inference"]
    return (
        line.model,
        str(line.size),
        f"{line.examples:,}",
        f"{base:.0f} MB",
        f"{line.medians['refine=0'] - base:+.0f} MB",
        f"{line.medians['default'] - base:+.0f} MB",
    )


PASSES = """\
### Time

As ratios to an inference pass over the same batches of {batch_size}, with random
weights. *mlp* has three dense layers of 1024, each with `BatchNormalization`; the
others are those of `keras.applications` at 96×96.

All passes over one model run in one process, in turn, traced before. The ratio is to
the inference pass of the same repeat: the median of {repeats}, and the quartiles. With
statistics given, which is what the passes of a recalibration are, batches may be joined
to larger ones, up to {joined} examples; the limit that we set ourselves for it is 1.15.
The *eager training forward* is the loop that people write by hand.

{table}

Why not less: moments need the whole input of a layer before its output can begin. So
it is read once or twice more (for the mean, and for the variance about it), and from
memory where it does not fit into a cache. Inference reads it once, and may do so while
the convolution before is still at work. At the speed at which this machine reads 64 MB,
the readings alone, for a batch of {batch_size}, cost:

{bytes}
"""
MEMORY = """\
### Memory

The peak (resident set) of a fresh process that builds the model, with random weights,
and makes an inference pass in batches of {batch_size}; and what `recalibrate` takes
beyond that, tracing included, in its one pass with `refine=0` and by default: medians
over {memory_repeats} processes each. A sample of the data is to take 256 MB at most.

{table}
"""


def main() -> None:
    """Prints the tables."""
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, help="batches of a pass, at most")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="to time")
    parser.add_argument("--peaks", nargs="*", default=list(PEAKS), help="for memory")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for chosen, known in ((options.models, MODELS), (options.peaks, PEAKS)):
        for each in chosen:
            if each not in known:
                parser.error(f"no {each!r} there; there are {', '.join(known)}")
    if options.peak:
        make_passes(options.peaks[0], options.peak, options.batch_size)
        return
    section = Section("passes")
    times, peaks, read_more = [], [], []
    for name in options.models:
        for line in measure_times(name, options):
            times.append(time_cells(line))
            if line.variant == "inference":
                more = bytes_read_more(name, options.batch_size, line.milliseconds)
                read_more.append(bytes_cells(more))
            print("  ".join(cell.ljust(22) for cell in times[-1]), flush=True)
    for name in options.peaks:
        peaks.append(peak_cells(measure_peaks(name, options)))
        print("memory  " + "  ".join(peaks[-1]), flush=True)
    parts = []
    if times:
        parts.append(
            PASSES.format(
                batch_size=options.batch_size,
                repeats=options.repeats,
                joined=JOINED,
                table=table(TIMES_HEAD, times),
                bytes=table(BYTES_HEAD, read_more),
            )
        )
    if peaks:
        parts.append(
            MEMORY.format(
                batch_size=options.batch_size,
                memory_repeats=options.memory_repeats,
                table=table(PEAKS_HEAD, peaks),
            )
        )
    section.write("\n".join(parts), options.markdown)


if __name__ == "__main__":
    main()

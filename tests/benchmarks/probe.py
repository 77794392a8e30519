"""What a probe costs at each epoch's end: the three losses, in inference passes.

python tests/benchmarks/probe.py [--models mlp plain16 ...] [--repeats 5]
                                 [--markdown docs/benchmarks.md]
"""

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import networks
import numpy as np
from overhead import mlp
from page import Section, new_parser, table

from bn_callbacks.layers import read
from bn_callbacks.measuring import probe as probes
from bn_callbacks.measuring.probe import SAMPLE, Probe

BATCH = 32


def frames() -> keras.Model:
    """Three layers that each of eight time steps calls."""
    stack: list[Any] = [keras.Input((8, 64))]
    for _ in range(3):
        dense = keras.layers.TimeDistributed(keras.layers.Dense(128))
        norm = keras.layers.TimeDistributed(keras.layers.BatchNormalization())
        stack += [dense, norm, keras.layers.ReLU()]
    return keras.Sequential([*stack, keras.layers.Flatten(), keras.layers.Dense(10)])


def twins() -> keras.Model:
    """Twelve layers that are called on two kinds of inputs."""
    stack: list[Any] = [keras.Input((64,))]
    for _ in range(12):
        stack += [keras.layers.Dense(128), keras.layers.BatchNormalization()]
        stack += [keras.layers.ReLU()]
    encoder = keras.Sequential(stack)
    inputs = keras.Input((64,))
    both = keras.layers.Concatenate()([encoder(inputs), encoder(0.2 * inputs + 5)])
    return keras.Model(inputs, keras.layers.Dense(10)(both))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "mlp": mlp,
    "plain16": lambda: networks.plain(32),
    "8 time steps": frames,
    "two domains": twins,
}
PAGE = """\
The three losses of a probe of {examples} examples in batches of {batch}, as they are
measured at each epoch's end, traced before: CPU time, which other work on the machine
disturbs less, medians of {repeats}. **B** and **I** are a pass each. For **R** the
examples are run as one batch and then measured with what that has shown; where layers
are called several times, which no one batch can stand for, at most {most} passes look
for statistics that suit all calls. *Steps* is what all of it takes in training steps on
such a batch.

{rows}
"""
HEAD = ("model", "BN layers", "ms of I", "B", "R", "all three", "steps")


def cpu(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of all cores."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return float(np.median(found))


def row(name: str, repeats: int) -> tuple[str, ...]:
    """A line of the table."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=False)
    draw = np.random.default_rng(0)
    x = draw.normal(1, 1, (SAMPLE, *model.input_shape[1:])).astype("float32")
    y = draw.integers(10, size=SAMPLE)
    model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0)
    probe = Probe(model, (x, y))
    probe.measure(BATCH)
    population, batches = probe._population, probe._batches
    stored = read(probe.layers)
    inference = cpu(lambda: population.measure(batches, stored), repeats)
    by_batch = cpu(lambda: population.measure(batches), repeats)
    consistent = cpu(
        lambda: probes._consistent_losses(population, probe._solver, batches, stored),
        repeats,
    )
    whole = inference + by_batch + consistent
    step = cpu(lambda: model.train_on_batch(x[:BATCH], y[:BATCH]), 20 * repeats)
    return (
        name,
        str(len(probe.layers)),
        f"{1e3 * inference:.0f}",
        f"{by_batch / inference:.1f}",
        f"{consistent / inference:.1f}",
        f"{whole / inference:.1f}",
        f"{whole / step:.0f}",
    )


def main() -> None:
    """Prints the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    section = Section("probe")
    rows = []
    for name in options.models:
        rows.append(row(name, options.repeats))
        print("  ".join(rows[-1]), flush=True)
    body = PAGE.format(
        examples=SAMPLE,
        batch=BATCH,
        repeats=options.repeats,
        most=probes.MOST_PASSES,
        rows=table(HEAD, rows),
    )
    section.write(body, options.markdown)


if __name__ == "__main__":
    main()

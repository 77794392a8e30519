"""What recalibration costs on 1, 2 and 4 replicas, and on 1 and 2 machines.

    python tests/benchmarks/replicas.py [--repeats 5]

Replicas are logical devices of one CPU, workers processes on one machine: all share the
same cores, so that no pass can become faster. What shows is what dividing the work and
putting the results together cost; what a second GPU gains does not.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import tensorflow as tf
from cluster import add_devices, mirrored, workers

from bn_callbacks.measuring.data import Batches
from bn_callbacks.recalibration import Recalibration

REPLICAS = (1, 2, 4)
SAMPLES, SIZE, BATCH = 4096, 512, 64


def build(blocks: int) -> keras.Model:
    """Dense layers of `SIZE`, each with BN."""
    layers: list[Any] = [keras.Input((SIZE,))]
    for _ in range(blocks):
        layers += [keras.layers.Dense(SIZE), keras.layers.BatchNormalization()]
    return keras.Sequential(layers)


def milliseconds(model: keras.Model, repeats: int) -> float:
    """The median over the repeats of one pass, without tracing."""
    x = np.random.default_rng(0).normal(size=(SAMPLES, SIZE)).astype("float32")
    recalibration = Recalibration(model, Batches(x, batch_size=BATCH), refine=0)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        recalibration.run(verbose=0)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[1:]))


def on_replicas(repeats: int) -> None:
    """Prints the cost for each number of replicas."""
    add_devices()
    for blocks in (3, 30):
        print(f"{blocks} layers, {SAMPLES // BATCH} batches of {BATCH}")
        print(f"  no strategy  {milliseconds(build(blocks), repeats):8.1f} ms a pass")
        for count in REPLICAS:
            with mirrored(count).scope():
                model = build(blocks)
            took = milliseconds(model, repeats)
            print(f"  {count} replica{'s' * (count > 1)}   {took:8.1f} ms a pass")


def on_workers(repeats: int) -> None:
    """Prints the cost for two workers, each a process, that share the same data."""
    command = [sys.executable, __file__, "--repeats", str(repeats), "--worker"]
    with workers(2, command) as processes:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    print(outputs[0], end="")


def as_worker(repeats: int) -> None:
    """What each of the workers does."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    for blocks in (3, 30):
        with strategy.scope():
            model = build(blocks)
        took = milliseconds(model, repeats)
        print(f"{blocks} layers\n  2 workers    {took:8.1f} ms a pass")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        as_worker(options.repeats)
    else:
        on_replicas(options.repeats)
        on_workers(options.repeats)

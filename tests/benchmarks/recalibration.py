"""What recalibration costs, as ratios to an inference pass over the same batches.

    python tests/benchmarks/recalibration.py [--repeats 9] [--models mlp resnet50 ...]

All variants of a model run in one process, interleaved, each traced before; the
figures are medians over the repeats, with the quartiles of the ratio.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from bn_callbacks.data import Batches
from bn_callbacks.layers import find, read
from bn_callbacks.population import Population


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


def variants(model: keras.Model) -> dict[str, Callable[[list[Any]], None]]:
    """Each way to pass over a list of batches, by name."""
    layers = find(model)
    population = Population(model, layers)
    stored = read(layers)
    infer = tf.function(lambda x: model(x, training=False), autograph=False)
    train = tf.function(lambda x: model(x, training=True), autograph=False)

    def each(function: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
        def run(batches: list[Any]) -> None:
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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, "
        f"{os.cpu_count()} cores"
    )
    print(f"{'model':12}  {'pass':24}  ms/batch  ratio  quartiles")
    for name in options.models:
        keras.utils.set_random_seed(0)
        model, shape = MODELS[name]()
        count = options.batches * (10 if name == "mlp" else 1)
        x = np.random.default_rng(0).normal(size=(count * options.batch_size, *shape))
        batches = list(Batches(x, batch_size=options.batch_size))
        runs = variants(model)
        times: dict[str, list[float]] = {variant: [] for variant in runs}
        for repeat in range(options.repeats + 1):
            for variant, run in runs.items():
                start = time.perf_counter()
                run(batches)
                if repeat:
                    times[variant].append((time.perf_counter() - start) / count)
        base = np.array(times["inference"])
        for variant, seconds in times.items():
            ratios = np.array(seconds) / base
            low, high = np.quantile(ratios, [0.25, 0.75])
            print(
                f"{name:12}  {variant:24}  {1e3 * np.median(seconds):8.2f}  "
                f"{np.median(ratios):5.2f}  {low:.2f}-{high:.2f}"
            )


if __name__ == "__main__":
    main()

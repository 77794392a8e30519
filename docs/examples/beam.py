"""Shards that a data engine reads: two rounds of Apache Beam, with its local runner.

    python -m pip install ".[demo,hosts]"      # from a clone
    python docs/examples/beam.py

The pictures of five scanners lie in a file each. Workers load the model, measure their
shards and give back counts, means and squared deviations; the engine merges these as
they come, in any order. In the second round workers get the statistics of the first as
a side input. A layer is right one round after the layers before it, so that two rounds
are enough for two layers: the result is that of `recalibrate` with all pictures in one
place. In several processes, as on several machines:

    python docs/examples/beam.py --direct_running_mode multi_processing
"""

import functools
import tempfile
from pathlib import Path

import apache_beam as beam
import keras
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from sklearn.datasets import load_digits

import bn_callbacks as bn

SCANNERS = 5
SHARD = 256


class Measure(beam.DoFn):
    """Measures a shard with the saved model, which a worker loads once."""

    def __init__(self, path):
        self.path = path

    def setup(self):
        self.model = keras.models.load_model(self.path)

    def process(self, shard, statistics=None):
        yield bn.measure(self.model, np.load(shard), statistics=statistics)


def merged(parts):
    """Merges parts, which may be merged ones; the engine decides in which order."""
    return functools.reduce(bn.PopulationMoments.merge, parts)


def measure(model, shards, result):
    """Two rounds in one pipeline, whose result goes into a file."""
    # The runner is the local one; options of Beam's are read from the command line.
    with beam.Pipeline("FnApiRunner", options=PipelineOptions()) as pipeline:
        shards = pipeline | beam.Create(shards)
        first = (
            shards
            | "measure" >> beam.ParDo(Measure(model))
            | "merge" >> beam.CombineGlobally(merged).without_defaults()
        )
        second = (
            shards
            | "measure again"
            >> beam.ParDo(Measure(model), statistics=beam.pvalue.AsSingleton(first))
            | "merge again" >> beam.CombineGlobally(merged).without_defaults()
        )
        second | beam.Map(lambda moments: moments.save(result))


def main():
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16).astype("float32"), y[order]
    for scanner in range(SCANNERS):  # Each has a brightness of its own.
        x[scanner * SHARD : (scanner + 1) * SHARD] += 0.2 * scanner
    x[SCANNERS * SHARD :] += np.float32(0.4)
    x_train, y_train = x[: SCANNERS * SHARD], y[: SCANNERS * SHARD]

    model = keras.Sequential([keras.Input((64,))])
    for _ in range(2):
        model.add(keras.layers.Dense(64))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(x_train, y_train, batch_size=64, epochs=5, verbose=0)

    def show(name):
        loss, right = model.evaluate(
            x[SCANNERS * SHARD :], y[SCANNERS * SHARD :], verbose=0
        )
        print(f"{name}: validation loss {loss:.4f}, accuracy {right:.1%}")
        return [layer.moving_variance.numpy() for layer in model.layers[1::3]]

    show("as trained      ")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save(folder / "model.keras")
        shards = [str(folder / f"scanner_{number}.npy") for number in range(SCANNERS)]
        for shard, pictures in zip(shards, np.split(x_train, SCANNERS), strict=True):
            np.save(shard, pictures)
        result = str(folder / "moments.npz")
        measure(str(folder / "model.keras"), shards, result)
        moments = bn.PopulationMoments.load(result)
    report = bn.apply_statistics(model, moments)
    ours = show("two rounds      ")
    print(f"{moments.samples} pictures. {report.notes[0]}")
    report.undo()
    bn.recalibrate(model, x_train, verbose=0)
    theirs = show("all in one place")
    off = np.abs(np.concatenate(ours) / np.concatenate(theirs) - 1).max()
    print(f"variances differ by {off:.1e} at most")


if __name__ == "__main__":
    main()

"""20,000 steps in 5 fits with one instance of each callback: nothing grows."""

import gc
import os
import threading
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf
from models import normal

from bn_callbacks import (
    BatchNormMonitor,
    DebiasBatchNorm,
    RecalibrateBatchNorm,
    recalibrate,
)

FITS, STEPS, EPOCHS = 5, 4000, 4
BATCH = 4
STATUS = Path("/proc/self/statm")


def living() -> dict[str, int]:
    """What must not become more from one `fit` to the next."""
    gc.collect()
    graphs = functions = variables = 0
    for thing in gc.get_objects():
        # Not `isinstance`, which asks proxies for what they stand for.
        kind = type(thing).__name__
        graphs += kind == "FuncGraph"
        functions += kind == "ConcreteFunction"
        variables += kind == "ResourceVariable"
    files = Path("/proc/self/fd")
    return {
        "threads": threading.active_count(),
        "files": len(list(files.iterdir())) if files.exists() else 0,
        "graphs": graphs,
        "traced functions": functions,
        "variables": variables,
    }


def resident() -> float:
    """Memory of this process, in MB."""
    pages = int(STATUS.read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(tmp_path: Path, fits: int, steps: int) -> list[tuple[dict[str, int], float]]:
    """Trains again and again; what lives after each `fit`."""
    model = keras.Sequential([keras.Input((4,))])
    for _ in range(2):
        model.add(keras.layers.Dense(8))
        model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.Dense(1))
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    per_epoch = steps // EPOCHS
    x = normal(per_epoch * BATCH, 4)
    y = x[:, :1]
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    callbacks: list[Any] = [
        BatchNormMonitor(tmp_path / "logs", probe=(x[:32], y[:32]), on_lag="ignore"),
        DebiasBatchNorm(),
        RecalibrateBatchNorm(x[:64], validation_data=(x[:32], y[:32])),
        RecalibrateBatchNorm(x[:64], when="validation"),
    ]
    seen = []
    for _ in range(fits):
        model.fit(
            data,
            epochs=EPOCHS,
            validation_data=(x[:32], y[:32]),
            verbose=0,
            callbacks=callbacks,
        )
        seen.append((living(), resident() if STATUS.exists() else 0.0))
    made = int(model.optimizer.iterations.numpy())
    assert made == fits * EPOCHS * per_epoch
    return seen


def check(seen: list[tuple[dict[str, int], float]], megabytes: float) -> None:
    """The first two fits trace, and fill caches; then all stays as it is."""
    settled, last = seen[1], seen[-1]
    assert last[0] == settled[0]
    assert last[1] - settled[1] <= megabytes, [round(rss) for _, rss in seen]


@pytest.mark.slow
def test_nothing_grows_in_short_fits(tmp_path: Path) -> None:
    check(run(tmp_path, fits=3, steps=40), megabytes=30)


@pytest.mark.slow
def test_nothing_grows_in_20_000_steps(tmp_path: Path) -> None:
    check(run(tmp_path, FITS, STEPS), megabytes=20)


@pytest.mark.slow
def test_nothing_grows_in_many_recalibrations() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    x = normal(64, 4)
    seen = []
    for _ in range(4):
        for _ in range(15):
            recalibrate(model, x, verbose=0)
        seen.append((living(), resident() if STATUS.exists() else 0.0))
    check(seen, megabytes=10)

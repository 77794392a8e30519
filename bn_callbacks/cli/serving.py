"""Exports a SavedModel, and proves that it computes what the model does."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.cli import served
from bn_callbacks.cli.errors import CommandError, text_of
from bn_callbacks.cli.writing import temporary_folder
from bn_callbacks.layers import (
    compute_precision,
    forward,
    stateless,
    takes_any_batch,
    to_model_inputs,
)
from bn_callbacks.measuring.data import Batch

SAMPLES = 128
"""Smallest number of samples to compare, in whole batches; enough to see mistakes in a
graph."""

BOUND = 1e-3
"""Largest difference in an output, in standard deviations of that output."""

ROUNDING = 32
"""Rounding errors allowed in addition, in machine epsilons of the output."""

PACKAGES = ("bn_callbacks", "tensorflow", "numpy")
"""Packages that the serving process imports."""

Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class Proof:
    """The result of the comparison.

    Args:
        difference: The largest difference of an output, in its standard deviations.
        samples: The samples compared.
        bound: The largest difference allowed.
    """

    difference: float
    samples: int
    bound: float = BOUND

    def __str__(self) -> str:
        return (
            f"Loaded with TensorFlow alone, its outputs on {self.samples:,} samples "
            f"differ from the model's by at most {self.difference:.2g} standard "
            f"deviations (bound: {self.bound:g})."
        )


def export_saved_model(model: keras.Model, path: Path) -> None:
    """Writes a SavedModel, and hides the page that Keras prints about it.

    Raises:
        CommandError: Keras cannot make a graph of the model.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model.export(str(path))
    except (OSError, tf.errors.OpError):
        raise
    except Exception as error:
        raise CommandError(
            f"Keras cannot export the model: {text_of(error)}. Nothing was left "
            "behind. In Python, model.export('serving') shows where it fails."
        ) from error


@dataclass(frozen=True)
class Expectation:
    """What an export must compute.

    Args:
        inputs: The model's inputs in each batch.
        outputs: The model's outputs for them.
        samples: Number of samples in all batches.
        precision: Machine epsilon of the model's computations.
    """

    inputs: list[Arrays]
    outputs: list[Arrays]
    samples: int
    precision: float


def expect(model: keras.Model, batches: Iterable[Batch]) -> Expectation:
    """Computes what an export of the model, as it is now, must compute from data.

    Calls the model in inference mode, layer by layer and without a graph. The first
    sample is used twice, the second time alone, as a batch of another size.
    """
    inputs: list[Arrays] = []
    outputs: list[Arrays] = []
    samples = 0
    for x, *_ in batches:
        size = int(tf.nest.flatten(x)[0].shape[0])
        parts = [x]
        if not samples and size > 1 and takes_any_batch(model):
            parts.append(tf.nest.map_structure(lambda tensor: tensor[:1], x))
        for part in parts:
            with tf.device("/CPU:0"), stateless(model):
                result = forward(model, part, training=False)
                given = to_model_inputs(model, part)
            inputs.append([served.storable(one) for one in given])
            outputs.append([served.storable(one) for one in tf.nest.flatten(result)])
        samples += size
        if samples >= SAMPLES:
            break
    return Expectation(inputs, outputs, samples, compute_precision(model))


def verify(path: Path, expected: Expectation) -> Proof:
    """Compares the outputs of a SavedModel with what it must compute.

    Another process loads it with TensorFlow. Importing Keras fails there, as on a
    server, so a graph that depends on this process, such as `tf.numpy_function`, does
    not run. Both processes use the CPU, so that only the export makes a difference.

    Args:
        path: The SavedModel's directory.
        expected: What it must compute.

    Raises:
        CommandError: It does not run, or computes something else.
    """
    results = _serve(path, expected.inputs)
    worst = 0.0
    for index in range(len(expected.outputs[0])):
        wanted = [outputs[index] for outputs in expected.outputs]
        given = [outputs[index] for outputs in results]
        worst = max(worst, _difference(wanted, given, expected.precision))
    if not worst <= BOUND:
        raise CommandError(
            "The export does not compute what the model does, and was removed. "
            f"Received: outputs on {expected.samples:,} samples that differ by up to "
            f"{worst:.2g} standard deviations (bound: {BOUND:g}). Look for layers that "
            "draw random numbers, or run in training mode where `training` is not "
            "passed."
        )
    return Proof(worst, expected.samples)


def _serve(path: Path, inputs: list[Arrays]) -> list[Arrays]:
    """The outputs of a SavedModel in another process."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with temporary_folder() as folder:
        given, results = folder / "given.npz", folder / "results.npz"
        served.save(given, inputs)
        done = subprocess.run(
            # Isolated: Python imports nothing from the working directory.
            [sys.executable, "-I", "-c", _START, *_homes(), "--", path, given, results],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise CommandError(
                "The export cannot be loaded and run with TensorFlow alone, and was "
                f"removed. It says: {lines[-1]}"
            )
        return served.load(results)


_START = f"""
import runpy, sys
end = sys.argv.index("--")
sys.path += [path for path in sys.argv[1:end] if path not in sys.path]
del sys.argv[1:end + 1]
runpy.run_module({served.__name__!r}, run_name="__main__", alter_sys=True)
"""
"""The program of the process. Our directories come after those of Python itself."""


def _homes() -> list[str]:
    """The directories from which this process imports its packages."""
    origins = [
        str(getattr(importlib.util.find_spec(name), "origin", "")) for name in PACKAGES
    ]
    homes = [str(Path(origin).parents[1]) for origin in origins]
    homes += [path for path in sys.path if path.endswith("-packages")]
    return list(dict.fromkeys(map(os.path.abspath, homes)))


def _difference(
    wanted: list[NDArray[Any]], given: list[NDArray[Any]], precision: float
) -> float:
    """The largest difference of one output, in its own standard deviations.

    Args:
        wanted: The model's outputs for each batch.
        given: The export's outputs.
        precision: Machine epsilon of the model's computations.
    """
    if any(one.shape != other.shape for one, other in zip(wanted, given, strict=True)):
        return np.inf
    if not np.issubdtype(wanted[0].dtype, np.floating):
        pairs = zip(wanted, given, strict=True)
        return 0.0 if all(np.array_equal(*pair) for pair in pairs) else np.inf
    one, other = _rows(wanted), _rows(given)
    if not np.isfinite(one).all():
        raise CommandError(
            "The model's own outputs are not finite on the data, so that the export "
            "cannot be verified; it was removed. Look for NaN in weights and data."
        )
    # Rounding alone may change an output, even one that is constant.
    rounding = ROUNDING * precision * np.abs(one).max(axis=0)
    scale = one.std(axis=0) + rounding / BOUND
    difference = np.abs(other - one)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(difference == 0, 0.0, difference / scale)
    return float(np.where(np.isfinite(other), ratio, np.inf).max())


def _rows(batches: list[NDArray[Any]]) -> NDArray[np.float64]:
    """All values of an output, one column for each unit."""
    units = batches[0].shape[-1] if batches[0].ndim > 1 else 1
    return np.concatenate(
        [part.astype(np.float64).reshape(-1, units) for part in batches]
    )

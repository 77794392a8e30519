"""The demo: trains a network that predicts badly, says why, and repairs it."""

import math
import os
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.auditing import audit
from bn_callbacks.callbacks.debias import DebiasBatchNorm
from bn_callbacks.callbacks.monitor import BatchNormMonitor
from bn_callbacks.recalibration import recalibrate
from bn_callbacks.report import BatchNormWarning

BATCH_SIZE = 64
EPOCHS = 5
TRAINING_SAMPLES = 20 * BATCH_SIZE
VALIDATION_SAMPLES = 8 * BATCH_SIZE
UNITS = 128
WIDTH = 88


class DemoError(RuntimeError):
    """The demo cannot go on; its message tells the user why."""


class Examples(NamedTuple):
    """Images as rows of pixels from 0 to 1, and the digits they show."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]


@dataclass(frozen=True)
class Figures:
    """A row of the demo's table.

    Args:
        loss_batch: Loss on the training data with batch statistics.
        loss: Loss on the training data in inference mode.
        accuracy: Accuracy on the training data in inference mode.
        val_loss: Loss on the validation data in inference mode.
        val_accuracy: Accuracy on the validation data in inference mode.
    """

    loss_batch: float
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float


def run(
    log_dir: str | os.PathLike[str],
    model_path: str | os.PathLike[str] | None = None,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> dict[str, Figures]:
    """Trains, diagnoses, repairs, saves and loads a classifier of digits.

    Trains three Dense + BatchNormalization + ReLU layers on scikit-learn's digits for
    so few steps that the default momentum lags, and prints everything.

    Args:
        log_dir: Directory for TensorBoard's files.
        model_path: Where to save the recalibrated model, a name ending in `.keras`;
            by default `model.keras` in `log_dir`.
        epochs: Epochs of 20 steps.
        seed: Seed of the initial weights and of the order of examples.

    Returns:
        The rows of the table by name.

    Raises:
        DemoError: scikit-learn is missing, or a check of the demo fails.
        OSError: A file cannot be written.
    """
    directory = Path(log_dir)
    path = directory / "model.keras" if model_path is None else Path(model_path)
    training, validation = load_examples()
    directory.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"Three Dense + BatchNormalization + ReLU layers, momentum 0.99, learn "
        f"{len(training.y):,} digits\nin {epochs} epochs of "
        f"{len(training.y) // BATCH_SIZE} steps; {len(validation.y)} digits are for "
        "validation.\n"
    )
    # The demo needs the same weights from the same seed, which a GPU does not promise.
    with tf.device("/CPU:0"):
        rows = _run(directory, path, (training, validation), epochs, seed)
    print(f"\nTo see the runs in TensorBoard:\n\n  tensorboard --logdir {directory}")
    return rows


def load_examples() -> tuple[Examples, Examples]:
    """scikit-learn's digits, shuffled once: training and validation data."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DemoError(
            "The demo needs scikit-learn, which is not installed. Install it with: "
            'python -m pip install "bn-callbacks[demo]"'
        ) from None
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    # Whole batches only: Keras 3.0 gives a short last batch the weight of a full one.
    first = slice(TRAINING_SAMPLES)
    second = slice(TRAINING_SAMPLES, TRAINING_SAMPLES + VALIDATION_SAMPLES)
    return Examples(x[first], y[first]), Examples(x[second], y[second])


def _run(
    directory: Path,
    path: Path,
    data: tuple[Examples, Examples],
    epochs: int,
    seed: int,
) -> dict[str, Figures]:
    training, _ = data
    # Not "auto": how often that writes, and so when it sees a trouble first, depends on
    # the machine.
    monitor = BatchNormMonitor(
        directory / "as_trained", update_freq=10, probe=tuple(training)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BatchNormWarning)
        model, logs = _train(data, monitor, directory / "as_trained", epochs, seed)
    _print_epochs(logs)
    _print_findings(caught)
    if monitor.report is not None:
        for episode in monitor.report.episodes:
            print(f"  {episode}")

    # The same training again: DebiasBatchNorm must not change one bit of its weights.
    debiased, _ = _train(data, DebiasBatchNorm(), directory / "debiased", epochs, seed)
    if not _are_equal(model.trainable_variables, debiased.trainable_variables):
        raise DemoError(
            "Two runs with the same seed gave different weights, so that their "
            "statistics cannot be compared."
        )
    rows = {"as trained": _measure(model, data), "debiased": _measure(debiased, data)}
    report = recalibrate(model, training.x, batch_size=BATCH_SIZE, verbose=0)
    rows["recalibrated"] = _measure(model, data)

    model.save(path)
    loaded = keras.models.load_model(path)
    rows["loaded again"] = _measure(loaded, data)
    _print_table(rows)
    print("\n" + textwrap.fill(str(report), WIDTH))
    is_same = _are_equal(model.variables, loaded.variables) and all(
        math.isclose(one, other, rel_tol=1e-6)
        for one, other in zip(
            astuple(rows["recalibrated"]), astuple(rows["loaded again"]), strict=True
        )
    )
    if not is_same:
        raise DemoError(f"{path} does not give the figures of the model saved in it.")
    print(f"Saved as {path}; loaded again, it gives the same figures.")
    return rows


def _train(
    data: tuple[Examples, Examples],
    callback: keras.callbacks.Callback,
    log_dir: Path,
    epochs: int,
    seed: int,
) -> tuple[keras.Model, dict[str, list[float]]]:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((64,))], name="digits")
    for number in (1, 2, 3):
        model.add(keras.layers.Dense(UNITS, name=f"dense_{number}"))
        model.add(keras.layers.BatchNormalization(name=f"bn_{number}"))
        model.add(keras.layers.ReLU(name=f"relu_{number}"))
    model.add(keras.layers.Dense(10, activation="softmax", name="digit"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    training, validation = data
    history = model.fit(
        *training,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=tuple(validation),
        callbacks=[callback, keras.callbacks.TensorBoard(log_dir)],
        verbose=0,
    )
    return model, history.history


def _measure(model: keras.Model, data: tuple[Examples, Examples]) -> Figures:
    training, validation = data
    report = audit(model, tuple(training), batch_size=BATCH_SIZE)
    assert report.loss_batch is not None
    return Figures(
        report.loss_batch,
        *model.evaluate(*training, verbose=0),
        *model.evaluate(*validation, verbose=0),
    )


def _are_equal(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(*map(keras.ops.convert_to_numpy, pair))
        for pair in zip(some, others, strict=True)
    )


def _print_epochs(logs: Mapping[str, list[float]]) -> None:
    names = ("loss", "val_loss", "bn_loss_gap", "bn_lag")
    print("epoch" + "".join(f"{name:>14}" for name in names))
    for epoch, values in enumerate(zip(*map(logs.get, names), strict=True), 1):
        print(f"{epoch:5}" + "".join(f"{value:14.4f}" for value in values))


def _print_findings(caught: list[warnings.WarningMessage]) -> None:
    findings = []
    for warning in caught:
        if issubclass(warning.category, BatchNormWarning):
            findings.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    print("\nBatchNormMonitor:")
    for finding in findings or ["Nothing to warn of."]:
        print(
            textwrap.fill(finding, WIDTH, initial_indent="  ", subsequent_indent="  ")
        )


def _print_table(rows: Mapping[str, Figures]) -> None:
    print(
        "\nThe same weights, bit for bit; only the moving statistics differ:\n\n"
        "                      training data                     validation data\n"
        "               loss with batch  inference                inference\n"
        "                    statistics       loss  accuracy           loss  accuracy"
    )
    for name, row in rows.items():
        print(
            f"{name:15}{row.loss_batch:15.4f}{row.loss:11.4f}{row.accuracy:10.1%}"
            f"{row.val_loss:15.4f}{row.val_accuracy:10.1%}"
        )

"""Loads saved models, and says what to do about those that cannot be loaded."""

import contextlib
import inspect
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras

from bn_callbacks.cli.errors import CommandError, text_of
from bn_callbacks.cli.modules import import_module
from bn_callbacks.cli.patching import WEIGHTS
from bn_callbacks.layers import check_model

_UNKNOWN = re.compile(r"Could not (?:locate|deserialize) (?:class|function) '([^']+)'")
_UNSAFE = re.compile(r"safe_mode|unsafe|python lambda", re.IGNORECASE)
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    json.JSONDecodeError,
    EOFError,
    KeyError,
    OSError,
    UnicodeDecodeError,
)


def load(
    path: str | Path, custom_objects: str | None, *, is_trusted: bool
) -> keras.Model:
    """Loads a saved model, compiled as it was.

    Args:
        path: A `.keras` file.
        custom_objects: Name of the module with the model's own classes and functions.
        is_trusted: Whether Python code in the file may run.

    Raises:
        CommandError: It cannot be loaded; the message says what to do.
    """
    objects = _public_objects(custom_objects) if custom_objects else {}
    try:
        with _policy_of_training(path):
            model = keras.saving.load_model(
                path, custom_objects=objects, safe_mode=not is_trusted
            )
    except Exception as error:
        raise CommandError(f"{path} {_damage(path) or _reason(error)}") from error
    check_model(model)
    return model


@contextlib.contextmanager
def _policy_of_training(path: str | Path) -> Iterator[None]:
    """Loads a model that was trained under `mixed_float16` under that policy again.

    Only under this policy does Keras scale the loss and restore the optimizer's state.
    Under another, it drops the state, and with it the count of steps.
    """
    before = keras.mixed_precision.dtype_policy()
    if _has_scaled_loss(path):
        keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        yield
    finally:
        keras.mixed_precision.set_dtype_policy(before)


def _has_scaled_loss(path: str | Path) -> bool:
    """Whether Keras itself has wrapped the optimizer in a `LossScaleOptimizer`."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
        optimizer = (config.get("compile_config") or {}).get("optimizer")
        is_explicit = "LossScaleOptimizer" in json.dumps(optimizer)
        if not optimizer or is_explicit or WEIGHTS not in archive.namelist():
            return False
        with archive.open(WEIGHTS) as member, h5py.File(member) as file:
            return "optimizer/inner_optimizer" in file


def _public_objects(name: str) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(import_module(name)).items()
        if not key.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
    }


def _damage(path: str | Path) -> str | None:
    """Says what is damaged in the archive, since Keras' error may not."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except _DAMAGED:
        return None  # The error says more.
    if name is None:
        return None
    return f"is damaged: Bad CRC-32 for file {name!r}. Copy or save it again."


def _reason(error: Exception) -> str:
    text = str(error)
    unknown = _UNKNOWN.findall(text)
    if unknown:
        return (
            f"uses {unknown[-1]!r}, which Keras does not know. Pass the module that "
            "defines it: --custom-objects MODULE."
        )
    if _UNSAFE.search(text):
        return _refused(text)
    if isinstance(error, _DAMAGED):
        return f"is damaged: {text_of(error)}. Copy or save it again."
    return f"cannot be loaded. Keras says: {text_of(error)}."


def _refused(text: str) -> str:
    """Says what safe mode has refused, and what to do without switching it off."""
    if "TFSMLayer" in text:
        return (
            "holds a TFSMLayer, which runs a SavedModel that lies outside the file and "
            "whose layers cannot be told apart. Pass the .keras file that the "
            "SavedModel was exported from."
        )
    if "vocabulary" in text.lower():
        return (
            "wants to read a vocabulary file that lies outside of it, which may be any "
            "file of this machine. Build the layer with the list of words in place of "
            "the name of a file, and save the model again."
        )
    if "lambda" in text.lower():
        return (
            "holds Python code (a Lambda layer), which safe mode does not run. Write "
            "it as a layer of your own and pass its module: --custom-objects MODULE. "
            "Only if you have made the file yourself, pass --unsafe."
        )
    said = " ".join(re.split(r"If you trust", text)[0].split())
    return f"holds what Keras' safe mode refuses to load. Keras says: {said}"

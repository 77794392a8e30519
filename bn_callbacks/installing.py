"""Says what to install if TensorFlow is missing.

The package does not install TensorFlow by itself: there are several packages, such as
`tensorflow-cpu`, that overwrite each other's files. So the user chooses one.
"""

import importlib
import importlib.util
import os
from types import ModuleType

OTHER_BACKENDS = ("jax", "openvino", "torch")
"""Packages that Keras imports if its backend is not TensorFlow."""


class NotInstalledError(ModuleNotFoundError):
    """A package is not installed; the message says which, and how to install it."""


def import_with_advice(name: str) -> ModuleType:
    """Imports a module that may need TensorFlow.

    Args:
        name: Its dotted name.

    Raises:
        NotInstalledError: There is no TensorFlow, or Keras is set to another backend
            that is not installed either.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("tensorflow", *OTHER_BACKENDS):
            raise
        raise NotInstalledError(_advice(package), name=package) from error


def _advice(missing: str) -> str:
    is_other = missing in OTHER_BACKENDS
    backend = os.environ.get("KERAS_BACKEND") or (missing if is_other else "tensorflow")
    advice = []
    if missing == "tensorflow" or importlib.util.find_spec("tensorflow") is None:
        advice.append(
            'TensorFlow is not installed: run python -m pip install "bn-callbacks'
            '[tensorflow]", or install the package of your choice, such as '
            "tensorflow-cpu."
        )
    if backend != "tensorflow":
        advice.append(
            "bn_callbacks works on Keras' TensorFlow backend only: set the environment "
            f"variable KERAS_BACKEND=tensorflow. Received: KERAS_BACKEND={backend}."
        )
    return " ".join(advice)

"""Warnings that point at a line of the user's code."""

import sys
import warnings
from pathlib import Path

LIBRARIES = ("bn_callbacks", "keras", "tensorflow")
"""A warning never points into these packages, where the user can mend nothing."""


def warn(message: str, category: type[Warning]) -> None:
    """Warns, and points at the user's line that led here, such as a call of `fit`.

    Args:
        message: What happened, with which value, and what to do.
        category: The kind of warning.
    """
    modules = [sys.modules.get(name) for name in LIBRARIES]
    files = [module.__file__ for module in modules if module and module.__file__]
    folders = tuple(f"{Path(file).parent}/" for file in files)
    frame, level = sys._getframe(), 1
    while frame.f_back and Path(frame.f_code.co_filename).as_posix().startswith(
        folders
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)

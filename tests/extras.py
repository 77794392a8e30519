"""Packages of an extra: without them a test skips, except in CI, which has them."""

import importlib
import os
from typing import Any

import pytest


def needed(module: str, extra: str) -> Any:
    """Imports a module; without it the test skips, or fails where CI installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        reason = f"This needs {module} ({missing}): pip install -e '.[{extra}]'"
        (pytest.fail if os.environ.get("BN_CALLBACKS_CI") else pytest.skip)(reason)

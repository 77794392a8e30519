"""Writes reports for TensorBoard: charts, histograms, pictures and texts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bn_callbacks.tensorboard.runs import SUBDIRECTORY
    from bn_callbacks.tensorboard.writer import ReportWriter

__all__ = ["MAX_CHARTS", "SUBDIRECTORY", "ReportWriter"]

MAX_CHARTS = 12
"""Largest number of layers with charts, as many as TensorBoard shows on a page."""

if not TYPE_CHECKING:
    # Imports seventy modules of tensorboard, so only where something is written.
    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = "runs" if name == "SUBDIRECTORY" else "writer"
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)

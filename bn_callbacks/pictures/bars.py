"""Draws lags as bars, with a row for each layer, the first at the top."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.pictures.names import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lags = Sequence[float | None]

QUIET, COLOURS = "#9ecae1", ("#d62728", "#ff7f0e", "#9467bd", "#8c564b", "#bcbd22")
"""The colour of healthy layers, and one colour for each other group."""

ROW = 0.2
"""Height of a row in inches. Axes without room for all rows show the first ones."""

MAX_ROWS = 40
"""Largest number of rows in a new figure."""

MAX_LABEL = 40
"""Largest number of characters in a name."""

LINEAR = 3.0
"""With a larger lag, the scale is logarithmic beyond 1."""


def draw_bars(
    paths: Sequence[str],
    lags: Lags,
    groups: Sequence[str],
    marks: Lags,
    *,
    quiet: str,
    label: str,
    title: str,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws the lag of each layer as a bar, with a mark beside it.

    Args:
        paths: Paths of the layers, the most important first.
        lags: Their lags; None if unknown.
        groups: The group of each layer, which decides the colour.
        marks: Another lag of each layer; None if unknown.
        quiet: The group of layers with which nothing is wrong.
        label: What the marks are.
        title: A line above.
        axes: Where to draw; in a new figure by default.

    Returns:
        The axes.
    """
    count = min(len(paths), MAX_ROWS)
    if axes is None:
        axes = _new_axes(count)
    else:
        inches = axes.get_window_extent().height / axes.figure.dpi
        count = min(len(paths), max(1, int(inches / ROW)))
    if count < len(paths):
        title = f"{title}; the first {count}"
    names = shorten(paths[:count], MAX_LABEL)
    values, groups = _finite(lags[:count]), groups[:count]
    bad = [group for group in dict.fromkeys(groups) if group != quiet]
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(bad)}
    for group, colour in (colours | {quiet: QUIET}).items():
        rows = [row for row, each in enumerate(groups) if each == group]
        if rows:
            axes.barh(rows, np.nan_to_num(values[rows]), color=colour, label=group)
    others = _finite(marks[:count])
    known = np.flatnonzero(np.isfinite(others))
    if known.size:
        axes.vlines(others[known], known - 0.4, known + 0.4, "black", label=label)
    for row, lag in enumerate(lags[:count]):
        if np.isnan(values[row]):
            text = " lag unknown" if lag is None else " not finite"
            axes.text(0, row, text, fontsize=8, va="center")
    largest = float(np.nan_to_num(values).max(initial=0.05))
    if largest > LINEAR:
        # Beside one huge lag the others would vanish.
        axes.set_xscale("symlog", linthresh=1.0, linscale=2.0)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0, largest * (1.6 if largest > LINEAR else 1.08))
    axes.set_ylim(max(count, 1) - 0.5, -0.5)
    # A dollar sign in a name begins no formula.
    axes.set_yticks(range(count), names, fontsize=8, parse_math=False)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("lag (standard deviations)")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8)
    return axes


def _new_axes(rows: int) -> "Axes":
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Pictures need matplotlib. Received: {error}. Install it with: "
            'python -m pip install "bn-callbacks[plot]"',
            name=error.name,
        ) from error
    size = (9, max(rows, 4) * ROW + 1.4)
    axes: Axes = pyplot.subplots(figsize=size, layout="constrained")[1]
    return axes


def _finite(values: Lags) -> NDArray[np.float64]:
    """The values; `nan` if unknown or infinite."""
    known = [math.nan if value is None else value for value in values]
    return np.where(np.isfinite(known), np.array(known, float), math.nan)

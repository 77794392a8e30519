"""Lags as bars, a row for each layer, in model order from top to bottom."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.pictures.canvas import FONT_SIZE, label_rows, matplotlib, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lags = Sequence[float | None]

QUIET = "#9ecae1"
"""Colour of what is fine."""

COLOURS = ("#d62728", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")
"""Colours of what is not, for each cause one, then again from the first."""

LINEAR = 3.0
"""Lag up to which the scale is linear; beyond it is logarithmic where it must be."""

LEGEND_COLUMNS = 4


def draw_lags(
    paths: Sequence[str],
    lags: Lags,
    noises: Lags,
    causes: Sequence[str],
    quiet: str,
    title: str,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws the lag of each layer, coloured by cause, and the noise floor.

    Args:
        paths: Paths of the layers.
        lags: Their lags; None where unknown.
        noises: What of them sampling explains; None where unknown.
        causes: Their causes.
        quiet: The cause that means that nothing is wrong.
        title: A line above.
        axes: Where to draw; in a new figure by default.

    Returns:
        The axes.
    """
    axes = new_axes(len(paths)) if axes is None else axes
    values = _draw_bars(axes, lags, causes, _colours(causes, quiet))
    _draw_marks(axes, noises, "noise floor")
    worst_first = np.argsort(-values, kind="stable").tolist()
    _finish(axes, paths, [row for row in worst_first if causes[row] != quiet], title)
    return axes


def draw_before_and_after(
    paths: Sequence[str],
    before: Lags,
    after: Lags,
    title: str,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws the lag of each layer before and after a recalibration.

    Args:
        paths: Paths of the layers.
        before: Their lags before; None where unknown.
        after: Their lags after; None where unknown, for all of them if empty.
        title: A line above.
        axes: Where to draw; in a new figure by default.

    Returns:
        The axes.
    """
    axes = new_axes(len(paths)) if axes is None else axes
    groups = ["before"] * len(paths)
    values = _draw_bars(axes, before, groups, {"before": COLOURS[1]})
    _draw_marks(axes, after, "after")
    _finish(axes, paths, np.argsort(-values, kind="stable").tolist(), title)
    return axes


def _draw_bars(
    axes: "Axes", lags: Lags, groups: Sequence[str], colours: Mapping[str, str]
) -> NDArray[np.float64]:
    """Draws bars, coloured by group. Returns what they stand for, -1 if unknown."""
    is_unknown = np.array([lag is None for lag in lags], bool)
    values = np.array([0.0 if lag is None else lag for lag in lags], float)
    is_infinite = ~np.isfinite(values)
    edge = _scale(axes, float(values[np.isfinite(values)].max(initial=0.0)))
    widths = np.where(is_infinite, edge, values)
    rows = np.arange(len(values))
    for group, colour in colours.items():
        mine = np.array([each == group for each in groups], bool) & ~is_unknown
        if mine.any():
            axes.barh(rows[mine], widths[mine], 0.8, color=colour, label=group)
    if is_infinite.any():
        axes.barh(
            rows[is_infinite],
            widths[is_infinite],
            0.8,
            color="none",
            edgecolor="black",
            hatch="///",
            linewidth=0,
            label="not finite",
        )
    if is_unknown.any():
        axes.plot(
            np.zeros(is_unknown.sum()),
            rows[is_unknown],
            "x",
            color="grey",
            markersize=4,
            label="lag unknown",
        )
    return np.where(is_unknown, -1.0, np.where(is_infinite, math.inf, values))


def _scale(axes: "Axes", largest: float) -> float:
    """Sets the scale of lags; returns where it ends."""
    if largest <= LINEAR:
        edge = max(largest * 1.08, 0.05)
        axes.set_xlim(-0.005 * edge, edge)
        return edge
    # One huge lag would leave nothing to see of the others.
    axes.set_xscale("symlog", linthresh=1.0, linscale=2.0)
    axes.xaxis.set_major_formatter(
        matplotlib("ticker").FuncFormatter(lambda value, _: f"{value:g}")
    )
    axes.set_xlim(-0.01, largest * 1.6)
    return largest * 1.6


def _draw_marks(axes: "Axes", values: Lags, label: str) -> None:
    known = [
        (value, row)
        for row, value in enumerate(values)
        if value is not None and math.isfinite(value)
    ]
    if known:
        x, rows = np.array(known).T
        axes.vlines(x, rows - 0.4, rows + 0.4, "black", linewidth=1.5, label=label)


def _colours(causes: Sequence[str], quiet: str) -> dict[str, str]:
    bad = dict.fromkeys(cause for cause in causes if cause != quiet)
    colours = {cause: COLOURS[index % len(COLOURS)] for index, cause in enumerate(bad)}
    return colours | {quiet: QUIET}


def _finish(axes: "Axes", paths: Sequence[str], first: list[int], title: str) -> None:
    axes.set_xlabel("lag (standard deviations)")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    bar = matplotlib("container").BarContainer
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True),
        key=lambda entry: not isinstance(entry[0], bar),
    )
    lines = math.ceil(len(entries) / LEGEND_COLUMNS)
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 2, pad=8 + 15 * lines)
    if entries:
        axes.legend(
            *zip(*entries, strict=True),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.3,
            ncols=LEGEND_COLUMNS,
            frameon=False,
            fontsize=FONT_SIZE,
        )
    label_rows(axes, paths, first)

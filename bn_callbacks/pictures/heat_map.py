"""The lag of all layers over time, as colours."""

import importlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.pictures.canvas import (
    CHARACTER,
    FONT_SIZE,
    height,
    label_rows,
    matplotlib,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

LOWEST, HIGHEST = 0.02, 2.0
"""Ends of the scale of colours, a lag nobody notices and one that ruins a model. It is
the same in all pictures, so that they can be compared."""

TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
COLOURS = "magma_r"
UNKNOWN, NOT_FINITE = "#dddddd", "#00b0f0"
DPI = 100
PALETTE = 128
"""Colours of the file."""

WIDTH = 5.0
"""Width of the map in inches, and its height at most; the labels are beside it."""

TOP, BOTTOM = 0.85, 0.5
"""Heights of the legend above the map, and of the axis below it, in inches."""


def draw_heat_map(
    paths: Sequence[str],
    edges: Sequence[float],
    lags: NDArray[np.float64],
    causes: Mapping[int, str],
    threshold: float,
    title: str,
) -> "Figure":
    """Draws a row for each layer, in model order, and a column for each time.

    The colours are perceptually uniform over the logarithm of the lag and always mean
    the same.

    Args:
        paths: Paths of the layers.
        edges: Steps at which columns begin and end, one more than columns.
        lags: Lags, of shape `(layers, columns)`; `nan` where unknown.
        causes: What to write beside rows where something is wrong now, the most
            important first.
        threshold: The lag above which something is said, marked in the legend.
        title: A line above.

    Returns:
        A figure, unknown to pyplot.
    """
    inside = height(len(paths), most=WIDTH)
    left, right = _margin(shorten(paths)), _margin(list(causes.values()))
    size = (left + WIDTH + right, TOP + inside + BOTTOM)
    # Pictures without pyplot need no window system and leave no figure behind.
    figure: Figure = matplotlib("figure").Figure(size, dpi=DPI)
    axes = figure.add_axes(
        (left / size[0], BOTTOM / size[1], WIDTH / size[0], inside / size[1])
    )
    scale = figure.add_axes(
        (left / size[0], 1 - 0.5 / size[1], WIDTH / size[0], 0.12 / size[1])
    )
    _draw_scale(scale, _draw_cells(axes, edges, lags), threshold)
    _draw_others(axes, lags, below=0.28 / inside)
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 2)
    axes.set_xlabel("step", fontsize=FONT_SIZE)
    axes.tick_params(axis="x", labelsize=FONT_SIZE)
    axes.xaxis.set_major_locator(matplotlib("ticker").MaxNLocator(6, integer=True))
    named = label_rows(axes, paths, causes, inside)
    notes = axes.twinx()
    noted = [row for row in named if row in causes]
    notes.set_ylim(axes.get_ylim())
    notes.set_yticks(noted, [causes[row] for row in noted], fontsize=FONT_SIZE)
    notes.tick_params(length=0)
    return figure


def _margin(labels: Sequence[str]) -> float:
    return 0.3 + CHARACTER * max(map(len, labels), default=0)


def to_png(figure: "Figure") -> tuple[bytes, tuple[int, int]]:
    """Draws a figure into a PNG file of a quarter of the usual size.

    Args:
        figure: Any figure with few colours, for the file has a palette.

    Returns:
        The file, and the picture's width and height.
    """
    canvas = matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    image = importlib.import_module("PIL.Image")
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    file = io.BytesIO()
    image.fromarray(pixels).quantize(PALETTE).save(file, "PNG")
    return file.getvalue(), canvas.get_width_height()


def _draw_cells(
    axes: "Axes", edges: Sequence[float], lags: NDArray[np.float64]
) -> "QuadMesh":
    colors = matplotlib("colors")
    rows = np.arange(len(lags) + 1) - 0.5
    # Cells without a value let it shine through.
    axes.set_facecolor(UNKNOWN)
    if np.isinf(lags).any():
        axes.pcolormesh(
            edges,
            rows,
            np.ma.masked_where(~np.isinf(lags), np.zeros_like(lags)),
            cmap=colors.ListedColormap([NOT_FINITE]),
        )
    return axes.pcolormesh(
        edges,
        rows,
        np.ma.masked_invalid(lags).clip(LOWEST, HIGHEST),
        cmap=COLOURS,
        norm=colors.LogNorm(LOWEST, HIGHEST),
    )


def _draw_scale(scale: "Axes", mesh: "QuadMesh", threshold: float) -> None:
    bar = scale.figure.colorbar(
        mesh, cax=scale, orientation="horizontal", ticklocation="top", extend="both"
    )
    bar.set_ticks(TICKS, labels=[f"{tick:g}" for tick in TICKS], fontsize=FONT_SIZE)
    bar.ax.minorticks_off()
    bar.set_label(
        f"lag (standard deviations); the white line is the threshold, {threshold:g}",
        fontsize=FONT_SIZE,
    )
    bar.ax.axvline(threshold, color="white", linewidth=2.5)


def _draw_others(axes: "Axes", lags: NDArray[np.float64], below: float) -> None:
    """Explains the colours that are not on the scale, where they occur."""
    others = {
        "lag unknown": (UNKNOWN, np.isnan(lags).any()),
        "not finite": (NOT_FINITE, np.isinf(lags).any()),
    }
    patch = matplotlib("patches").Patch
    handles = [
        patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=label)
        for label, (colour, is_there) in others.items()
        if is_there
    ]
    if handles:
        axes.legend(
            handles=handles,
            loc="upper right",
            bbox_to_anchor=(1, -below),
            borderaxespad=0,
            ncols=2,
            frameon=False,
            fontsize=FONT_SIZE,
        )

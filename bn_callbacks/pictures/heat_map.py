"""The lag of all layers over time, as colours."""

import importlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_callbacks.pictures.canvas import (
    CHARACTER,
    FONT_SIZE,
    height,
    matplotlib,
    rows_with_room,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOWEST, HIGHEST = 0.02, 2.0
"""Ends of the scale of colours, a lag nobody notices and one that ruins a model. It is
the same in all pictures, so that they can be compared."""

TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
COLOURS = "magma_r"
UNKNOWN, NOT_FINITE = "#dddddd", "#00b0f0"
DPI = 100
SHADES = 192
"""Colours of the scale in a file, whose palette has 256."""

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
    names = shorten(paths)
    left, right = _margin(names), _margin(list(causes.values()))
    size = (left + WIDTH + right, TOP + inside + BOTTOM)
    # Pictures without pyplot need no window system and leave no figure behind.
    figure: Figure = matplotlib("figure").Figure(size, dpi=DPI)
    axes = _bare_axes(figure, left, BOTTOM, inside)
    scale = _bare_axes(figure, left, size[1] - 0.5, 0.12)
    _draw_cells(axes, edges, lags)
    _draw_scale(scale, threshold)
    _draw_others(axes, lags, below=0.28 / inside)
    _write_steps(axes, edges, inside)
    _write_rows(axes, names, causes, inside)
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 2, y=1.0)
    return figure


def _bare_axes(figure: "Figure", left: float, bottom: float, height: float) -> "Axes":
    """Axes without ticks, which take more time than all else in a picture."""
    width, whole = figure.get_size_inches()
    axes: Axes = figure.add_axes(
        (left / width, bottom / whole, WIDTH / width, height / whole)
    )
    axes.xaxis.set_visible(False)
    axes.yaxis.set_visible(False)
    return axes


def _write_rows(
    axes: "Axes", names: Sequence[str], causes: Mapping[int, str], inside: float
) -> None:
    """Names the rows that have room, and what is wrong with them."""
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    gap = 0.06 / WIDTH
    style: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "verticalalignment": "center",
        "fontsize": FONT_SIZE,
        "parse_math": False,
    }
    for row in rows_with_room(len(names), inside, causes):
        axes.text(-gap, row, names[row], horizontalalignment="right", **style)
        if row in causes:
            axes.text(1 + gap, row, causes[row], **style)


def _write_steps(axes: "Axes", edges: Sequence[float], inside: float) -> None:
    axes.set_xlim(edges[0], edges[-1])
    locator = matplotlib("ticker").MaxNLocator(6, integer=True)
    ticks = locator.tick_values(edges[0], edges[-1])
    style: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "horizontalalignment": "center",
        "verticalalignment": "top",
        "fontsize": FONT_SIZE,
    }
    for tick in ticks[(ticks >= edges[0]) & (ticks <= edges[-1])]:
        axes.text(tick, -0.06 / inside, f"{tick:,.0f}", **style)
    axes.text((edges[0] + edges[-1]) / 2, -0.25 / inside, "step", **style)


def _margin(labels: Sequence[str]) -> float:
    return 0.3 + CHARACTER * max(map(len, labels), default=0)


def to_png(figure: "Figure") -> tuple[bytes, tuple[int, int]]:
    """Draws a heat map into a PNG file of a quarter of the usual size.

    Args:
        figure: The heat map. The file has a palette with its colours, the same for all.

    Returns:
        The file, and the picture's width and height.
    """
    canvas = matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    image = importlib.import_module("PIL.Image")
    palette = image.new("P", (1, 1))
    palette.putpalette(_palette())
    pixels = image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    file = io.BytesIO()
    pixels.quantize(palette=palette, dither=image.Dither.NONE).save(file, "PNG")
    return file.getvalue(), canvas.get_width_height()


def _palette() -> bytes:
    scale = matplotlib("cm").ScalarMappable(cmap=COLOURS)
    shades = scale.to_rgba(np.linspace(0, 1, SHADES), bytes=True)[:, :3]
    others = matplotlib("colors").to_rgba_array([UNKNOWN, NOT_FINITE])[:, :3] * 255
    # Letters have soft edges.
    greys = np.linspace(0, 255, 256 - SHADES - len(others))[:, None].repeat(3, axis=1)
    return np.concatenate([shades, others, greys]).round().astype(np.uint8).tobytes()


def _draw_cells(
    axes: "Axes", edges: Sequence[float], lags: NDArray[np.float64]
) -> None:
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
    _colour(axes, edges, rows, np.ma.masked_invalid(lags).clip(LOWEST, HIGHEST))


def _colour(axes: "Axes", x: ArrayLike, y: ArrayLike, lags: NDArray[Any]) -> None:
    norm = matplotlib("colors").LogNorm(LOWEST, HIGHEST)
    axes.pcolormesh(x, y, lags, cmap=COLOURS, norm=norm)


def _draw_scale(scale: "Axes", threshold: float) -> None:
    shades = np.geomspace(LOWEST, HIGHEST, SHADES)
    edges = np.geomspace(LOWEST, HIGHEST, SHADES + 1)
    scale.set_xscale("log")
    _colour(scale, edges, [0, 1], shades[None])
    scale.set_xlim(LOWEST, HIGHEST)
    scale.axvline(threshold, color="white", linewidth=2.5)
    style: dict[str, Any] = {
        "transform": scale.get_xaxis_transform(),
        "horizontalalignment": "center",
        "fontsize": FONT_SIZE,
    }
    ends = {LOWEST: "≤", HIGHEST: "≥"}
    for tick in TICKS:
        scale.text(tick, 1.4, f"{ends.get(tick, '')}{tick:g}", **style)
    scale.text(
        math.sqrt(LOWEST * HIGHEST),
        2.8,
        f"lag (standard deviations); the white line is the threshold, {threshold:g}",
        **style,
    )


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

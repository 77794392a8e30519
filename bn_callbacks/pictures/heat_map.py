"""The lag of all layers over time, as colours."""

import importlib
import importlib.util
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.pictures.canvas import height, rows_with_room, shorten

LOWEST, HIGHEST = 0.02, 2.0
"""Ends of the scale of colours, a lag nobody notices and one that ruins a model. It is
the same in all pictures, so that they can be compared."""

TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

MAGMA = (
    *("fcfdbf", "fec287", "fb8761", "e55064", "b5367a"),
    *("812581", "4f127b", "1c1044", "000004"),
)
"""Nine evenly spaced colours of the map of that name (CC0), from light to dark, which
is perceptually uniform."""

OTHERS = {"lag unknown": "dddddd", "not finite": "00b0f0"}
"""Colours that are not on the scale."""

GREYS, SHADES = 64, 190
"""Colours of letters and of the scale; with the two above a palette has 256."""

WHITE, UNKNOWN, NOT_FINITE = GREYS - 1, GREYS + SHADES, GREYS + SHADES + 1

PER_INCH = 100
FONT, TITLE = 12, 13
"""Heights of letters in pixels."""

WIDTH, HEIGHT = 300, 500
"""Width of the map in pixels, and its height at most. With its labels it is about as
wide as a card of TensorBoard, which shrinks wider ones until no letter can be read."""

TOP, BOTTOM, GAP = 86, 48, 6
MARGIN = 36
"""Room beside the map for half a number of the axis below."""


class Box(NamedTuple):
    """Pixels from `left` and `top` on, without `right` and `bottom`."""

    left: int
    top: int
    right: int
    bottom: int


class Label(NamedTuple):
    """A text and where it is, `anchor` in the words of Pillow."""

    x: float
    y: float
    anchor: str
    text: str
    size: int = FONT


class Layout(NamedTuple):
    """Where everything is in a heat map."""

    size: tuple[int, int]
    map: Box
    scale: Box
    labels: list[Label]


def is_available() -> bool:
    """Whether Pillow is installed, and brings letters of any size along."""
    if importlib.util.find_spec("PIL") is None:
        return False
    version = importlib.import_module("PIL").__version__.split(".")
    has_letters = importlib.import_module("PIL.features").check("freetype2")
    return bool(has_letters) and tuple(map(int, version[:2])) >= (10, 1)


def draw_heat_map(
    paths: Sequence[str],
    edges: Sequence[int],
    lags: NDArray[np.float64],
    causes: Mapping[int, str],
    threshold: float,
    title: str,
) -> tuple[bytes, tuple[int, int]]:
    """Draws a row for each layer, in model order, and a column for each time.

    The colours run evenly over the logarithm of the lag and always mean the same.

    Not drawn by matplotlib, whose letters alone would cost a `fit` a tenth of a second.

    Args:
        paths: Paths of the layers.
        edges: Steps at which columns begin and end, one more than columns.
        lags: Lags, of shape `(layers, columns)`; `nan` where unknown.
        causes: What to write beside rows where something is wrong now, the most
            important first.
        threshold: The lag above which something is said, marked in the legend.
        title: A line above.

    Returns:
        A PNG file, and the picture's width and height.
    """
    layout = lay_out(paths, edges, causes, threshold, title)
    others = _others(layout, lags)
    labels = [*layout.labels, *(label for _, _, label in others)]
    boxes = [layout.map, layout.scale, *(box for _, box, _ in others)]
    pixels = _write(layout.size, labels, boxes) // (256 // GREYS)
    _fill(pixels, layout.map, _cells(lags, edges, layout.map))
    _fill(pixels, layout.scale, _shades(np.geomspace(LOWEST, HIGHEST, WIDTH)))
    if LOWEST < threshold < HIGHEST:
        mark = layout.scale.left + round(WIDTH * _position(threshold))
        _fill(pixels, layout.scale._replace(left=mark - 1, right=mark + 2), WHITE)
    for shade, box, _ in others:
        _fill(pixels, box, shade)
    image = _pil("Image").fromarray(pixels)
    image.putpalette(_palette())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), layout.size


def lay_out(
    paths: Sequence[str],
    edges: Sequence[int],
    causes: Mapping[int, str],
    threshold: float,
    title: str,
) -> Layout:
    """Where a heat map's parts are; for the arguments see `draw_heat_map`."""
    names = shorten(paths)
    inside = round(PER_INCH * height(len(names), most=HEIGHT / PER_INCH))
    left, right = (
        max(MARGIN, 2 * GAP + _length(texts)) for texts in (names, causes.values())
    )
    around = Box(left, TOP, left + WIDTH, TOP + inside)
    scale = Box(left, 40, left + WIDTH, 52)
    middle = left + WIDTH / 2
    legend = f"lag in standard deviations; white: threshold, {threshold:g}"
    labels = [
        Label(GAP, TOP - 14, "lm", title, TITLE),
        Label(middle, 12, "mm", legend),
        Label(left, around.bottom + 35, "lm", "step"),
    ]
    signs = {LOWEST: "<", HIGHEST: ">"}
    for lag in TICKS:
        x = left + WIDTH * _position(lag)
        labels.append(Label(x, 30, "mm", f"{signs.get(lag, '')}{lag:g}"))
    for step in _round_steps(edges[0], edges[-1]):
        x = left + WIDTH * (step - edges[0]) / (edges[-1] - edges[0])
        labels.append(Label(x, around.bottom + 15, "mm", f"{step:,}"))
    for row in rows_with_room(len(names), inside / PER_INCH, causes):
        y = TOP + (row + 0.5) * inside / len(names)
        labels.append(Label(left - GAP, y, "rm", names[row]))
        if row in causes:
            labels.append(Label(around.right + GAP, y, "lm", causes[row]))
    width = max(around.right + right, 2 * GAP + _length([title], TITLE))
    return Layout((width, around.bottom + BOTTOM), around, scale, labels)


def _others(layout: Layout, lags: NDArray[np.float64]) -> list[tuple[int, Box, Label]]:
    """Explains the colours that are not on the scale, where they occur."""
    present = np.unique(_shades(lags))
    found = []
    x, y = layout.map.right, layout.map.bottom + 30
    for shade, name in zip((NOT_FINITE, UNKNOWN), reversed(OTHERS), strict=True):
        if shade in present:
            x -= 110
            label = Label(x + 20 + GAP, y + 5, "lm", name)
            found.append((shade, Box(x, y, x + 20, y + 10), label))
    return found


def _write(
    size: tuple[int, int], labels: Sequence[Label], boxes: Sequence[Box]
) -> NDArray[np.uint8]:
    """Letters and frames, black on white."""
    image = _pil("Image").new("L", size, 255)
    pen = _pil("ImageDraw").Draw(image)
    fonts = {size: _font(size) for size in (FONT, TITLE)}
    for label in labels:
        place = (label.x, label.y)
        pen.text(place, label.text, 0, fonts[label.size], anchor=label.anchor)
    for left, top, right, bottom in boxes:
        pen.rectangle((left - 1, top - 1, right, bottom), outline=0)
    return np.array(image)


def _fill(pixels: NDArray[np.uint8], box: Box, shades: Any) -> None:
    pixels[box.top : box.bottom, box.left : box.right] = shades


def _cells(
    lags: NDArray[np.float64], edges: Sequence[int], box: Box
) -> NDArray[np.uint8]:
    """Colours of the map's pixels; that of the largest lag, where a pixel has many."""
    rows = np.arange(box.bottom - box.top) * len(lags) // (box.bottom - box.top)
    steps = np.linspace(edges[0], edges[-1], box.right - box.left, endpoint=False)
    columns = np.searchsorted(edges, steps, side="right") - 1
    seen_rows, row_of = np.unique(rows, return_inverse=True)
    seen_columns, column_of = np.unique(columns, return_inverse=True)
    joined = np.fmax.reduceat(lags, seen_rows, axis=0)
    joined = np.fmax.reduceat(joined, seen_columns, axis=1)
    return _shades(joined)[np.ix_(row_of, column_of)]


def _shades(lags: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Places of lags in the palette."""
    shades = GREYS + np.round((SHADES - 1) * _position(lags))
    kinds = [np.isnan(lags), np.isinf(lags)]
    return np.select(kinds, [UNKNOWN, NOT_FINITE], shades).astype(np.uint8)


def _position(lag: Any) -> Any:
    """Place on the scale of colours, from 0 to 1."""
    within = np.clip(lag, LOWEST, HIGHEST)
    return np.log(within / LOWEST) / math.log(HIGHEST / LOWEST)


def _palette() -> bytes:
    greys = np.linspace(0, 255, GREYS)[:, None].repeat(3, axis=1)
    ends = np.array([list(bytes.fromhex(colour)) for colour in MAGMA])
    at = np.linspace(0, len(ends) - 1, SHADES)
    shades = [np.interp(at, range(len(ends)), part) for part in ends.T]
    colours = np.concatenate([greys, np.stack(shades, axis=1)]).round()
    others = bytes.fromhex("".join(OTHERS.values()))
    return colours.astype(np.uint8).tobytes() + others


def _round_steps(first: int, last: int, most: int = 4) -> range:
    """Round numbers from the first step to the last, about as many as asked for."""
    sizes = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    size = next(size for size in sizes if size * most >= last - first)
    return range(-(-first // size) * size, last + 1, size)


def _length(texts: Iterable[str], size: int = FONT) -> int:
    """Pixels that the longest takes."""
    return math.ceil(max(map(_font(size).getlength, texts), default=0))


def _font(size: int) -> Any:
    return _pil("ImageFont").load_default(size)


def _pil(module: str) -> Any:
    # Loaded when there is something to draw.
    return importlib.import_module(f"PIL.{module}")

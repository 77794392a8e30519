"""Draws the lag of layers over time as colours, and a letter where something is wrong.

Pillow draws it in 10 to 20 ms. matplotlib takes 100 ms, and 700 ms more to be imported,
which is 1 % of a `fit` of a minute.
"""

import importlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.pictures.names import shorten

CARD, CARD_ROWS = (303, 215), 15
"""Width and height of the picture in TensorBoard's smallest card, and its number of
layers. TensorBoard shrinks larger pictures; it shows this one as it is in any window.
"""

FONT, LINE = 10, 12
"""Heights of letters and lines in pixels."""

LEVELS = (0.5, 1.0, 2.5, 5.0, 10.0)
"""Lags at which the next colour begins, in multiples of the threshold."""

COLOURS = ("#eef2f5", "#cfdde8", "#fecb7b", "#f5813f", "#cc2a2a", "#660c1b")
"""Colours of lags: pale up to the threshold, then from yellow to dark red."""

OTHERS = {"?": "#bbbbbb", "NaN": "#7b2bd6"}
"""Colours of lags that are unknown or not finite."""

DARK = 4
"""Index of the first colour on which letters are white."""


@dataclass(frozen=True)
class HeatMap:
    """What a heat map shows.

    Args:
        paths: Paths of the layers.
        edges: Steps at which columns begin and end, one more than columns.
        lags: Lags, of shape `(layers, columns)`; `nan` if unknown.
        marks: A letter for each lag; empty if nothing was wrong.
        threshold: The lag above which the monitor warns.
        title: A line above.
        legend: What the letters mean.
    """

    paths: Sequence[str]
    edges: Sequence[int]
    lags: NDArray[np.float64]
    marks: NDArray[np.str_]
    threshold: float
    title: str
    legend: Mapping[str, str]

    def card(self) -> tuple[bytes, tuple[int, int]]:
        """Draws the worst layers: a PNG file, its width and its height.

        Layers that are not healthy now come first, then those whose colours have been
        darkest over the whole time.
        """
        darkness = self._levels(self.lags) @ np.diff(self.edges)
        rows = np.lexsort((-darkness, self.marks[:, -1] == ""))[:CARD_ROWS]
        return self._draw(rows, *CARD, longest=18)

    def whole(self) -> tuple[bytes, tuple[int, int]]:
        """Draws all layers in model order: a PNG file, its width and its height."""
        return self._draw(np.arange(len(self.paths)), 640, None, longest=40)

    def _draw(
        self, rows: NDArray[np.intp], width: int, height: int | None, longest: int
    ) -> tuple[bytes, tuple[int, int]]:
        font = _pil("ImageFont").load_default(FONT)
        names = shorten([self.paths[row] for row in rows], longest)
        left = round(max(map(font.getlength, names))) + 7
        legend = list(self._legend(rows, width, font))
        others = LINE * (3 + max((line + 1 for _, line, _ in legend), default=0)) + 5
        height = height or others + LINE * len(rows)
        across, down = width - left - 2, min(height - others, LINE * len(rows))
        image = _pil("Image").new("RGB", (width, height), "white")
        pen = _pil("ImageDraw").Draw(image)

        def write(x: float, y: float, text: str, at: str, ink: str = "black") -> float:
            pen.text((x, y), text, ink, font, at)
            return x + float(font.getlength(text))

        top = 2 * LINE + 3
        write(2, 1, _spaced(self.title), "la")
        x = write(2, LINE + 1, "lag", "la")
        starts = [f"{level * self.threshold:.3g}" for level in LEVELS]
        texts = (f"<{starts[0]}", *starts, *OTHERS)
        for colour, text in zip((*COLOURS, *OTHERS.values()), texts, strict=True):
            pen.rectangle((x + 5, LINE + 3, x + 12, LINE + 10), colour, "black")
            x = write(x + 15, LINE + 1, text, "la")
        cells = _pil("Image").fromarray(self._cells(rows, across))
        image.paste(cells.resize((across, down), 0), (left, top))
        pen.rectangle((left - 1, top - 1, left + across, top + down), outline="black")
        for index, (name, row) in enumerate(zip(names, rows, strict=True)):
            middle = top + (index + 0.5) * down / len(rows)
            write(left - 4, middle, name, "rm")
            for x, mark, ink in self._letters(row, across):
                write(left + x, middle, mark, "mm", ink)
        below, first, last = top + down + 1, self.edges[0], self.edges[-1]
        write(left, below, _spaced(f"step {first:,}"), "la")
        write(left + across / 2, below, f"{(first + last) / 2:,.0f}", "ma")
        write(left + across, below, f"{last:,}", "ra")
        for x, line, text in legend:
            write(x, below + LINE * (line + 1), text, "la")
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue(), (width, height)

    def _levels(self, lags: NDArray[np.float64]) -> NDArray[np.intp]:
        """The index of each lag's colour."""
        levels = np.digitize(lags, np.array(LEVELS) * self.threshold)
        kinds, others = [np.isnan(lags), np.isinf(lags)], len(COLOURS)
        return np.select(kinds, [others, others + 1], levels)

    def _cells(self, rows: NDArray[np.intp], width: int) -> NDArray[np.uint8]:
        """Colours, `(layers, width, 3)`; a pixel of many columns gets the darkest."""
        steps = np.linspace(self.edges[0], self.edges[-1], width, endpoint=False)
        columns = np.searchsorted(self.edges, steps, side="right") - 1
        seen, column_of = np.unique(columns, return_inverse=True)
        joined = np.fmax.reduceat(self.lags[rows], seen, axis=1)[:, column_of]
        table = [bytes.fromhex(each[1:]) for each in (*COLOURS, *OTHERS.values())]
        cells: NDArray[np.uint8] = np.array(list(map(list, table)), np.uint8)[
            self._levels(joined)
        ]
        return cells

    def _letters(self, row: int, width: int) -> Iterator[tuple[float, str, str]]:
        """The letters of a row: x, letter and colour.

        A letter stands where a cause begins, and again if it lasts for long.
        """
        x_of = (np.array(self.edges) - self.edges[0]) * width / np.ptp(self.edges)
        levels = self._levels(self.lags[row])
        column, before = 0, -FONT
        for mark, group in itertools.groupby(self.marks[row].tolist()):
            begin, column = column, column + len(list(group))
            length = (x_of[column] - x_of[begin]) * bool(mark)
            for further in range(0, int(np.ceil(length)), 48):
                x = x_of[begin] + further + min(FONT, length - further) / 2
                x = min(max(x, FONT / 2), width - FONT / 2)
                if x - before >= FONT - 2:
                    before = x
                    at = np.searchsorted(x_of, x, side="right") - 1
                    yield x, mark, "white" if levels[at] >= DARK else "black"

    def _legend(
        self, rows: NDArray[np.intp], width: int, font: Any
    ) -> Iterator[tuple[int, int, str]]:
        """The explanations of the letters that occur: x, line and text."""
        present = set(self.marks[rows].ravel().tolist())
        x, line = 2, 0
        for mark, meaning in self.legend.items():
            text = _spaced(f"{mark} {meaning}")
            if mark in present:
                length = round(font.getlength(text))
                if x > 2 and x + length > width:
                    x, line = 2, line + 1
                yield x, line, text
                x += length + 12


def is_available() -> bool:
    """Whether a version of Pillow is installed that has letters of any size."""
    try:
        importlib.import_module("PIL")
        _pil("ImageFont").load_default(FONT)
    except (ImportError, TypeError):
        return False
    return True


def _spaced(text: str) -> str:
    """Doubles the spaces: in this font size a space has only two pixels."""
    return text.replace(" ", "  ")


def _pil(module: str) -> Any:
    # Imported only to draw.
    return importlib.import_module(f"PIL.{module}")

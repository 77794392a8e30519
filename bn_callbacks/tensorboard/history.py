"""Remembers the figures of all layers since training began, in little memory."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.report import UNKNOWN, LayerReport
from bn_callbacks.statistics import causes

MAX_COLUMNS = 128
"""Largest number of columns; a picture cannot show more."""

FIGURES = ("lag", "mean_shift", "scale_ratio", "noise", "start_weight")
"""The figures kept of each layer, the lag first."""

MARKS = {
    causes.WARMING_UP: "W",
    causes.DRIFTING: "D",
    causes.NOISY: "N",
    causes.TINY_BATCH: "T",
    causes.CORRELATED_BATCHES: "C",
    causes.MIXED_CALLS: "M",
    causes.WEIGHTS_REPLACED: "R",
    causes.INFERENCE_MODE: "I",
    causes.NOT_UPDATING: "U",
    causes.UNEXPECTED_UPDATE: "X",
    causes.LOW_PRECISION: "L",
    causes.OUTLIERS: "O",
    causes.NON_FINITE: "F",
    causes.REPLICAS_DIFFER: "P",
    causes.STALE: "S",
    causes.RESCALED_INPUTS: "Z",
    causes.BATCH_DEPENDENT: "B",
}
"""A letter for each cause but healthy and unknown."""


class History:
    """Remembers figures and causes of all layers over time.

    If there are too many columns, each two neighbours become one, which keeps the worse
    figures of each layer. So a long training loses no trouble, only its exact time.

    Args:
        start: The step at which training begins.
    """

    def __init__(self, start: int) -> None:
        self._edges = [start]
        self._figures: list[NDArray[np.float64]] = []
        self._marks: list[NDArray[np.str_]] = []

    def add(self, step: int, layers: Sequence[LayerReport]) -> None:
        """Adds the reports of all layers at a step.

        Args:
            step: The step. The same step as the last one replaces its column.
            layers: Reports of all layers, always in the same order.
        """
        figures = np.array(
            [[_number(getattr(layer, name)) for name in FIGURES] for layer in layers],
            np.float64,
        ).reshape(len(layers), len(FIGURES))
        marks = np.array([mark_of(layer.cause) for layer in layers], "<U1")
        if self._figures and step <= self._edges[-1]:
            self._figures[-1], self._marks[-1] = figures, marks
            return
        self._edges.append(max(step, self._edges[-1] + 1))
        self._figures.append(figures)
        self._marks.append(marks)
        if len(self._figures) > MAX_COLUMNS:
            self._halve()

    def _halve(self) -> None:
        last = len(self._figures) - len(self._figures) % 2
        for one in range(0, last, 2):
            lags, others = self._figures[one][:, 0], self._figures[one + 1][:, 0]
            is_marked, other_is = self._marks[one] != "", self._marks[one + 1] != ""
            is_larger = (others >= lags) | np.isnan(lags)
            is_worse = np.where(is_marked == other_is, is_larger, other_is)
            for kept in (self._figures, self._marks):
                which = is_worse.reshape(-1, *[1] * (kept[one].ndim - 1))
                kept[one] = np.where(which, kept[one + 1], kept[one])
        del self._figures[1:last:2], self._marks[1:last:2], self._edges[1:last:2]

    @property
    def edges(self) -> list[int]:
        """The steps at which columns begin and end, one more than columns."""
        return list(self._edges)

    @property
    def lags(self) -> NDArray[np.float64]:
        """The lags, of shape `(layers, columns)`; `nan` if unknown."""
        return np.stack(self._figures, axis=1)[..., 0]

    @property
    def marks(self) -> NDArray[np.str_]:
        """The letters of the causes, of the same shape; empty if healthy or unknown."""
        return np.stack(self._marks, axis=1)

    def past(self, index: int) -> Iterator[tuple[int, dict[str, float]]]:
        """The known figures of a layer: for each column its last step, and by name."""
        for step, figures in zip(self._edges[1:], self._figures, strict=True):
            known = zip(FIGURES, figures[index].tolist(), strict=True)
            yield step, {name: value for name, value in known if math.isfinite(value)}


def mark_of(cause: str) -> str:
    """The letter of a cause; empty if healthy or unknown."""
    return "" if cause in (causes.HEALTHY, UNKNOWN) else MARKS.get(cause, "?")


def _number(figure: float | None) -> float:
    """`nan` for unknown figures; infinity, the worst, for those that are NaN."""
    if figure is None:
        return math.nan
    return math.inf if math.isnan(figure) else figure

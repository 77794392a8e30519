"""The lags of all layers since training began, in little memory."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_COLUMNS = 128
"""Columns kept at most; more than a picture shows apart."""


class LagHistory:
    """Remembers the lags of all layers over time.

    When there are too many columns, each two neighbours become one, which keeps the
    larger lag: however long training lasts, a lag is not forgotten.

    Args:
        start: The step at which training begins.
    """

    def __init__(self, start: int) -> None:
        self._edges = [start]
        self._columns: list[NDArray[np.float64]] = []

    def add(self, step: int, lags: Sequence[float | None]) -> None:
        """Adds what was found at a step.

        Args:
            step: The step. What is found at the step before again replaces that.
            lags: The lags of all layers; None where unknown.
        """
        values = np.array([_number(lag) for lag in lags], np.float64)
        if self._columns and step <= self._edges[-1]:
            self._columns[-1] = values
            return
        self._edges.append(max(step, self._edges[-1] + 1))
        self._columns.append(values)
        if len(self._columns) > MAX_COLUMNS:
            self._halve()

    def _halve(self) -> None:
        last = self._columns.pop() if len(self._columns) % 2 else None
        self._columns = [
            np.fmax(one, other)
            for one, other in zip(self._columns[::2], self._columns[1::2], strict=True)
        ]
        end = self._edges[-1]
        self._edges = self._edges[::2]
        if last is not None:
            self._columns.append(last)
            self._edges.append(end)

    @property
    def edges(self) -> list[int]:
        """The steps at which columns begin and end, one more than columns."""
        return list(self._edges)

    @property
    def lags(self) -> NDArray[np.float64]:
        """The lags, of shape `(layers, columns)`; `nan` where unknown."""
        return np.stack(self._columns, axis=1)


def _number(lag: float | None) -> float:
    """`nan` if unknown; a lag that is no number is as bad as lags can be."""
    if lag is None:
        return math.nan
    return math.inf if math.isnan(lag) else lag

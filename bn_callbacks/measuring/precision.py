"""Decides when enough data have been read."""

from collections.abc import Sequence

from bn_callbacks.layers import BatchNormLayer
from bn_callbacks.statistics.moments import Moments
from bn_callbacks.statistics.sampling import Blocks

MIN_BATCHES = 16
"""Smallest number of batches before a pass may stop."""


class Precision:
    """Decides when the statistics of all layers are precise enough.

    Args:
        layers: The layers.
        tolerance: Largest standard error allowed, in standard deviations.
        most: Examples after which to stop in any case; None for no such limit.
    """

    def __init__(
        self, layers: Sequence[BatchNormLayer], tolerance: float, most: int | None
    ) -> None:
        self._layers = [(bn.epsilon, Blocks()) for bn in layers]
        self._tolerance = tolerance
        self._most = most
        self._count = self._due = self._examples = 0

    def __call__(self, batch: list[Moments], examples: int) -> bool:
        """Takes the next batch into account, and returns whether to stop."""
        self._count += 1
        self._examples += examples
        for (_, blocks), moments in zip(self._layers, batch, strict=True):
            blocks.add(moments)
        if self._most is not None and self._examples >= self._most:
            return True
        if self._count < max(self._due, MIN_BATCHES):
            return False
        # A check costs time, and a late one wastes batches: an eighth more each time.
        self._due = self._count + self._count // 8
        errors = (blocks.standard_error(epsilon) for epsilon, blocks in self._layers)
        return all(e is not None and e <= self._tolerance for e in errors)

"""When the data that have been read are enough."""

from collections.abc import Sequence

from bn_callbacks.layers import BatchNormLayer
from bn_callbacks.statistics.moments import Moments
from bn_callbacks.statistics.sampling import Blocks

MIN_BATCHES = 16
"""Batches that are read before a pass may stop."""


class Precision:
    """Tells when the statistics of all layers are precise enough.

    Args:
        layers: The layers.
        tolerance: Standard error that is small enough, in standard deviations.
        most: Batches that are enough in any case; None for all.
    """

    def __init__(
        self, layers: Sequence[BatchNormLayer], tolerance: float, most: int | None
    ) -> None:
        self._layers = [(bn.epsilon, Blocks()) for bn in layers]
        self._tolerance = tolerance
        self._most = most
        self._count = self._due = 0

    def __call__(self, batch: list[Moments]) -> bool:
        """Whether it is enough with the next batch."""
        self._count += 1
        for (_, blocks), moments in zip(self._layers, batch, strict=True):
            blocks.add(moments)
        if self._most is not None and self._count >= self._most:
            return True
        if self._count < max(self._due, MIN_BATCHES):
            return False
        # Rarely enough to cost little, often enough to waste few batches.
        self._due = self._count + self._count // 8
        errors = [blocks.standard_error(epsilon) for epsilon, blocks in self._layers]
        return all(e is not None and e <= self._tolerance for e in errors)

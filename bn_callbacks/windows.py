"""Readings of the moving averages in training, and what they give away."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.layers import BatchNormLayer, Reader, versions
from bn_callbacks.statistics.diagnosis import FORGOTTEN, Evidence
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import start_weight, window_statistic

KEPT_WINDOWS = 16
"""Windows remembered for the estimate of noise."""

LONG_WINDOW = 0.5
"""Weight of the old value below which an average consists mainly of its window."""

Flat = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Window:
    """Two readings with `steps` training steps between them."""

    old: Flat
    new: Flat
    steps: int
    is_valid: NDArray[np.bool_]


class Windows:
    """Follows the moving averages of some layers through training.

    Args:
        model: The model in training.
        layers: The layers to follow.
    """

    def __init__(self, model: keras.Model, layers: Sequence[BatchNormLayer]) -> None:
        self.layers = list(layers)
        self._reader = Reader(model, layers)
        self._kept: deque[_Window] = deque(maxlen=KEPT_WINDOWS)
        self._updates = np.zeros(len(layers), int)
        self._has_moved = np.zeros(len(layers), bool)
        self._calls = np.array([bn.calls for bn in layers], int)
        self._now = self._start = self._reader()[1]
        self._is_initial = [
            all(map(np.array_equal, self._part(self._now, index), bn.initial))
            for index, bn in enumerate(self.layers)
        ]
        self._versions = versions(layers)

    def rebase(self) -> int | None:
        """Reads afresh where others may have written since the last reading.

        Returns:
            The optimizer's step counter, None without one.
        """
        iterations, now = self._reader()
        self._restart(~self._is_same(self._now, now))
        self._now = now
        return iterations

    def read(self) -> tuple[int | None, Flat]:
        """The optimizer's step counter and all averages now, for `close`."""
        return self._reader()

    def close(self, now: Flat, steps: int | None) -> None:
        """Ends a window.

        Args:
            now: The averages, as `read` gives them.
            steps: Training steps since the reading before; None if unknown, which
                drops the window.
        """
        if steps == 0:
            return
        current = versions(self.layers)
        is_valid = np.array(current) == np.array(self._versions)
        if steps is None:
            is_valid[:] = False
        else:
            self._updates += steps * self._calls
            self._has_moved |= ~self._is_same(self._now, now)
            self._kept.append(_Window(self._now, now, steps, is_valid))
        self._now = now
        self._restart(~is_valid)

    def _restart(self, which: NDArray[np.bool_]) -> None:
        """Counts afresh for layers whose averages hold something else than batches."""
        if which.any():
            self._start = np.where(self._spread(which), self._now, self._start)
            self._updates[which] = 0
            self._has_moved[which] = False
        self._versions = versions(self.layers)

    def evidence(
        self, index: int, total_steps: int | None, threshold: float
    ) -> Evidence:
        """All that the readings say of one layer."""
        bn = self.layers[index]
        updates = int(self._updates[index])
        windows = [w for w in self._kept if w.is_valid[index]]
        batch, past = self._latest(index, windows, updates)
        length = Counter(w.steps for w in windows).most_common(1)
        equal = [w for w in windows if w.steps == length[0][0]] if length else []
        return Evidence(
            path=bn.path,
            momentum=bn.momentum,
            epsilon=bn.epsilon,
            moving=self._part(self._now, index),
            batch=batch,
            past=past,
            trainable=bn.trainable,
            updates=updates,
            total_updates=None if total_steps is None else total_steps * bn.calls,
            start=self._part(self._start, index) if updates else None,
            windows=[self._batch(w.old, w.new, w.steps, index) for w in equal]
            if bn.momentum < 1
            else [],
            window_updates=equal[0].steps * bn.calls if equal else None,
            is_still=updates > 0 and not self._has_moved[index],
            is_initial=self._is_initial[index],
            threshold=threshold,
        )

    def _latest(
        self, index: int, windows: list[_Window], updates: int
    ) -> tuple[Statistics | None, Statistics | None]:
        """Batch statistics of the last window; what the layer stored before it.

        The latter only where the average consists mainly of the window itself, so
        that holding the two against each other would tell nothing.
        """
        bn = self.layers[index]
        if not windows or bn.momentum == 1:
            return None, None
        last = windows[-1]
        old, steps = last.old, last.steps
        if len(windows) > 1 and windows[-2].new is old and steps < windows[-2].steps:
            # The rest of an epoch may be a step or two, too few to go by.
            old, steps = windows[-2].old, steps + windows[-2].steps
        batch = self._batch(old, last.new, steps, index)
        count = steps * bn.calls
        is_long = start_weight(bn.momentum, count) < LONG_WINDOW
        is_warm = start_weight(bn.momentum, max(0, updates - count)) <= FORGOTTEN
        return batch, self._part(old, index) if is_long and is_warm else None

    def _batch(self, old: Flat, new: Flat, steps: int, index: int) -> Statistics:
        bn = self.layers[index]
        before, after = (self._reader.averages(flat, index) for flat in (old, new))
        return bn.statistics(
            window_statistic(before, after, bn.momentum, steps * bn.calls)
        )

    def _part(self, flat: Flat, index: int) -> Statistics:
        return self.layers[index].statistics(self._reader.averages(flat, index))

    def _is_same(self, one: Flat, other: Flat) -> NDArray[np.bool_]:
        return self._reader.all_per_layer(
            (one == other) | (np.isnan(one) & np.isnan(other))
        )

    def _spread(self, per_layer: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return self._reader.spread(per_layer)

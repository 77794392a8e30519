"""Readings of the moving averages in training, and what they give away."""

import functools
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.layers import (
    BatchNormLayer,
    Reader,
    has_own_train_step,
    pinned_in_graph,
    versions,
)
from bn_callbacks.statistics.evidence import FORGOTTEN, Evidence
from bn_callbacks.statistics.moments import Statistics, pool_replicas
from bn_callbacks.statistics.moving_average import (
    start_weight,
    window_noise,
    window_statistic,
)
from bn_callbacks.statistics.stream import MIN_WINDOWS, recurrence

KEPT_WINDOWS = 16
"""Windows remembered for the estimate of noise."""

LONG_WINDOW = 0.5
"""Weight of the old value below which an average consists mainly of its window."""

Flat = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Window:
    """Two readings with `steps` training steps between them.

    `kinds` has each layer's momentum and its calls in a step.
    """

    reader: Reader
    old: Flat
    new: Flat
    steps: int
    is_valid: NDArray[np.bool_]
    kinds: list[tuple[float, int]]
    epoch: int = 0

    @functools.cached_property
    def batches(self) -> Flat:
        """Statistics of the window's batches, `nan` for layers with momentum 1."""
        # Layers are many, and their kinds are few.
        found = np.full_like(self.new, np.nan)
        kinds = set(self.kinds)
        for kind in kinds:
            momentum, calls = kind
            if momentum < 1:
                alike: Any = slice(None)
                if len(kinds) > 1:
                    alike = self.reader.spread([each == kind for each in self.kinds])
                found[:, alike] = window_statistic(
                    self.old[:, alike], self.new[:, alike], momentum, self.steps * calls
                )
        return found


class _Series(NamedTuple):
    """Windows in a row for each: length, validity by layer, batch statistics."""

    steps: NDArray[np.int_]
    is_valid: NDArray[np.bool_]
    batches: Flat


class Windows:
    """Follows the moving averages of some layers through training.

    Args:
        model: The model in training.
        layers: The layers to follow.
        length: Steps of a window. What is read more often is joined until it is as
            long, so that nothing depends on how often one reads.
    """

    def __init__(
        self, model: keras.Model, layers: Sequence[BatchNormLayer], length: int
    ) -> None:
        self.layers = list(layers)
        self._length = length
        self._reader = Reader(model, layers)
        self._kept: deque[_Window] = deque(maxlen=KEPT_WINDOWS)
        self._updates = np.zeros(len(layers), int)
        self._has_moved = np.zeros(len(layers), bool)
        self._calls = np.array([bn.calls for bn in layers], int)
        self._now = self._start = self._reader()[1]
        self._versions = versions(layers)
        self._epoch = 0
        self._epochs = (self._series([]), self._series([]))
        self._pinned = pinned_in_graph(model)
        self._is_own_step = has_own_train_step(model)

    def rebase(self) -> tuple[int | None, Flat]:
        """Reads afresh where others may have written since the last reading.

        Returns:
            As `read`.
        """
        iterations, now = self._reader()
        is_foreign = ~self._is_same(self._now, now)
        self._now = now
        self._restart(is_foreign)
        return iterations, now

    def end_epoch(self) -> None:
        """Keeps the windows of the epoch for comparison with the next one's."""
        windows = [window for window in self._kept if window.epoch == self._epoch]
        self._epochs = (self._epochs[1], self._series(windows))
        self._epoch += 1

    def updating(self) -> list[BatchNormLayer]:
        """The layers that use batches: those not frozen, and those that moved."""
        pairs = zip(self.layers, self._has_moved, strict=True)
        return [bn for bn, has_moved in pairs if bn.trainable or has_moved]

    def is_untouched(self) -> bool:
        """Whether nobody has written the averages since the last reading."""
        return bool(self._is_same(self._now, self._reader()[1]).all())

    def read(self) -> tuple[int | None, Flat]:
        """The optimizer's step counter and all averages now, for `close`."""
        return self._reader()

    def close(self, now: Flat, steps: int | None) -> None:
        """Ends a window.

        Args:
            now: The averages, as `read` gives them.
            steps: Training steps since the reading before; None if unknown, which
                drops the window. Negative where data ran out before that reading
                already, so that its window was shorter than was thought.
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
            kinds = [(bn.momentum, bn.calls) for bn in self.layers]
            self._keep(
                _Window(
                    self._reader, self._now, now, steps, is_valid, kinds, self._epoch
                )
            )
        self._now = now
        self._restart(~is_valid)

    def _keep(self, window: _Window) -> None:
        last = self._kept[-1] if self._kept else None
        if last is not None and last.new is window.old:
            is_short = last.steps < self._length or window.steps < 0
            if is_short and np.array_equal(last.is_valid, window.is_valid):
                self._kept.pop()
                window = replace(window, old=last.old, steps=last.steps + window.steps)
        if window.steps > 0:
            self._kept.append(window)

    def _restart(self, which: NDArray[np.bool_]) -> None:
        """Counts afresh for layers whose averages hold something else than batches."""
        if which.any():
            self._start = np.where(self._spread(which), self._now, self._start)
            self._updates[which] = 0
            self._has_moved[which] = False
        self._versions = versions(self.layers)

    def evidence(self, total_steps: int | None, threshold: float) -> list[Evidence]:
        """All that the readings say of each layer."""
        kept = self._series(self._kept)
        return [
            self._evidence(index, kept, total_steps, threshold)
            for index in range(len(self.layers))
        ]

    def _evidence(
        self,
        index: int,
        kept: _Series,
        total_steps: int | None,
        threshold: float,
    ) -> Evidence:
        bn = self.layers[index]
        before, after = (
            self._batches(epoch, index, self._length) for epoch in self._epochs
        )
        updates = int(self._updates[index])
        windows = [w for w in self._kept if w.is_valid[index]]
        batch, past = self._latest(index, windows, updates)
        length = Counter(w.steps for w in windows).most_common(1)
        steps, count = length[0] if length else (0, 0)
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
            windows=self._batches(kept, index, steps)
            if count and bn.momentum < 1
            else None,
            window_updates=steps * bn.calls if count else None,
            window_share=window_noise(bn.momentum, steps * bn.calls) if count else None,
            is_still=updates > 0 and not self._has_moved[index],
            is_initial=all(
                map(np.array_equal, self._part(self._start, index), bn.initial)
            ),
            is_pinned=id(bn.layer) in self._pinned,
            precision=bn.precision,
            has_mixed_calls=bn.calls > 1 or self._is_own_step,
            replicas=self._replicas(self._now, index)
            if len(self._now) > 1 and count >= MIN_WINDOWS
            else [],
            recurrence=recurrence(before, after, bn.epsilon)
            if bn.momentum < 1
            else None,
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
        """Batch statistics of a window, of all replicas together."""
        bn = self.layers[index]
        before, after = (self._reader.averages(flat, index) for flat in (old, new))
        batches = window_statistic(before, after, bn.momentum, steps * bn.calls)
        return pool_replicas([bn.statistics(each) for each in batches])

    def _series(self, windows: Collection[_Window]) -> _Series:
        """Windows on the first replica."""
        return _Series(
            np.array([each.steps for each in windows], int),
            np.array([each.is_valid for each in windows], bool).reshape(
                -1, len(self.layers)
            ),
            np.concatenate([self._now[:0], *(each.batches[:1] for each in windows)]),
        )

    def _batches(self, series: _Series, index: int, steps: int) -> Statistics:
        """Batch statistics of a layer in the valid windows of so many steps."""
        chosen = series.is_valid[:, index] & (series.steps == steps)
        averages = self._reader.averages(series.batches, index)
        if not chosen.all():  # All need no copy.
            averages = averages[chosen]
        return self.layers[index].statistics(averages.swapaxes(0, 1))

    def _part(self, flat: Flat, index: int) -> Statistics:
        return self._replicas(flat, index)[0]

    def _replicas(self, flat: Flat, index: int) -> list[Statistics]:
        averages = self._reader.averages(flat, index)
        return [self.layers[index].statistics(each) for each in averages]

    def _is_same(self, one: Flat, other: Flat) -> NDArray[np.bool_]:
        return self._reader.all_per_layer(
            (one == other) | (np.isnan(one) & np.isnan(other))
        )

    def _spread(self, per_layer: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return self._reader.spread(per_layer)

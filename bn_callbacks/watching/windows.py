"""Computes the statistics of batches from readings of the moving averages."""

import functools
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.evidence import evidence_of
from bn_callbacks.layers import (
    BatchNormLayer,
    Calls,
    has_own_train_step,
    pinned_in_graph,
)
from bn_callbacks.statistics.evidence import Evidence, is_negative
from bn_callbacks.statistics.moments import Statistics, pool_replicas
from bn_callbacks.statistics.moving_average import (
    FORGOTTEN,
    start_weight,
    window_noise,
    window_statistic,
)
from bn_callbacks.statistics.scatter import Scatter, rounding_of, scatter_of_runs
from bn_callbacks.statistics.stream import MIN_WINDOWS, recurrence
from bn_callbacks.watching.readings import Flat, Readings

KEPT_WINDOWS = 16
"""Windows remembered to estimate noise."""

LONG_WINDOW = 0.5
"""Weight of the old value below which the average is mainly that of its window."""

KEPT_RUNS = 4
"""Runs of single steps remembered."""

RUN = 8
"""Largest number of steps in such a run."""


@dataclass(frozen=True, eq=False)
class _Window:
    """Two readings with `steps` training steps between them.

    `kinds` holds each layer's momentum, and how often a step updates it.
    """

    readings: Readings
    old: Flat
    new: Flat
    steps: int
    is_valid: NDArray[np.bool_]
    kinds: list[tuple[float, int]]
    epoch: int = 0

    @functools.cached_property
    def batches(self) -> Flat:
        """Statistics of the window's batches; `nan` for layers with momentum 1."""
        # At once for all layers of a kind: a model has many layers, but few kinds.
        found = np.full_like(self.new, np.nan)
        kinds = set(self.kinds)
        for kind in kinds:
            momentum, calls = kind
            if momentum < 1 and calls:
                alike: Any = slice(None)
                if len(kinds) > 1:
                    alike = self.readings.spread([each == kind for each in self.kinds])
                found[:, alike] = window_statistic(
                    self.old[:, alike], self.new[:, alike], momentum, self.steps * calls
                )
        return found


class _Series(NamedTuple):
    """Windows, one in each row: length, validity for each layer, batch statistics."""

    steps: NDArray[np.int_]
    is_valid: NDArray[np.bool_]
    batches: Flat


class Windows:
    """Follows the moving averages of some layers through training.

    Args:
        model: The model in training.
        layers: The layers to follow.
        length: Steps of a window. Shorter ones are joined until they are as long, so
            that the result does not depend on how often one reads.

    Attributes:
        readings: Reads the averages.
        is_written: For each layer, whether its averages were written without a training
            step since the last `reread`.
    """

    def __init__(
        self, model: keras.Model, layers: Sequence[BatchNormLayer], length: int
    ) -> None:
        self.layers = list(layers)
        self._length = length
        self.readings = Readings(model, layers)
        self._kept: deque[_Window] = deque(maxlen=KEPT_WINDOWS)
        self._runs: deque[list[Flat]] = deque(maxlen=KEPT_RUNS)
        # The epoch of the last run, and what it has shown beside that epoch's windows.
        self._run_epoch = 0
        self._dominance: dict[int, float] = {}
        self._steps = np.zeros(len(layers), int)
        self._updates = np.zeros(len(layers), int)
        self._has_moved = np.zeros(len(layers), bool)
        self._is_trainable = self._trainable()
        self._calls = [Calls(bn.calls) for bn in layers]
        # Layers whose updates are miscounted, as a negative variance has proven.
        self._is_miscounted = np.zeros(len(layers), bool)
        # Written by others without a training step, while the weights stayed the same.
        self.is_written = np.zeros(len(layers), bool)
        self._is_touched = np.zeros(len(layers), bool)
        self._start = self.readings.now
        self._epoch = 0
        self._epochs = (self._series([]), self._series([]))
        self._pinned = pinned_in_graph(model)
        self._is_own_step = has_own_train_step(model)

    def set_calls(self, calls: Sequence[Calls]) -> None:
        """Sets how a training step calls each layer, as far as that was seen."""
        self._calls = list(calls)

    def reread(self) -> tuple[int | None, Flat]:
        """Reads as an epoch begins: what has changed since is no work of training.

        Returns:
            The optimizer's step counter (None without one), and all averages.
        """
        reading, is_own, is_foreign = self.readings.reread()
        self._restart(is_own | is_foreign)
        self._begin_run(reading[1])
        self._is_touched[:] = self.is_written[:] = False
        return reading

    def look_outside(self, are_weights_same: bool) -> None:
        """Finds out, before a report, who has written averages since the last step.

        If the weights are the same, something else than a training step has called a
        layer in training mode, or has written it. If not, averages and weights may have
        been written together, and nothing is known of the layer yet.

        Args:
            are_weights_same: Whether the weights are those after that step.
        """
        _, is_own, is_foreign = self.readings.reread()
        self._restart(is_own | is_foreign)
        self.is_written |= is_own | is_foreign
        if are_weights_same:
            self._is_touched |= is_foreign
        else:
            for window in self._kept:
                window.is_valid[is_own | is_foreign] = False

    def end_epoch(self) -> None:
        """Keeps the windows of the epoch, to compare them with those of the next."""
        windows = [window for window in self._kept if window.epoch == self._epoch]
        self._epochs = (self._epochs[1], self._series(windows))
        self._epoch += 1

    def updating(self) -> list[BatchNormLayer]:
        """The layers that normalise by batch: those not frozen or that have moved."""
        pairs = zip(self.layers, self._has_moved, strict=True)
        return [bn for bn, has_moved in pairs if bn.trainable or has_moved]

    def _trainable(self) -> NDArray[np.bool_]:
        return np.array([bn.trainable for bn in self.layers], bool)

    @property
    def is_touched(self) -> bool:
        """Whether others have written averages since the last step, but no weights."""
        return bool(self._is_touched.any())

    def close(
        self, now: Flat, steps: int | None, versions: NDArray[np.int_] | None = None
    ) -> None:
        """Ends a window.

        Args:
            now: The averages, as `readings` gives them.
            steps: Training steps since the reading before. None if unknown, which drops
                the window. Negative if the data had ended before that reading, so that
                its window was shorter than assumed.
            versions: The `versions` of `readings` then; by default the present ones.
        """
        if steps == 0:
            return
        before = self.readings.now
        # A layer that is frozen in the middle of training has that much to keep.
        was_trainable, self._is_trainable = self._is_trainable, self._trainable()
        self._restart(was_trainable & ~self._is_trainable)
        is_valid = ~self.readings.keep(now, versions)
        if steps is None:
            is_valid[:] = False
        else:
            self._run(before, now, steps)
            self._steps += steps
            calls = np.array([each.updates or 0 for each in self._calls])
            self._updates += steps * calls
            self._has_moved |= ~self.readings.is_same(before, now)
            kinds = [
                (bn.momentum, count)
                for bn, count in zip(self.layers, calls.tolist(), strict=True)
            ]
            self._keep(
                _Window(self.readings, before, now, steps, is_valid, kinds, self._epoch)
            )
        self._restart(~is_valid)

    def _run(self, before: Flat, now: Flat, steps: int) -> None:
        """Continues a run of single steps, or begins one."""
        last = self._runs[-1] if self._runs else [None]
        if steps == 1 and last[-1] is before and len(last) <= RUN:
            self._runs[-1].append(now)
            if len(self._runs[-1]) > MIN_WINDOWS:
                self._run_epoch = self._epoch
        else:
            self._begin_run(now)

    def _begin_run(self, now: Flat) -> None:
        if self._runs and len(self._runs[-1]) <= MIN_WINDOWS:
            self._runs.pop()  # It is too short to say anything.
        self._runs.append([now])

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
        """Counts from 0 again for layers that others have written."""
        if which.any():
            self._start = self.readings.choose(which, self.readings.now, self._start)
            self._updates[which] = self._steps[which] = 0
            self._has_moved[which] = False
            self._runs.clear()

    def evidence(self, total_steps: int | None, threshold: float) -> list[Evidence]:
        """Collects what the readings say of each layer."""
        kept = self._series(self._kept)
        last = [w for w in self._kept if w.epoch == self._kept[-1].epoch]
        is_new = bool(last) and last[-1].epoch == self._run_epoch
        beside = self._series(last if is_new else [])
        return [
            self._evidence(index, kept, beside, total_steps, threshold)
            for index in range(len(self.layers))
        ]

    def _evidence(
        self,
        index: int,
        kept: _Series,
        beside: _Series,
        total_steps: int | None,
        threshold: float,
    ) -> Evidence:
        bn, calls = self.layers[index], self._calls[index]
        moving = self._part(self.readings.now, index)
        is_counted = calls.updates is not None and not self._is_miscounted[index]
        known: dict[str, Any] = {}
        if is_counted:
            known = self._of_windows(index, kept, beside, total_steps)
        updates = int(self._updates[index])
        is_still = self._steps[index] > 0 and not self._has_moved[index]
        return evidence_of(
            bn,
            moving,
            began=self._part(self._start, index),
            updates=updates if is_counted else None,
            is_called=calls.is_called is not False,
            trains=calls.trains,
            is_still=bool(is_still),
            is_pinned=id(bn.layer) in self._pinned,
            is_touched=bool(self._is_touched[index]),
            has_mixed_calls=(calls.updates or 1) > 1
            or (self._is_own_step and calls.updates is None),
            threshold=threshold,
            **known,
        )

    def _of_windows(
        self, index: int, kept: _Series, beside: _Series, total_steps: int | None
    ) -> dict[str, Any]:
        """Collects what the windows say of a layer whose updates are counted."""
        bn, count = self.layers[index], self._calls[index].updates or 0
        updates = int(self._updates[index])
        windows = [w for w in self._kept if w.is_valid[index]]
        batch, past, length = self._latest(index, windows, updates)
        if batch is not None and self._is_impossible(batch, windows[-1], index):
            self._is_miscounted[index] = True
            return {}
        usual = Counter(w.steps for w in windows).most_common(1)
        steps, times = usual[0] if usual and bn.momentum < 1 else (0, 0)
        before, after = (
            self._batches(epoch, index, self._length) for epoch in self._epochs
        )
        return {
            "batch": batch,
            "past": past,
            "batch_share": window_noise(bn.momentum, length) if length else None,
            "total_updates": None if total_steps is None else total_steps * count,
            "start": self._part(self._start, index) if updates else None,
            "windows": self._batches(kept, index, steps) if times else None,
            "window_updates": steps * count if times else None,
            "window_share": window_noise(bn.momentum, steps * count) if times else None,
            "scatter": self._scatter(index, beside),
            "replicas": self.readings.statistics(self.readings.now, index)
            if len(self.readings.now) > 1 and times >= MIN_WINDOWS
            else [],
            "recurrence": recurrence(before, after, bn.epsilon)
            if bn.momentum < 1
            else None,
        }

    def _is_impossible(self, batch: Statistics, window: _Window, index: int) -> bool:
        """Whether the batches have a negative variance, which proves a wrong count."""
        made_of = (self._part(flat, index) for flat in (window.old, window.new))
        return self.layers[index].precision is None and is_negative(
            batch.variance, *(each.variance for each in made_of)
        )

    def _scatter(self, index: int, beside: _Series) -> Scatter | None:
        """How the batches of successive single steps differ.

        Args:
            index: The layer.
            beside: The windows of the latest epoch, if it has the latest run: a rare
                batch of huge variance shows in one of them. None of other epochs, since
                weights change all scales.
        """
        bn, count = self.layers[index], self._calls[index].updates or 0
        if bn.momentum == 1 or bn.precision is not None or not count:
            return None
        runs = []
        for run in self._runs:
            flat = np.concatenate([each[:1] for each in run])
            averages = self.readings.averages(flat, index)
            batches = window_statistic(averages[:-1], averages[1:], bn.momentum, count)
            runs.append(bn.statistics(batches.swapaxes(0, 1)))
        moving = self._part(self.readings.now, index)
        rounding = rounding_of(moving, bn.epsilon, bn.momentum**count)
        windows = self._batches(beside, index)
        found = scatter_of_runs(runs, bn.epsilon, rounding=rounding, windows=windows)
        if found is None:
            return None
        if len(windows.mean):
            self._dominance[index] = found.dominance
        return replace(found, dominance=self._dominance.get(index, found.dominance))

    def _latest(
        self, index: int, windows: list[_Window], updates: int
    ) -> tuple[Statistics | None, Statistics | None, int]:
        """Batch statistics of the last window; the average before it; its updates.

        The average before is given only if the present one consists mainly of the
        window, so that comparing the two would say nothing.
        """
        bn, count = self.layers[index], self._calls[index].updates or 0
        if not windows or bn.momentum == 1 or not count:
            return None, None, 0
        last = windows[-1]
        old, steps = last.old, last.steps
        if len(windows) > 1 and windows[-2].new is old and steps < windows[-2].steps:
            # An epoch may end with a window of a step or two, too short alone.
            old, steps = windows[-2].old, steps + windows[-2].steps
        batch = self._batch(old, last.new, steps, index)
        length = steps * count
        is_long = start_weight(bn.momentum, length) < LONG_WINDOW
        is_warm = start_weight(bn.momentum, max(0, updates - length)) <= FORGOTTEN
        past = self._part(old, index) if is_long and is_warm else None
        return batch, past, length

    def _batch(self, old: Flat, new: Flat, steps: int, index: int) -> Statistics:
        """Batch statistics of a window, pooled over all replicas."""
        bn, count = self.layers[index], self._calls[index].updates or 0
        before, after = (self.readings.averages(flat, index) for flat in (old, new))
        batches = window_statistic(before, after, bn.momentum, steps * count)
        return pool_replicas([bn.statistics(each) for each in batches])

    def _series(self, windows: Collection[_Window]) -> _Series:
        """Stacks windows; only the first replica."""
        return _Series(
            np.array([each.steps for each in windows], int),
            np.array([each.is_valid for each in windows], bool).reshape(
                -1, len(self.layers)
            ),
            np.concatenate(
                [self.readings.now[:0], *(each.batches[:1] for each in windows)]
            ),
        )

    def _batches(
        self, series: _Series, index: int, steps: int | None = None
    ) -> Statistics:
        """Batch statistics of a layer in its valid windows, or those of `steps`."""
        chosen = series.is_valid[:, index]
        if steps is not None:
            chosen = chosen & (series.steps == steps)
        averages = self.readings.averages(series.batches, index)
        if not chosen.all():  # All need no copy.
            averages = averages[chosen]
        return self.layers[index].statistics(averages.swapaxes(0, 1))

    def _part(self, flat: Flat, index: int) -> Statistics:
        return self.readings.statistics(flat, index)[0]

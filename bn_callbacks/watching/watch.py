"""Watches a training: decides when to read the averages, and makes the reports.

`BatchNormMonitor` uses it in `fit`; a loop without `fit` uses it directly. The way of
a number: `Readings` reads the moving averages, `Windows` computes the statistics of the
batches from them, `evidence_of` collects what is known of a layer, the losses of a
`Probe` say from which family a cause may come, `diagnose_model` names the cause, and
`WarningFilter` decides whether to warn of it.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.arguments import check_threshold, check_whole
from bn_callbacks.layers import (
    BatchNormLayer,
    Calls,
    CallWatch,
    Fingerprint,
    LayerSelection,
    calls_of,
    check_model,
    find,
    is_built,
    iterations,
    own_call,
    team_of,
)
from bn_callbacks.measuring.probe import Probe, ProbeResult
from bn_callbacks.report import BatchNormReport, layer_reports
from bn_callbacks.statistics.causes import CORRELATED_BATCHES, HEALTHY
from bn_callbacks.statistics.diagnosis import DESIGN_LIMIT
from bn_callbacks.statistics.evidence import DEFAULT_THRESHOLD, Evidence
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.scatter import Scatter, larger
from bn_callbacks.watching.batch_size import BatchSizeObserver
from bn_callbacks.watching.episode_recorder import EpisodeRecorder
from bn_callbacks.watching.notes import find_notes
from bn_callbacks.watching.readings import Flat
from bn_callbacks.watching.steps import StepCounter, announced
from bn_callbacks.watching.warning_filter import WarningFilter
from bn_callbacks.watching.windows import RUN, Windows

MIN_INTERVAL, MAX_INTERVAL = 10, 100
"""Bounds for the number of steps between two readings; a short `fit` goes below."""

WINDOWS_PER_FIT, WINDOWS_PER_EPOCH = 10, 5
"""Windows that a `fit` and an epoch should give, if they are long enough."""

PROOFS = 2
"""Epochs that must show grouped batches before the monitor relies on it."""

MAX_TOLD = 3
"""Largest number of past episodes in the last warning."""


class _LastReading(NamedTuple):
    """What was read right after the last training step of an epoch."""

    reading: tuple[int | None, Flat]
    versions: NDArray[np.int_]
    weights: list[NDArray[np.float64]]


class BatchNormWatch:
    """Watches the BN layers of a model in a training loop without `fit`.

    In `fit`, `BatchNormMonitor` does the same by itself.

    Args:
        model: The model in training. It must be compiled if there is a `probe`. Its
            optimizer, if it has one, helps to count steps.
        steps: Training steps of an epoch; `None`, the default, if unknown.
        epochs: Epochs of the training; 1 by default, `None` if unknown.
        probe: As `BatchNormMonitor` takes it; none by default.
        layers: Which layers, as `recalibrate` takes them; all by default.
        threshold: Lag, in standard deviations, above which there is a message; 0.2 by
            default.

    Attributes:
        report: The latest `BatchNormReport`; None before the first.

    Raises:
        TypeError: `model` is not a Keras 3 model.
        ValueError: An argument is none of those above.

    Examples:
        >>> import keras, numpy as np
        >>> model = keras.Sequential(
        ...     [
        ...         keras.Input((4,)),
        ...         keras.layers.BatchNormalization(),
        ...         keras.layers.Dense(1),
        ...     ]
        ... )
        >>> model.compile("sgd", "mse")
        >>> x, y = np.random.default_rng(0).normal(5, 1, (320, 4)), np.ones((320, 1))
        >>> watch = BatchNormWatch(model, steps=10, epochs=1)
        >>> watch.begin_epoch()
        >>> for step in range(10):
        ...     watch.begin_step()
        ...     part = slice(32 * step, 32 * step + 32)
        ...     loss = model.train_on_batch(x[part], y[part])
        >>> watch.end_epoch().worst.cause
        'warming_up'
        >>> watch.messages()[0].startswith("1 of 1 BatchNormalization layers lag")
        True
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        steps: int | None = None,
        epochs: int | None = 1,
        probe: Any = None,
        layers: LayerSelection = None,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> None:
        check_model(model)
        check_whole("steps", steps)
        check_whole("epochs", epochs)
        check_threshold(threshold)
        params: dict[str, Any] = {"epochs": epochs}
        if steps is not None:
            params["steps"] = steps
        self._set_up(model, params, probe, layers, threshold)

    @classmethod
    def of_fit(
        cls,
        model: keras.Model,
        params: Mapping[str, Any] | None,
        *,
        probe: Any,
        layers: LayerSelection,
        threshold: float,
    ) -> "BatchNormWatch":
        """Makes a watch for a callback, with the `params` that it got from `fit`."""
        watch = cls.__new__(cls)
        watch._set_up(model, params, probe, layers, threshold)
        return watch

    def _set_up(
        self,
        model: keras.Model,
        params: Mapping[str, Any] | None,
        probe: Any,
        layers: LayerSelection,
        threshold: float,
    ) -> None:
        self.model = model
        self.report: BatchNormReport | None = None
        self.evidence: list[Evidence] = []
        self.layers: list[BatchNormLayer] | None = None
        self.interval = MIN_INTERVAL
        self.every: int | None = None
        self._data, self._selection, self._threshold = probe, layers, threshold
        self._epochs = announced(params, "epochs")
        self._announced = announced(params, "steps")
        self._counter = StepCounter(model, params)
        self._first_epoch: int | None = None
        self._warnings = WarningFilter(threshold)
        self._episodes: EpisodeRecorder | None = None
        self._epoch = 0
        self._steps_done = self._epochs_done = 0
        self._probe_result: ProbeResult | None = None
        self._is_fresh = False
        self._notes: tuple[str, ...] | None = None
        self._is_recalibrated = False
        self._proofs: Counter[str] = Counter()
        self._windows: Windows | None = None
        self._begin_readings()
        if is_built(model):
            self._start()

    def _begin_readings(self) -> None:
        self._counter.begin_epoch()
        self._read_at: int | None = None
        self._last: _LastReading | None = None
        self._due_at = self._singles_from = self._shown_at = 0

    def _start(self) -> None:
        """Finds the layers; the model must be built."""
        self.layers = find(self.model, self._selection)
        if not self.layers:
            self.report = BatchNormReport()
            return
        self._probe: Probe | None = None
        if self._data is not None:
            unfrozen = [bn for bn in self.layers if bn.trainable]
            self._probe = Probe(self.model, self._data, unfrozen)
        self.interval = reading_interval(
            [bn.momentum for bn in self.layers], self.total_steps, self._announced
        )
        self._windows = Windows(self.model, self.layers, self.interval)
        self._calls = CallWatch(self.model, self.layers)
        self._knows_calls = False
        self._batch_size = BatchSizeObserver(self.model)
        self._fingerprint = Fingerprint(self.model)
        self._weights: list[NDArray[np.float64]] | None = None

    def begin_epoch(self, epoch: int | None = None) -> None:
        """Call it as an epoch begins.

        Args:
            epoch: Its number, if training resumes at a later one; by default, `None`,
                epochs are counted from 0.
        """
        if self._first_epoch is None:
            self._first_epoch = epoch or 0
        self._epoch = self._epoch + 1 if epoch is None else epoch + 1
        self._find_episodes()
        self._begin_readings()

    def begin_step(self, batch: int | None = None) -> None:
        """Call it before each training step.

        Args:
            batch: Its number in the epoch; by default, one more than the last.
        """
        self.advance(batch)

    def advance(self, batch: int | None = None) -> bool:
        """As `begin_step`; returns whether a chart is due, as every `every` steps."""
        done = self._counter.begin_batch(batch)
        self._is_fresh = False
        if self.layers is None and is_built(self.model):
            # The first step has built the model: watches it from the second on.
            self._start()
        if self._windows is None:
            return False
        if self._read_at is None:
            self._counter.observe(*self._windows.reread())
            self._batch_size.begin()
            self._read_at = self._shown_at = done
            self._due_at = done + self.interval
            self._singles_from = done + self._lead()
            if not self._knows_calls:
                self._calls.begin()
            return False
        if self._calls.is_watching:
            self._learn_calls(done - self._read_at)
        self._batch_size.observe(done)
        # All workers must read at the same steps, though only one writes charts.
        is_shown = self.every is not None and done - self._shown_at >= self.every
        if is_shown or done >= self._due_at or self._is_single(done):
            reading = self._windows.readings()
            self._counter.observe(*reading)
            self._windows.close(reading[1], done - self._read_at)
            self._read_at = done
            if is_shown or done >= self._due_at:
                self._due_at = done + self.interval
        elif self._counter.needs_reading:
            self._counter.observe(*self._windows.readings())
        if is_shown:
            self._shown_at = done
        return is_shown

    def _lead(self) -> int:
        """Steps before the single ones: in each epoch they begin one window later."""
        if self._announced is None:
            return self.interval
        windows = max(0, self._announced - RUN) // self.interval
        return self.interval * ((self._epochs_done + 1) % (windows + 1))

    def _is_single(self, done: int) -> bool:
        """Whether to read after this single step: a few steps in early epochs."""
        epoch = self._epochs_done
        is_early = epoch < 4 or epoch & (epoch - 1) == 0
        return is_early and self._singles_from <= done <= self._singles_from + RUN

    def _learn_calls(self, steps: int) -> None:
        assert self._windows is not None
        assert self.layers is not None
        self._calls.end(steps)
        self._knows_calls = True
        self._windows.set_calls(self.calls)

    @property
    def calls(self) -> list[Calls]:
        """How a training step calls each layer, as far as that was seen."""
        return calls_of(self.model, self.layers or [])

    def end_step(self, batch: int) -> None:
        """Reads after an epoch's last training step.

        This tells training from what other callbacks write at the epoch's end. Another
        thread may call it while nothing trains.

        Args:
            batch: Number of the step in the epoch.
        """
        if self._windows is None or team_of(self.model).workers > 1:
            return
        if self._counter.is_last(batch):
            self._last = self._read_last(self._windows)

    def _read_last(self, windows: Windows) -> _LastReading:
        return _LastReading(
            windows.readings(), windows.readings.versions(), self._fingerprint()
        )

    def end_steps(self) -> None:
        """Ends the steps of an epoch, before others validate or write."""
        if self._windows is None or self._read_at is None:
            return
        last, self._last = self._last or self._read_last(self._windows), None
        reading = last.reading
        steps = self._counter.finish(*reading)
        if self._calls.is_watching:
            self._learn_calls(steps or 0)
        self._windows.close(
            reading[1],
            None if steps is None else steps - self._read_at,
            last.versions,
        )
        self._windows.end_epoch()
        self._batch_size.finish(steps)
        self._weights = last.weights
        self._steps_done += self._read_at if steps is None else steps
        self._epochs_done += 1
        self._begin_readings()

    def end_epoch(self) -> BatchNormReport:
        """Call it after each epoch.

        Returns:
            The report; with a probe, its losses are new.
        """
        if self._windows is None:
            return self.report or BatchNormReport()
        self.end_steps()
        self._look_outside()
        if self._probe is not None:
            self._measure()
        self.report = report = self.make_report(
            self._are_weights_replaced(), ends_epoch=True
        )
        for layer in report.layers:
            effect = layer.design_effect or 0.0
            if layer.cause == CORRELATED_BATCHES and effect > DESIGN_LIMIT:
                self._proofs[layer.path] += PROOFS if effect > 2 * DESIGN_LIMIT else 1
        return report

    def end(self) -> BatchNormReport | None:
        """Call it after training.

        Returns:
            The last report. It is a new one if the weights have been replaced since,
            for instance by the optimizer's averages. None if the statistics have been
            written since, so that the report no longer describes them.
        """
        if self._windows is None or self.report is None:
            return None
        if not self._windows.readings.is_current():
            self._look_outside()
            if not self._windows.is_touched:
                return None
            if self._probe is not None:
                self._measure()
            self.report = self.make_report(ends_epoch=True)
        elif self._are_weights_replaced():
            if self._probe is not None:
                self._measure()
            self.report = self.make_report(True, ends_epoch=True)
        return self.report

    def close(self) -> None:
        """Stops watching the model's calls, if training broke off."""
        if self._windows is not None and self._calls.is_watching:
            self._calls.end(0)

    @property
    def is_written(self) -> bool:
        """Whether anything has written averages since the last training step."""
        return self._windows is not None and bool(self._windows.is_written.any())

    def _look_outside(self) -> None:
        """Checks whether anything but training has changed the averages."""
        if self._windows is not None and self._weights is not None:
            self._windows.look_outside(self._fingerprint.is_same(self._weights))

    def _are_weights_replaced(self) -> bool:
        return self._weights is not None and self._fingerprint.is_replaced(
            self._weights
        )

    def messages(
        self,
        *,
        is_last: bool | None = None,
        is_corrected: bool = False,
        cured: Collection[str] = (),
    ) -> list[str]:
        """Returns the warnings that are due; each comes once.

        Args:
            is_last: Whether training has ended; by default, if all epochs have ended.
            is_corrected: Whether something else corrects the statistics at the end;
                `False` by default.
            cured: Causes that something else cures at the end; none by default.
        """
        if self.report is None:
            return []
        left = 0 if is_last else self.steps_left
        report = dataclasses.replace(
            self.report,
            layers=tuple(
                dataclasses.replace(layer, cause=HEALTHY)
                if layer.cause in cured
                else layer
                for layer in self.report.layers
            ),
        )
        messages = self._warnings.messages(report, left, is_corrected)
        before = [str(episode) for episode in report.episodes if episode.is_over]
        if messages and before and left == 0:
            messages[-1] += f" Before that: {'; '.join(before[-MAX_TOLD:])}."
        return messages

    def expect(self, *, is_recalibrated: bool) -> None:
        """Notes what others will do at the end; the report's notes depend on it."""
        self._is_recalibrated = is_recalibrated

    def _measure(self) -> None:
        assert self._windows is not None
        assert self._probe is not None
        updating = self._windows.updating()
        if updating != self._probe.layers:
            # A layer that was frozen after `compile` still trains, and so counts.
            self._probe = Probe(self.model, self._data, updating)
        if any(not own_call(bn.layer).takes_statistics for bn in updating):
            # The notes say so.
            self._probe_result = None
            return
        self._probe_result = self._probe.measure(self._batch_size.batch_size)
        self._is_fresh = True

    @property
    def total_steps(self) -> int | None:
        """Training steps in all, None if unknown."""
        steps = self._announced
        if steps is None and self._epochs_done:
            steps = self._steps_done // self._epochs_done
        if steps is None or self._epochs is None:
            return None
        return steps * (self._epochs - (self._first_epoch or 0))

    @property
    def steps_left(self) -> int | None:
        """Training steps still to come, None if unknown."""
        total = self.total_steps
        return None if total is None else max(0, total - self._steps_done)

    def _find_episodes(self) -> EpisodeRecorder:
        if self._episodes is None:
            epoch = self._first_epoch or 0
            self._episodes = EpisodeRecorder.of(self.model, epoch, self._step)
        return self._episodes

    @property
    def _step(self) -> int:
        """The optimizer's step, or the step of this training without an optimizer."""
        own = self._steps_done + (self._read_at or 0)
        return iterations(self.model) or own

    def make_report(
        self, are_weights_replaced: bool = False, ends_epoch: bool = False
    ) -> BatchNormReport:
        """Reports on the latest readings, with the losses of the last epoch's end."""
        assert self._windows is not None
        assert self.layers is not None
        if self._notes is None:
            # Not earlier: now all callbacks have said what they do.
            self._notes = find_notes(
                self.model,
                self.layers,
                total_steps=self.total_steps,
                is_recalibrated=self._is_recalibrated,
                calls=self.calls,
            )
        losses = None if self._probe_result is None else self._probe_result.losses
        inferred: dict[BatchNormLayer, Statistics] = {}
        in_probe: dict[BatchNormLayer, Scatter | None] = {}
        effects: dict[BatchNormLayer, float | None] = {}
        if self._probe_result is not None and self._is_fresh:
            inferred, in_probe = self._probe_result.inferred, self._probe_result.scatter
            effects = {bn: self._probe_result.design_effect(bn) for bn in in_probe}
        self.evidence = [
            dataclasses.replace(
                seen,
                batch_size=self._batch_size.batch_size_of(bn),
                last_batch_size=self._batch_size.last_batch_size,
                # Whoever has written statistics and weights knows that they match.
                are_weights_replaced=are_weights_replaced and not is_written,
                inferred=inferred.get(bn),
                scatter=larger(seen.scatter, in_probe.get(bn)),
                is_grouped=self._proofs[bn.path] >= PROOFS,
                probe_effect=effects.get(bn),
                family=seen.family if losses is None else losses.family,
            )
            for bn, seen, is_written in zip(
                self.layers,
                self._windows.evidence(self.total_steps, self._threshold),
                self._windows.is_written,
                strict=True,
            )
        ]
        report = BatchNormReport.of(
            layer_reports(self.evidence), losses, clues=self._notes
        )
        return self._find_episodes().add(report, self._step, self._epoch, ends_epoch)


def reading_interval(
    momenta: Sequence[float], total_steps: int | None, epoch_steps: int | None = None
) -> int:
    """Returns the number of training steps between two readings.

    It is half the memory `1/(1 − m)` of the average, so that a window is only a part of
    what the average holds; but large enough that reading costs little, and small enough
    that a short `fit` gives windows to compare.

    Args:
        momenta: Momentum of each layer.
        total_steps: Training steps of the whole `fit`, None if unknown.
        epoch_steps: Training steps of an epoch, None if unknown.

    Returns:
        A number of steps, from 1 to 100.
    """
    memory = 0.5 / max(1 - max(momenta), 0.5 / MAX_INTERVAL)
    interval = max(MIN_INTERVAL, min(MAX_INTERVAL, round(memory)))
    if epoch_steps is not None:
        interval = max(MIN_INTERVAL, min(interval, epoch_steps // WINDOWS_PER_EPOCH))
    if total_steps is not None:
        interval = min(interval, max(1, total_steps // WINDOWS_PER_FIT))
    return interval

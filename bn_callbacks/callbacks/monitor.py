"""`BatchNormMonitor`: watches BN layers in `fit`."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from bn_callbacks.findings import Findings
from bn_callbacks.layers import (
    LayerSelection,
    check_model,
    find,
    is_built,
    is_corrected,
    iterations,
    steps_per_execution,
)
from bn_callbacks.recalibration import Probe
from bn_callbacks.report import BatchNormLagWarning, BatchNormReport, layer_report
from bn_callbacks.statistics.diagnosis import DEFAULT_THRESHOLD
from bn_callbacks.steps import StepCounter, announced_epochs, announced_steps
from bn_callbacks.tensorboard import ReportWriter
from bn_callbacks.windows import Windows

MAX_INTERVAL = 100
MIN_INTERVAL = 10
WINDOWS_PER_FIT = 10


class BatchNormMonitor(keras.callbacks.Callback):
    """Watches the moving statistics of BN layers and warns when they lag.

    Recovers the statistics of the batches from the moving averages themselves: two
    readings `N` updates apart determine the (weighted) mean of the `N` batches between
    them, `W = (new − m^N·old) / (1 − m^N)`. There is no hook in the model, no extra
    forward pass, no data; training is bit for bit what it is without the monitor.

    At each epoch's end the largest lag is put into the logs as `bn_lag`, so that
    `History`, the progress line, `CSVLogger` and `EarlyStopping` see it; with a
    `probe`, the loss gap as `bn_loss_gap`. List the monitor before callbacks that
    use these logs, and before those that write statistics.

    Args:
        log_dir: Directory for TensorBoard scalars; nothing is written without it.
            They go to a subdirectory of their own, so that it may be the `log_dir`
            of `keras.callbacks.TensorBoard`.
        update_freq: How often to write scalars besides each epoch's end: `"auto"`,
            `"batch"`, or a number of batches. The averages are read at least as often
            as their momentum makes sensible.
        threshold: Lag, in standard deviations, above which something is said.
        on_lag: `"warn"`, `"raise"` (a `BatchNormLagWarning`), or `"ignore"`.
        probe: A small sample of training data `(x, y)`. At each epoch's end the
            model's loss on it is measured in inference mode and with batch
            statistics; the gap decides whether anything is wrong at all.
        layers: Which layers, as `recalibrate` takes them; all by default.
        verbose: 1 prints the report at each epoch's end.

    Attributes:
        report: The latest `BatchNormReport`; None before the first.

    Raises:
        ValueError: An argument is none of those above.
        BatchNormLagWarning: In `fit`, with `on_lag="raise"`.

    Example:
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
    >>> monitor = BatchNormMonitor(on_lag="ignore")
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
    >>> monitor.report.worst.cause
    'warming_up'
    >>> "bn_lag" in history.history
    True
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        update_freq: int | str = "auto",
        threshold: float = DEFAULT_THRESHOLD,
        on_lag: str = "warn",
        probe: Any = None,
        layers: LayerSelection = None,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        is_number = isinstance(update_freq, int) and update_freq >= 1
        if update_freq not in ("auto", "batch") and not is_number:
            raise ValueError(
                "`update_freq` must be 'auto', 'batch' or a positive number of "
                f"batches. Received: update_freq={update_freq!r}."
            )
        if on_lag not in ("warn", "raise", "ignore"):
            raise ValueError(
                "`on_lag` must be 'warn', 'raise' or 'ignore'. Received: "
                f"on_lag={on_lag!r}."
            )
        if not threshold > 0:
            raise ValueError(
                "`threshold` must be a positive number of standard deviations. "
                f"Received: threshold={threshold!r}."
            )
        if probe is not None and not (
            isinstance(probe, tuple) and len(probe) in (2, 3)
        ):
            raise ValueError(
                "`probe` must be a tuple (x, y), or (x, y, sample_weight). Received: "
                f"probe of type {type(probe).__name__}."
            )
        self.log_dir = log_dir
        self.update_freq = update_freq
        self.threshold = threshold
        self.on_lag = on_lag
        self.probe = probe
        self.layers = layers
        self.verbose = verbose
        self.report: BatchNormReport | None = None
        self._is_fitting = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        check_model(self.model)
        self.report = None
        self._is_fitting = True
        self._windows: Windows | None = None
        self._probe: Probe | None = None
        self._findings: Findings | None = None
        self._counter = StepCounter()
        self._steps_done = 0
        self._epochs_done = 0
        self._read_at = self._written_at = 0
        self._writer = ReportWriter(self.log_dir) if self.log_dir else None
        if is_built(self.model):
            self._start()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._counter.begin_epoch()

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._windows is None:
            # A model of a hand-written loop may be built by its first step only.
            if self._findings is None and is_built(self.model):
                self._start()
            return
        if not self._counter.has_begun:
            self._counter.set_origin(self._windows.rebase())
            self._read_at = self._written_at = batch
        elif batch - self._read_at >= self._interval:
            _, now = self._windows.read()
            self._windows.close(now, batch - self._read_at)
            self._read_at = batch
            if self._writer is not None and batch - self._written_at >= self._frequency:
                self._written_at = batch
                self._writer.write(self._make_report(), iterations(self.model))
        self._counter.begin_batch(batch)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._is_fitting:
            self._end_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._windows is None:
            if logs is not None and self._findings is not None:
                logs["bn_lag"] = 0.0
            return
        self._end_epoch()
        losses = self._probe.measure() if self._probe else (None, None)
        self.report = report = self._make_report(losses)
        if logs is not None:
            logs["bn_lag"] = report.max_lag
            if report.loss_gap is not None:
                logs["bn_loss_gap"] = report.loss_gap
        if self._writer is not None:
            self._writer.write(report, iterations(self.model))
        if self.verbose:
            print(f"\nEpoch {epoch + 1}: BatchNormalization\n{report}")
        self._tell(report, self._steps_left())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._is_fitting = False
        if self._writer is not None:
            self._writer.close()
        if self.report is not None:
            self._tell(self.report, 0)

    def _start(self) -> None:
        layers = find(self.model, self.layers)
        self._findings = Findings(self.threshold)
        if not layers:
            self.report = BatchNormReport()
            print(
                f"BatchNormMonitor: model {self.model.name!r} has no "
                "BatchNormalization layer; there is nothing to watch."
            )
            return
        if self.probe is not None:
            self._probe = Probe(self.model, self.probe)
        self._windows = Windows(self.model, layers)
        self._interval = reading_interval(
            [bn.momentum for bn in layers], self._total_steps()
        )
        self._frequency = self._interval
        if self.update_freq != "auto":
            self._frequency = (
                1 if self.update_freq == "batch" else int(self.update_freq)
            )
            self._interval = min(self._interval, self._frequency)

    def _end_epoch(self) -> None:
        """Closes the last window of an epoch, before anybody writes statistics."""
        if self._windows is None or not self._counter.has_begun:
            return
        iterations_now, now = self._windows.read()
        steps = self._counter.finish(
            iterations_now,
            announced_steps(self.params),
            steps_per_execution(self.model),
        )
        self._windows.close(now, None if steps is None else steps - self._read_at)
        self._steps_done += self._read_at if steps is None else steps
        self._epochs_done += 1
        self._counter.begin_epoch()

    def _total_steps(self) -> int | None:
        steps, epochs = announced_steps(self.params), announced_epochs(self.params)
        if steps is None and self._epochs_done:
            steps = self._steps_done // self._epochs_done
        return steps * epochs if steps and epochs else None

    def _steps_left(self) -> int | None:
        total = self._total_steps()
        return None if total is None else max(0, total - self._steps_done)

    def _make_report(
        self, losses: tuple[float | None, float | None] = (None, None)
    ) -> BatchNormReport:
        assert self._windows is not None
        report = BatchNormReport((), *losses)
        layers = [
            layer_report(
                dataclasses.replace(
                    self._windows.evidence(index, self._total_steps(), self.threshold),
                    loss_gap=report.loss_gap,
                )
            )
            for index in range(len(self._windows.layers))
        ]
        return dataclasses.replace(report, layers=tuple(layers))

    def _tell(self, report: BatchNormReport, steps_left: int | None) -> None:
        if self._findings is None or self.on_lag == "ignore":
            return
        messages = self._findings.messages(report, steps_left, is_corrected(self.model))
        for message in messages:
            if self.on_lag == "raise":
                raise BatchNormLagWarning(message)
            warnings.warn(message, BatchNormLagWarning, stacklevel=2)


def reading_interval(momenta: Sequence[float], total_steps: int | None) -> int:
    """Training steps between two readings.

    Half the memory `1/(1 − m)` of the average, so that it and the window are not the
    same thing; not so often that reading costs; and often enough that a short `fit`
    gives windows to compare.

    Args:
        momenta: Momentum of each layer.
        total_steps: Training steps of the whole `fit`, None if unknown.

    Returns:
        A number of steps, from 1 to 100.
    """
    memory = 0.5 / max(1 - max(momenta), 0.5 / MAX_INTERVAL)
    interval = max(MIN_INTERVAL, min(MAX_INTERVAL, round(memory)))
    if total_steps is not None:
        interval = min(interval, max(1, total_steps // WINDOWS_PER_FIT))
    return interval

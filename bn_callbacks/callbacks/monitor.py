"""`BatchNormMonitor`: watches BN layers in `fit`."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bn_callbacks.arguments import (
    check_verbose,
    is_positive,
    is_whole,
    is_word,
    shown,
)
from bn_callbacks.budget import Budget
from bn_callbacks.callbacks.base import (
    BatchNormCallback,
    say_nothing_to_do,
    warn_of_unknown,
)
from bn_callbacks.callbacks.company import company
from bn_callbacks.clues import find_clues
from bn_callbacks.examples import ExampleCounter
from bn_callbacks.findings import Findings
from bn_callbacks.layers import (
    Fingerprint,
    LayerSelection,
    find,
    is_built,
    iterations,
    team_of,
)
from bn_callbacks.measuring.probe import Probe
from bn_callbacks.report import BatchNormLagWarning, BatchNormReport, layer_reports
from bn_callbacks.statistics.causes import HEALTHY, WARMING_UP
from bn_callbacks.statistics.evidence import DEFAULT_THRESHOLD
from bn_callbacks.steps import StepCounter, announced_epochs, announced_steps
from bn_callbacks.tensorboard import MAX_CHARTS
from bn_callbacks.windows import Windows

if TYPE_CHECKING:
    from bn_callbacks.tensorboard import ReportWriter

MAX_INTERVAL = 100
MIN_INTERVAL = 10
WINDOWS_PER_FIT = 10
WINDOWS_PER_EPOCH = 5

WRITING_SHARE = 0.003
"""Share of the time that writing between the epochs' ends takes with `"auto"`."""

WRITING_COST = 2e-3
"""Seconds that writing takes for each layer: a guess, until it has been timed."""


class BatchNormMonitor(BatchNormCallback):
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
        log_dir: Directory for TensorBoard's files; nothing is written without it.
            They go to a subdirectory of their own, so that it may be the `log_dir`
            of `keras.callbacks.TensorBoard`. The heat map of lags needs Pillow,
            which newer versions of TensorBoard bring along.
        update_freq: How often to write charts besides each epoch's end: `"auto"`, as
            often as takes a few thousandths of the time; `"batch"`, or a number
            of batches, whatever it costs. The averages are read at least as often
            as their momentum makes sensible.
        threshold: Lag, in standard deviations, above which something is said.
        on_lag: `"warn"`, `"raise"` (a `BatchNormLagWarning`), or `"ignore"`.
        probe: A small sample of training data `(x, y)`, in the order of training:
            of data in groups a few whole groups. At each epoch's end the model's
            loss on it is measured in inference mode and with batch statistics; the
            gap decides whether anything is wrong at all.
        layers: Which layers, as `recalibrate` takes them; all by default.
        verbose: 1 prints the report at each epoch's end.
        max_charts: Layers that get charts of their own in TensorBoard, at most: those
            that lag most. The others are in the summary and in the heat map.

    Attributes:
        report: The latest `BatchNormReport`; None before the first.

    Raises:
        ValueError: An argument is none of those above.
        BatchNormLagWarning: In `fit`, with `on_lag="raise"`.

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
        >>> monitor = BatchNormMonitor(on_lag="ignore")
        >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
        >>> monitor.report.worst.cause
        'warming_up'
        >>> "bn_lag" in history.history
        True
    """

    _DATA = ("probe",)

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        update_freq: int | str = "auto",
        threshold: float = DEFAULT_THRESHOLD,
        on_lag: str = "warn",
        probe: Any = None,
        layers: LayerSelection = None,
        verbose: int = 0,
        max_charts: int = MAX_CHARTS,
    ) -> None:
        super().__init__()
        if not (log_dir is None or isinstance(log_dir, (str, os.PathLike))):
            raise ValueError(
                "`log_dir` must be the path of a directory or None. Received: "
                f"log_dir={shown(log_dir)}."
            )
        if not (is_word(update_freq, "auto", "batch") or is_whole(update_freq, 1)):
            raise ValueError(
                "`update_freq` must be 'auto', 'batch' or a positive number of "
                f"batches. Received: update_freq={shown(update_freq)}."
            )
        if not is_word(on_lag, "warn", "raise", "ignore"):
            raise ValueError(
                "`on_lag` must be 'warn', 'raise' or 'ignore'. Received: "
                f"on_lag={shown(on_lag)}."
            )
        if not is_positive(threshold):
            raise ValueError(
                "`threshold` must be a positive number of standard deviations. "
                f"Received: threshold={shown(threshold)}."
            )
        if probe is not None and not (
            isinstance(probe, tuple) and len(probe) in (2, 3)
        ):
            raise ValueError(
                "`probe` must be a tuple (x, y), or (x, y, sample_weight). Received: "
                f"probe of type {type(probe).__name__}."
            )
        check_verbose(verbose)
        if not is_whole(max_charts, 0):
            raise ValueError(
                "`max_charts` must be a number of layers, 0 or more. Received: "
                f"max_charts={shown(max_charts)}."
            )
        self.log_dir = log_dir
        self.update_freq = update_freq
        self.threshold = threshold
        self.on_lag = on_lag
        self.probe = probe
        self.layers = layers
        self.verbose = verbose
        self.max_charts = max_charts
        self.report: BatchNormReport | None = None
        self._writer: ReportWriter | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        # That of a `fit` which an exception has ended.
        self._close()
        self._writer = None
        self.report = None
        self._windows: Windows | None = None
        self._probe: Probe | None = None
        self._gap: float | None = None
        self._has_warned = False
        self._findings: Findings | None = None
        self._counter = StepCounter(self.model, self.params)
        self._first_epoch: int | None = None
        self._steps_done = 0
        self._epochs_done = 0
        self._read_at: int | None = None
        self._written_at = 0
        self._is_chief = team_of(self.model).is_chief
        if self.log_dir:
            with team_of(self.model).agreed():
                if self._is_chief:
                    self._writer = self._make_writer(self.log_dir)
        if is_built(self.model):
            self._start()

    def _make_writer(self, log_dir: str | os.PathLike[str]) -> "ReportWriter":
        # Loads dozens of modules, which who writes nothing does not need.
        from bn_callbacks.tensorboard import ReportWriter

        writer = ReportWriter(
            log_dir, int(self.max_charts), self.threshold, iterations(self.model)
        )
        writer.check_directory()
        return writer

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._first_epoch is None:
            self._first_epoch = epoch
        if self._writer is not None:
            company(self.model).writer = self._writer
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._counter.begin_epoch()
        self._read_at = None

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        done = self._counter.begin_batch(batch)
        if self._findings is None and is_built(self.model):
            # A model that its first step builds is watched from the second on.
            self._start()
        if self._windows is None:
            return
        if self._read_at is None:
            self._counter.observe(*self._windows.rebase())
            self._read_at = self._written_at = done
            return
        # Workers must read at the same steps, whether they write or not.
        is_due = self.log_dir is not None and (
            done - self._written_at >= self._frequency
        )
        if is_due or done - self._read_at >= self._interval:
            reading = self._windows.read()
            self._counter.observe(*reading)
            self._windows.close(reading[1], done - self._read_at)
            self._examples.observe(done)
            self._read_at = done
        elif self._counter.needs_reading:
            self._counter.observe(*self._windows.read())
        if is_due:
            self._written_at = done
            if self._writer is not None and self._may_write():
                with self._budget.spend():
                    report = self._make_report()
                    self._writer.write(report, iterations(self.model), self._evidence)

    def _may_write(self) -> bool:
        return self.update_freq != "auto" or self._budget.allows()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._is_fitting:
            self._end_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._windows is None:
            if logs is not None and self._findings is not None:
                logs["bn_lag"] = 0.0
            return
        self._end_epoch()
        self.report = report = self._make_report(self._losses())
        # Holds until the probe is measured again.
        self._gap = report.loss_gap
        if logs is not None:
            logs["bn_lag"] = report.max_lag
            if report.loss_gap is not None:
                logs["bn_loss_gap"] = report.loss_gap
        if self._writer is not None:
            with self._budget.spend():
                self._writer.write(
                    report, iterations(self.model), self._evidence, ends_epoch=True
                )
        if self.verbose and self._is_chief:
            print(f"\nEpoch {epoch + 1}: BatchNormalization\n{report}")
        if report.unknown and self._is_chief and not self._has_warned:
            self._has_warned = True
            warn_of_unknown(report, self.params)
        self._tell(report, self._steps_left())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        if self._windows is None or self.report is None:
            self._close()
            return
        # If restored or corrected, the report is about something that is gone.
        is_valid = self._windows.is_untouched()
        if is_valid and self._weights not in (None, self._fingerprint()):
            # By the optimizer's averages, for one.
            self.report = self._make_report(self._losses(), are_weights_replaced=True)
        if self._writer is not None:
            self._writer.conclude(self.report, iterations(self.model))
        self._close()
        if is_valid:
            self._tell(self.report, 0)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _start(self) -> None:
        layers = find(self.model, self.layers)
        self._findings = Findings(self.threshold)
        if not layers:
            self.report = BatchNormReport()
            say_nothing_to_do(self, "watch")
            return
        if self.probe is not None:
            unfrozen = [bn for bn in layers if bn.trainable]
            self._probe = Probe(self.model, self.probe, unfrozen)
        self._interval = reading_interval(
            [bn.momentum for bn in layers],
            self._total_steps(),
            announced_steps(self.params),
        )
        self._frequency = (
            {"auto": self._interval, "batch": 1}[self.update_freq]
            if isinstance(self.update_freq, str)
            else int(self.update_freq)
        )
        self._budget = Budget(WRITING_SHARE, WRITING_COST * len(layers))
        self._windows = Windows(self.model, layers, self._interval)
        self._layers = layers
        self._clues: tuple[str, ...] | None = None
        self._examples = ExampleCounter(self.model)
        self._fingerprint = Fingerprint(self.model)
        self._weights: bytes | None = None

    def _end_epoch(self) -> None:
        """Closes the last window of an epoch, before anybody writes statistics."""
        if self._windows is None or self._read_at is None:
            return
        reading = self._windows.read()
        steps = self._counter.finish(*reading)
        self._windows.close(
            reading[1], None if steps is None else steps - self._read_at
        )
        self._windows.end_epoch()
        self._examples.finish(steps)
        self._weights = self._fingerprint()
        self._steps_done += self._read_at if steps is None else steps
        self._epochs_done += 1
        self._begin_epoch()

    def _losses(self) -> tuple[float | None, float | None]:
        if self._probe is None:
            return None, None
        assert self._windows is not None
        updating = self._windows.updating()
        if updating != self._probe.layers:
            # A layer that was frozen after `compile` trains on, and counts.
            self._probe = Probe(self.model, self.probe, updating)
        return self._probe.measure(self._examples.batch_size)

    def _total_steps(self) -> int | None:
        steps, epochs = announced_steps(self.params), announced_epochs(self.params)
        if steps is None and self._epochs_done:
            steps = self._steps_done // self._epochs_done
        if steps is None or epochs is None:
            return None
        return steps * (epochs - (self._first_epoch or 0))

    def _steps_left(self) -> int | None:
        total = self._total_steps()
        return None if total is None else max(0, total - self._steps_done)

    def _make_report(
        self,
        losses: tuple[float | None, float | None] | None = None,
        are_weights_replaced: bool = False,
    ) -> BatchNormReport:
        assert self._windows is not None
        if self._clues is None:
            # Not before all callbacks have said what they do.
            self._clues = find_clues(
                self.model,
                self._layers,
                total_steps=self._total_steps(),
                is_recalibrated=company(self.model).recalibrates,
            )
        report = BatchNormReport((), *(losses or (None, None)), clues=self._clues)
        self._evidence = [
            dataclasses.replace(
                seen,
                batch_size=self._examples.batch_size_of(bn),
                last_batch_size=self._examples.last_batch_size,
                are_weights_replaced=are_weights_replaced,
                loss_gap=report.loss_gap if losses else self._gap,
            )
            for bn, seen in zip(
                self._layers,
                self._windows.evidence(self._total_steps(), self.threshold),
                strict=True,
            )
        ]
        return dataclasses.replace(report, layers=layer_reports(self._evidence))

    def _tell(self, report: BatchNormReport, steps_left: int | None) -> None:
        if self._findings is None or self.on_lag == "ignore":
            return
        others = company(self.model)
        if others.debiases:
            report = _without(report, WARMING_UP)
        for message in self._findings.messages(report, steps_left, others.recalibrates):
            if self.on_lag == "raise":
                self._close()
                raise BatchNormLagWarning(message)
            if self._is_chief:
                warnings.warn(message, BatchNormLagWarning, stacklevel=2)


def _without(report: BatchNormReport, cause: str) -> BatchNormReport:
    """The report as it will be when something has been cured."""
    layers = [
        dataclasses.replace(layer, cause=HEALTHY) if layer.cause == cause else layer
        for layer in report.layers
    ]
    return dataclasses.replace(report, layers=tuple(layers))


def reading_interval(
    momenta: Sequence[float], total_steps: int | None, epoch_steps: int | None = None
) -> int:
    """Training steps between two readings.

    Half the memory `1/(1 − m)` of the average, so that it and the window are not the
    same thing; not so often that reading costs; and often enough that a short `fit`
    gives windows to compare.

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

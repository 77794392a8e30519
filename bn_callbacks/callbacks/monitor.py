"""`BatchNormMonitor`: watches BN layers in `fit`."""

import os
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import keras

from bn_callbacks.arguments import (
    check_threshold,
    check_verbose,
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
from bn_callbacks.callbacks.peers import peers_of
from bn_callbacks.layers import LayerSelection, iterations, team_of
from bn_callbacks.measuring.probe import is_probe
from bn_callbacks.report import BatchNormLagWarning, BatchNormReport
from bn_callbacks.statistics.causes import WARMING_UP
from bn_callbacks.statistics.evidence import DEFAULT_THRESHOLD
from bn_callbacks.tensorboard import MAX_CHARTS
from bn_callbacks.warn import warn
from bn_callbacks.watching.watch import BatchNormWatch

if TYPE_CHECKING:
    from bn_callbacks.tensorboard import ReportWriter

WRITING_SHARE = 0.003
"""Largest share of the time for writing within epochs, with `"auto"`."""

WRITING_COST = 2e-3
"""Seconds to write one layer: a guess until the first writing has been timed."""

_writers: "WeakKeyDictionary[keras.Model, dict[str, ReportWriter]]" = (
    WeakKeyDictionary()
)
"""Each model's writers, by directory: a `fit` that resumes uses them again."""


class BatchNormMonitor(BatchNormCallback):
    """Watches the moving statistics of BN layers and warns when they lag.

    The monitor recovers the statistics of the batches from the moving averages alone:
    two readings `N` updates apart determine the (weighted) mean of the `N` batches
    between them, `W = (new − m^N·old) / (1 − m^N)`. It needs no hook in the model, no
    extra forward pass and no data; training is bit for bit what it is without it.

    At each epoch's end the monitor puts the largest lag into the logs as `bn_lag`,
    where `History`, the progress line, `CSVLogger` and `EarlyStopping` find it. With a
    `probe` it adds the loss gap as `bn_loss_gap`, and the loss that recalibrating
    could reach as `bn_loss_recalibrated`. List the monitor before callbacks that use
    these logs, and before those that write statistics.

    Args:
        log_dir: Directory for TensorBoard's files; by default none are written. It may
            be the `log_dir` of `keras.callbacks.TensorBoard`, since the monitor writes
            into a subdirectory: `batch_norm`, or one with a number and the time if
            another training has written there. A training that resumes continues in
            its own. The heat map of lags needs Pillow, which newer versions of
            TensorBoard bring along.
        update_freq: How often to write charts within an epoch: `"auto"`, the default,
            as often as a few thousandths of the training time allow; or, whatever it
            costs, `"batch"` or a number of batches. The monitor reads the averages at
            least as often as their momentum requires.
        threshold: Lag, in standard deviations, above which the monitor warns; 0.2 by
            default.
        on_lag: `"warn"`, the default; `"raise"` (a `BatchNormLagWarning`), or
            `"ignore"`.
        probe: A sample of training data with targets, as `fit` takes them, in the order
            of training: `(x, y)` of some hundred examples (a few whole groups, if the
            data come in groups); or the dataset itself, of which the monitor keeps the
            first batches, about 512 examples; none by default. At each epoch's end the
            monitor measures the model's loss on it three times: in inference mode, with
            batch statistics, and with the statistics of the sample itself. The three
            decide whether anything is wrong at all, and whether recalibrating would
            cure it.
        layers: Which layers, as `recalibrate` takes them; all by default.
        verbose: 0, the default, is silent; 1, and `"auto"`, print the report of each
            epoch, below its progress bar.
        max_charts: How many layers get charts of their own in TensorBoard at most,
            those that lag most; 12 by default. The summary and the heat map show the
            others too.

    Attributes:
        report: The latest `BatchNormReport`; None before the first. Its `episodes` say
            what came and went; a `fit` that resumes with `initial_epoch` adds to them.

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

    # Keras need not wait for a step because of `on_train_batch_end`, which other
    # threads may run.
    async_safe = True

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        update_freq: int | Literal["auto", "batch"] = "auto",
        threshold: float = DEFAULT_THRESHOLD,
        on_lag: Literal["warn", "raise", "ignore"] = "warn",
        probe: Any = None,
        layers: LayerSelection = None,
        verbose: int | Literal["auto"] = 0,
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
        check_threshold(threshold)
        if probe is not None and not is_probe(probe):
            raise ValueError(
                "`probe` must be a tuple (x, y) or (x, y, sample_weight), or a dataset "
                f"of such batches. Received: probe of type {type(probe).__name__}."
            )
        check_verbose(verbose)
        if not is_whole(max_charts, 0):
            raise ValueError(
                "`max_charts` must be a number of layers, 0 or more. Received: "
                f"max_charts={shown(max_charts)}."
            )
        self.params: dict[str, Any] | None = None
        self.log_dir = log_dir
        self.update_freq = update_freq
        self.threshold = threshold
        self.on_lag = on_lag
        self.probe = probe
        self.layers = layers
        self.verbose = verbose
        self.max_charts = max_charts
        self.report: BatchNormReport | None = None
        self._watch: BatchNormWatch | None = None
        self._writer: ReportWriter | None = None
        self._budget: Budget | None = None
        self._is_chief = True
        self._has_warned = self._has_begun = False
        self._unsaid = ""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        if self._watch is not None:  # Of a `fit` that broke off.
            self._watch.close()
        self._close()
        self.report = self._writer = self._budget = None
        self._has_warned = self._has_begun = False
        self._unsaid = ""
        team = team_of(self.model)
        self._is_chief = team.is_chief
        if self.log_dir:
            with team.agreed():
                if self._is_chief:
                    self._writer = self._make_writer(self.log_dir)
        self._watch = BatchNormWatch.of_fit(
            self.model,
            self.params,
            probe=self.probe,
            layers=self.layers,
            threshold=self.threshold,
        )
        self._notice_layers(self._watch)

    def _make_writer(self, log_dir: str | os.PathLike[str]) -> "ReportWriter":
        # Imports dozens of modules, so only where something is written.
        from bn_callbacks.tensorboard import ReportWriter

        writer = ReportWriter(log_dir, int(self.max_charts), self.threshold)
        writer.check_directory()
        return writer

    def _begin_writing(self, writer: "ReportWriter") -> "ReportWriter":
        """Begins with the first epoch, after other callbacks have restored theirs."""
        ours = _writers.setdefault(self.model, {})
        log_dir, step = str(self.log_dir), iterations(self.model)
        before = ours.get(log_dir)
        if before is None or not before.resumes_as(writer, step):
            before = ours[log_dir] = writer
            writer.begin(step)
        return before

    def _notice_layers(self, watch: BatchNormWatch) -> None:
        """Plans the charts once the layers are found, or says that there are none."""
        if self._budget is not None or watch.layers is None:
            return
        self._budget = Budget(WRITING_SHARE, WRITING_COST * len(watch.layers))
        if not watch.layers:
            self.report = watch.report
            say_nothing_to_do(self, "watch")
        elif self.log_dir is not None:
            every = {"auto": watch.interval, "batch": 1}.get(str(self.update_freq))
            watch.every = int(self.update_freq) if every is None else every

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._say()
        if self._writer is not None:
            if not self._has_begun:
                self._writer = self._begin_writing(self._writer)
            peers_of(self.model).writer = self._writer
        self._has_begun = True
        if self._watch is not None:
            self._watch.begin_epoch(epoch)

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        watch = self._watch
        if watch is None:
            return
        is_due = watch.advance(batch)
        self._notice_layers(watch)
        if is_due and self._writer is not None and self._may_write():
            self._expect(watch)
            self._write(self._writer, watch.make_report())

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._watch is not None and self._is_fitting:
            self._watch.end_step(batch)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._watch is not None and self._is_fitting:
            self._watch.end_steps()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        watch = self._watch
        if watch is None or watch.layers is None:
            return
        self._expect(watch)
        report = watch.end_epoch()
        if logs is not None:
            logs.update(_logs(report))
        if not watch.layers:
            return
        self.report = report
        if self._writer is not None:
            self._write(self._writer, report, ends_epoch=True)
        if self.verbose and self._is_chief:
            self._unsaid = f"Epoch {epoch + 1}: {report}"
        if not (self.params or {}).get("verbose"):
            self._say()
        # What others have just put in was not there in training.
        is_unknown = report.unknown and not watch.is_written
        if is_unknown and self._is_chief and not self._has_warned:
            self._has_warned = True
            warn_of_unknown(report, self.params)
        self._tell(watch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        self._say()
        watch = self._watch
        if watch is None:
            return
        watch.close()
        # Another callback may have changed the statistics that the report describes.
        final = watch.end()
        self.report = watch.report if watch.layers else self.report
        if self._writer is not None and watch.layers and self.report is not None:
            self._writer.conclude(self.report, iterations(self.model))
        self._close()
        if final is not None:
            self._tell(watch, is_last=True)

    def _say(self) -> None:
        """Prints the report, once the progress bar of its epoch is complete."""
        if self._unsaid:
            print(self._unsaid)
        self._unsaid = ""

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _may_write(self) -> bool:
        assert self._budget is not None
        return self.update_freq != "auto" or self._budget.allows()

    def _write(
        self, writer: "ReportWriter", report: BatchNormReport, ends_epoch: bool = False
    ) -> None:
        assert self._watch is not None
        assert self._budget is not None
        with self._budget.spend():
            step = iterations(self.model)
            writer.write(report, step, self._watch.evidence, ends_epoch=ends_epoch)

    def _expect(self, watch: BatchNormWatch) -> None:
        # Later than `on_epoch_begin`, in which all callbacks say what they do.
        watch.expect(is_recalibrated=peers_of(self.model).recalibrates)

    def _tell(self, watch: BatchNormWatch, is_last: bool | None = None) -> None:
        if self.on_lag == "ignore":
            return
        others = peers_of(self.model)
        for message in watch.messages(
            is_last=is_last,
            is_corrected=others.recalibrates,
            cured=(WARMING_UP,) if others.debiases else (),
        ):
            if self.on_lag == "raise":
                self._say()
                watch.close()
                self._close()
                raise BatchNormLagWarning(message)
            if self._is_chief:
                warn(message, BatchNormLagWarning)


def _logs(report: BatchNormReport) -> dict[str, float]:
    """The figures to put into an epoch's logs."""
    figures = {
        "bn_lag": report.max_lag,
        "bn_loss_gap": report.loss_gap,
        "bn_loss_recalibrated": report.loss_recalibrated,
    }
    return {name: value for name, value in figures.items() if value is not None}

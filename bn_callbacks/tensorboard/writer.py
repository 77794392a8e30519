"""Writes reports into event files."""

import contextlib
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb

from bn_callbacks import pictures
from bn_callbacks.budget import Budget
from bn_callbacks.episodes import Episode
from bn_callbacks.names import printable, said
from bn_callbacks.report import (
    BatchNormReport,
    BatchNormWarning,
    LayerReport,
    RecalibrationReport,
)
from bn_callbacks.statistics.evidence import DEFAULT_THRESHOLD, Evidence
from bn_callbacks.statistics.lag import channel_lags
from bn_callbacks.tensorboard import MAX_CHARTS
from bn_callbacks.tensorboard.charts import (
    ChartedLayers,
    make_layout,
)
from bn_callbacks.tensorboard.event_file import (
    WRITING_FAILS,
    EventFile,
    image_pb,
    layout_pb,
)
from bn_callbacks.tensorboard.history import MARKS, History, mark_of
from bn_callbacks.tensorboard.panels import recalibration_panel, report_panel
from bn_callbacks.tensorboard.runs import SUBDIRECTORY, choose_run
from bn_callbacks.warn import warn

CARD, WHOLE = "BN/lag_map", "bn/lag_map_of_all_layers"
"""Tags of the pictures. TensorBoard sorts: the group of the first one is on top."""

GROWTH = 0.1
"""Training must have grown by this share since the last picture for another one."""

PICTURE_SHARE = 0.002
"""Largest share of the time for drawing, except for the last picture."""

PICTURE_COST = 0.05
"""Seconds to draw a picture: a guess until the first one has been timed."""

NO_PICTURE = (
    "There is no heat map: Pillow 10.1 or newer is not installed. Install it with: "
    'python -m pip install "bn-callbacks[plot]"'
)

_SUMMARIES = {
    "max_lag": "Largest lag of all layers, in standard deviations",
    "layers_lagging": "Number of layers that are not healthy",
    "loss_gap": "Loss in inference mode over loss with batch statistics: 1 is right",
    "loss_recalibrated": "Loss in inference mode that recalibrating could reach",
    "residual": "Largest lag that the last recalibration has left",
}

_FIGURES = {
    "lag": "RMS error of the normalised output from the moving statistics, in σ",
    "mean_shift": "RMS distance of batch from moving mean, in σ",
    "scale_ratio": "Batch σ over moving σ, geometric mean over channels",
    "noise": "RMS fluctuation of the moving statistics from sampling alone, in σ",
    "start_weight": "Weight of the values the moving statistics began with",
}

_SIDES = {"batch": "the batches", "moving": "the layer"}


def _surviving(method: Callable[..., None]) -> Callable[..., None]:
    """Makes errors of a writing method end the writing, not the training."""

    @functools.wraps(method)
    def survive(self: "ReportWriter", *args: Any, **kwargs: Any) -> None:
        if not self._has_failed:
            try:
                method(self, *args, **kwargs)
            except WRITING_FAILS as error:
                self._give_up(error)

    return survive


class ReportWriter:
    """Writes the reports of one `fit` into event files, which are opened on first use.

    Each report writes charts; the end of an epoch adds histograms, a text and the heat
    map. The heat map needs Pillow. It is drawn only if training has grown enough since
    the last one and drawing takes little of the time, and once more at the end.

    An error, such as a full disk, does not end the training: the writer warns once, and
    writes nothing more.

    Args:
        log_dir: The log directory, as `keras.callbacks.TensorBoard` takes it.
        max_charts: Largest number of layers with charts of their own.
        threshold: The lag above which the monitor warns.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        max_charts: int = MAX_CHARTS,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> None:
        self._log_dir = os.fspath(log_dir)
        self._run: str | None = None
        self._has_failed = False
        # Two runs below ours have the same tags, so TensorBoard draws both curves into
        # one chart.
        self._files = {side: EventFile() for side in ("", *_SIDES)}
        self._settings = (max_charts, threshold)
        self._threshold = threshold
        self._paths: list[str] = []
        self._charted = ChartedLayers(max_charts)
        self._layout: tuple[list[str], bool] = ([], False)
        self._written_to: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self.begin(0)
        self._budget = Budget(PICTURE_SHARE, PICTURE_COST)
        self._written: BatchNormReport | None = None

    def begin(self, step: int) -> None:
        """Begins a training at a step of the optimizer."""
        self._start = self._drawn_at = self._step = step
        self._history = History(step)

    def resumes_as(self, other: "ReportWriter", step: int) -> bool:
        """Whether a training that begins at a step may use this writer again.

        Args:
            other: The training's own, new writer.
            step: The optimizer's step at which the training begins.
        """
        is_alike = self._settings == other._settings
        return is_alike and not self._has_failed and 0 < self._step <= step

    def check_directory(self) -> None:
        """Checks that files can be written into the directory, and leaves none.

        Raises:
            ValueError: No file can be written.
        """
        if "://" in self._log_dir:  # Object stores have no directories, only names.
            return
        path = Path(self._log_dir, SUBDIRECTORY)
        missing = [each for each in (path, *path.parents) if not each.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ValueError(
                "`log_dir` must be a directory for files, or one that can be made. "
                f"Received: log_dir={self._log_dir!r}. The system says: {said(error)}. "
                "Pass another directory."
            ) from error
        finally:
            for each in missing:
                with contextlib.suppress(OSError):
                    each.rmdir()

    @_surviving
    def write(
        self,
        report: BatchNormReport,
        step: int,
        evidence: Sequence[Evidence] = (),
        ends_epoch: bool = False,
    ) -> None:
        """Writes one report, without the figures that are unknown.

        Args:
            report: The report.
            step: The optimizer's step.
            evidence: What the report was made from, in the order of its layers.
            ends_epoch: Whether an epoch ends here.
        """
        before, self._step = self._step, step
        paths = [layer.path for layer in report.layers]
        if paths != self._paths:  # The first report, or a resumed `fit` has others.
            self._paths, self._history = paths, History(before)
            self._charted = ChartedLayers(self._settings[0])
        self._history.add(step, report.layers)
        self._since = {
            layer.path: self._since.get(layer.path, step) for layer in report.lagging
        }
        layers = self._charted.update(report)
        charted = [layer.path for layer in layers]
        self._write_past(charted, before, step)
        seen = [each for each in evidence if each.path in charted]
        summaries = [*_scalars(report, layers), *self._new_layout(report, layers)]
        if ends_epoch:
            summaries += [
                *_histograms(seen),
                *self._text(report),
                *self._picture(report, step, is_last=False),
            ]
        self._write("", [(step, summaries)])
        for side in _SIDES:
            self._write(side, [(step, _moments(seen, side))])

    @_surviving
    def conclude(self, report: BatchNormReport, step: int) -> None:
        """Writes the last report as a text, and the heat map if it is due.

        Args:
            report: The report; it may say more than that of the last epoch.
            step: The optimizer's step.
        """
        picture = self._picture(report, step, is_last=True)
        self._write("", [(step, [*self._text(report), *picture])])

    @_surviving
    def mark(self, report: RecalibrationReport, step: int) -> None:
        """Writes what a recalibration has done.

        If the files are closed, it opens them, and closes them again.

        Args:
            report: What the recalibration reported.
            step: The optimizer's step.
        """
        was_open = any(file.is_open for file in self._files.values())
        text = text_pb(
            "bn/recalibration",
            recalibration_panel(report),
            "What a recalibration has done, with the lags before and after",
        )
        self._write("", [(step, [*_summary("residual", report.residual), text])])
        if not was_open:
            self.close()

    @_surviving
    def close(self) -> None:
        """Closes the event files; the next `write` opens new ones."""
        for file in self._files.values():
            file.close()

    def _write(
        self, side: str, events: Sequence[tuple[int, Iterable[Summary]]]
    ) -> None:
        if self._run is None:
            self._run = choose_run(self._log_dir, self._start)
        self._files[side].write(os.path.join(self._run, side), events)

    def _write_past(self, charted: Sequence[str], before: int, step: int) -> None:
        """Adds figures from before to charts that are new, or back after a while."""
        events: dict[int, list[Summary]] = {}
        for path in charted:
            since = self._written_to.get(path, self._start)
            self._written_to[path] = step
            if since < before:
                for past, figures in self._history.past(self._paths.index(path)):
                    if since < past < step:
                        events.setdefault(past, []).extend(_charts(path, figures))
        self._write("", sorted(events.items(), key=lambda event: event[0]))

    def _give_up(self, error: BaseException) -> None:
        self._has_failed = True
        for file in self._files.values():
            with contextlib.suppress(*WRITING_FAILS):
                file.close()
        warn(
            "TensorBoard's files cannot be written any more; training goes on without. "
            f"Received: {said(error)} in {printable(self._run or self._log_dir)}. Make "
            "room, or pass another `log_dir` to the next `fit`.",
            BatchNormWarning,
        )

    def _new_layout(
        self, report: BatchNormReport, layers: Sequence[LayerReport]
    ) -> list[Summary]:
        has_loss_gap = self._layout[1] or report.loss_gap is not None
        layout = ([layer.path for layer in layers], has_loss_gap)
        if layout == self._layout:
            return []
        self._layout = layout
        return [layout_pb(make_layout(*layout))]

    def _text(self, report: BatchNormReport) -> list[Summary]:
        if report == self._written:
            return []
        self._written = report
        notes = () if pictures.is_available() else (NO_PICTURE,)
        text = report_panel(report, self._since, notes)
        return [text_pb("bn/report", text, "The state of the layers, the worst first")]

    def _picture(
        self, report: BatchNormReport, step: int, is_last: bool
    ) -> list[Summary]:
        has_grown = step - self._drawn_at > GROWTH * (self._drawn_at - self._start)
        is_due = has_grown and self._budget.allows()
        if is_last:
            is_due = step > self._drawn_at
        if not (is_due and pictures.is_available() and report.layers):
            return []
        self._drawn_at = step
        with self._budget.spend():
            return list(self._draw(report, step))

    def _draw(self, report: BatchNormReport, step: int) -> Iterator[Summary]:
        gap = "" if report.loss_gap is None else f", loss gap {report.loss_gap:.2g}"
        total, sick = len(report.layers), len(report.lagging)
        count = f"{sick} of {total} not healthy" if sick else f"all {total} healthy"
        heat_map = pictures.HeatMap(
            self._paths,
            self._history.edges,
            self._history.lags,
            self._history.marks,
            self._threshold,
            f"Step {step:,}: {count}{gap}",
            _legend(report.episodes),
        )
        yield image_pb(CARD, *heat_map.card(), "Lag over time, and what was wrong")
        if total > pictures.CARD_ROWS:
            yield image_pb(WHOLE, *heat_map.whole(), "The same, of all layers")


def _legend(episodes: Sequence[Episode]) -> dict[str, str]:
    """The cause that each letter means, and the epochs that had it."""
    spans: dict[str, list[str]] = {}
    for each in episodes:
        first, last = each.first_epoch, each.last_epoch
        span = f"{first}" if first == last else f"{first}-{last}"
        span = span if each.is_over else f"since {first}"
        spans.setdefault(each.cause, []).append(span)
    found = [*spans, *(cause for cause in MARKS if cause not in spans)]
    return {
        mark_of(cause): f"{cause}, epoch {', '.join(spans[cause][-3:])}"
        if cause in spans
        else cause
        for cause in found
    }


def _scalars(
    report: BatchNormReport, charted: Sequence[LayerReport]
) -> Iterator[Summary]:
    yield from _summary("max_lag", report.max_lag)
    yield from _summary("layers_lagging", len(report.lagging))
    yield from _summary("loss_gap", report.loss_gap)
    yield from _summary("loss_recalibrated", report.loss_recalibrated)
    for layer in charted:
        yield from _charts(layer.path, vars(layer))


def _charts(path: str, figures: Mapping[str, Any]) -> Iterator[Summary]:
    for name, description in _FIGURES.items():
        value = figures.get(name)
        if value is not None:
            yield scalar_pb(f"bn/{name}/{path}", value, description)


def _summary(name: str, value: float | None) -> Iterator[Summary]:
    if value is not None and not math.isnan(value):
        yield scalar_pb(f"bn/summary/{name}", value, _SUMMARIES[name])


def _moments(evidence: Sequence[Evidence], side: str) -> Iterator[Summary]:
    """The mean and standard deviation of each layer, as RMS over its channels."""
    of = _SIDES[side]
    for seen in evidence:
        if seen.pair is not None:
            batch, moving = seen.pair
            mean, variance = batch if side == "batch" else moving
            yield scalar_pb(
                f"bn/mu/{seen.path}",
                _root_mean(np.square(mean)),
                f"Means of {of}, RMS over channels",
            )
            yield scalar_pb(
                f"bn/sigma/{seen.path}",
                _root_mean(np.maximum(variance, 0)),
                f"Standard deviations of {of}, RMS over channels",
            )


def _histograms(evidence: Sequence[Evidence]) -> Iterator[Summary]:
    for seen in evidence:
        if seen.pair is not None:
            lags = channel_lags(*seen.pair, seen.epsilon)
            if lags.size and np.isfinite(lags).all():
                tag = f"bn/per_channel_lag/{seen.path}"
                yield histogram_pb(tag, lags, description="Lags of the channels")


def _root_mean(squares: NDArray[np.float64]) -> float:
    return math.sqrt(float(squares.mean())) if squares.size else 0.0

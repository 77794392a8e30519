"""Reports: immutable objects to read, print and convert; and the warning classes."""

import dataclasses
import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from bn_callbacks.episodes import Episode
from bn_callbacks.pictures import draw_bars
from bn_callbacks.statistics.causes import HEALTHY
from bn_callbacks.statistics.diagnosis import Diagnosis, diagnose, diagnose_model
from bn_callbacks.statistics.evidence import Evidence, Figures
from bn_callbacks.statistics.losses import Family, Losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes


UNKNOWN = "unknown"
"""The cause of a layer that was not measured, and so not shown to be healthy."""


class BatchNormWarning(UserWarning):
    """Any warning of `bn_callbacks`.

    Silence all of them with `warnings.simplefilter("ignore", BatchNormWarning)`,
    or turn them into errors with `"error"`.
    """


class BatchNormLagWarning(BatchNormWarning):
    """Moving statistics do not describe what the layers see.

    The message names the worst layer, its lag, the likely cause and the remedy.
    `BatchNormMonitor(on_lag="raise")` raises it as an error.
    """


BatchNormWarning.__module__ = BatchNormLagWarning.__module__ = "bn_callbacks"


@dataclass(frozen=True)
class LayerReport(Figures):
    """The state of one BN layer: its `Figures`, and the verdict on them.

    An unknown figure is `None`.

    Args:
        path: Path of the layer in its model.
        cause: `"healthy"`; the likely cause if something is wrong; or `"unknown"` if
            nothing was measured.
        updates: How many updates of the moving averages were watched; None if they
            could not be counted.
        momentum: The layer's momentum.
        suggested_momentum: A better momentum.
        advice: What to do, in a sentence or two; empty if nothing is wrong.
        cleared: The cause that the statistics alone would suggest, if the losses show
            that the layer does no harm; empty otherwise.
    """

    path: str
    cause: str = HEALTHY
    updates: int | None = None
    momentum: float | None = None
    suggested_momentum: float | None = None
    advice: str = ""
    cleared: str = ""

    @property
    def verdict(self) -> str:
        """The cause; for a layer that the loss clears, also what it is cleared of."""
        if not self.cleared:
            return self.cause
        return f"{self.cause} (loss clears {self.cleared})"


def layer_reports(evidence: Sequence[Evidence]) -> tuple[LayerReport, ...]:
    """Diagnoses all layers, and reports each with its figures."""
    reports = (
        LayerReport(
            path=seen.path,
            cause=verdict.cause,
            updates=seen.updates,
            momentum=seen.momentum,
            suggested_momentum=verdict.suggested_momentum,
            advice=verdict.advice,
            cleared=_cleared(seen, verdict),
            **vars(verdict.figures),
        )
        for seen, verdict in zip(evidence, diagnose_model(evidence), strict=True)
    )
    # Without a lag nothing was measured: unless the layer is not called, or its
    # averages were watched and never moved, its health is unknown.
    return tuple(
        dataclasses.replace(report, cause=UNKNOWN)
        if report.cause == HEALTHY
        and report.lag is None
        and seen.is_called
        and not seen.is_still
        else report
        for report, seen in zip(reports, evidence, strict=True)
    )


def _cleared(seen: Evidence, verdict: Diagnosis) -> str:
    """The cause that the statistics alone suggest for a layer that the losses clear."""
    is_near = not (verdict.figures.lag or 0.0) > seen.threshold
    is_judged = seen.family in (Family.INNOCENT, Family.SLIGHT)
    if verdict.cause != HEALTHY or not is_judged or is_near:
        return ""
    alone = diagnose(dataclasses.replace(seen, family=Family.UNKNOWN)).cause
    return "" if alone == HEALTHY else alone


MAX_ROWS = 30
"""Largest number of layers in a table; it shows the worst."""

MAX_LINES = 10
"""Largest number of episodes in a text; it shows the latest."""

_COLUMNS: dict[str, Callable[[LayerReport], str]] = {
    "layer": lambda layer: layer.path,
    "cause": lambda layer: layer.verdict,
    "lag": lambda layer: _number(layer.lag),
    "mean shift": lambda layer: _number(layer.mean_shift),
    "scale ratio": lambda layer: _number(layer.scale_ratio),
    "residual": lambda layer: _number(layer.residual),
    "noise": lambda layer: _number(layer.noise),
    "start weight": lambda layer: _number(layer.start_weight),
    "momentum": lambda layer: _number(layer.momentum),
}


@dataclass(frozen=True)
class BatchNormReport:
    """The state of all BN layers of a model. `str(report)` is a table.

    Args:
        layers: A `LayerReport` for each layer, in model order.
        loss_batch: Loss with batch statistics, everything else in inference mode.
        loss_inference: Loss in inference mode, on the same examples.
        clues: Facts known before training that may lead to trouble.
        loss_recalibrated: Loss in inference mode, on the same examples, with the
            statistics of these very examples: what recalibrating can reach.
        episodes: What was wrong in the training so far, and when, in the order of
            their beginnings; those that are over too.

    The losses do not include penalties (`model.losses`).
    """

    layers: tuple[LayerReport, ...] = ()
    loss_batch: float | None = None
    loss_inference: float | None = None
    clues: tuple[str, ...] = ()
    loss_recalibrated: float | None = None
    episodes: tuple[Episode, ...] = ()

    @classmethod
    def of(
        cls,
        layers: tuple[LayerReport, ...],
        losses: Losses | None,
        clues: tuple[str, ...] = (),
    ) -> "BatchNormReport":
        """A report with the losses that were measured, if any."""
        if losses is None:
            return cls(layers, clues=clues)
        return cls(
            layers,
            loss_batch=losses.mean("batch"),
            loss_inference=losses.mean("inference"),
            loss_recalibrated=losses.mean("recalibrated"),
            clues=clues,
        )

    @property
    def loss_gap(self) -> float | None:
        """`loss_inference / loss_batch`; well above 1 means BN is wrong."""
        if self.loss_batch is None or self.loss_inference is None:
            return None
        if self.loss_batch <= 0:
            return None
        return self.loss_inference / self.loss_batch

    @property
    def worst(self) -> LayerReport | None:
        """The layer with the largest lag; None without layers."""
        return max(self.layers, key=severity, default=None)

    @property
    def max_lag(self) -> float:
        """The largest lag; 0.0 without layers, NaN if no lag is known."""
        known = [layer for layer in self.layers if layer.lag is not None]
        if not known and self.unknown:
            return math.nan
        return max(known, key=severity).lag or 0.0 if known else 0.0

    @property
    def unknown(self) -> tuple[LayerReport, ...]:
        """The layers that were not measured."""
        return tuple(layer for layer in self.layers if layer.cause == UNKNOWN)

    @property
    def residual(self) -> float | None:
        """The largest residual of any layer; None if none was measured."""
        known = [each.residual for each in self.layers if each.residual is not None]
        return max(known, default=None)

    @property
    def lagging(self) -> tuple[LayerReport, ...]:
        """The layers that are not healthy, worst first; without unknown ones."""
        sick = [layer for layer in self.layers if layer.cause not in (HEALTHY, UNKNOWN)]
        return tuple(sorted(sick, key=severity, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values, ready for `json.dumps`.

        JSON has no infinity: a number that is not finite is given as a string.
        """
        values = {
            **dataclasses.asdict(self),
            "loss_gap": self.loss_gap,
            "max_lag": self.max_lag,
            "residual": self.residual,
            "worst": self.worst.path if self.worst else None,
            "lagging": [layer.path for layer in self.lagging],
        }
        result: dict[str, Any] = plain(values)
        return result

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the lag of each layer as a bar, with the noise floor marked.

        Needs matplotlib: `pip install "bn-callbacks[plot]"`. A bar has the colour of
        the layer's cause. The worst layer is at the top. A large model shows only its
        worst layers.

        Args:
            ax: Where to draw; in a new figure by default.

        Returns:
            The axes. `ax.figure.savefig("lag.png")` saves them.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.

        Example:
        >>> report = BatchNormReport((LayerReport("bn", "drifting", lag=0.5),))
        >>> report.plot().get_title(loc="left")
        '1 of 1 BatchNormalization layers not healthy'
        """
        layers = self.ranked
        return draw_bars(
            [layer.path for layer in layers],
            [layer.lag for layer in layers],
            [layer.cause for layer in layers],
            [layer.noise for layer in layers],
            quiet=HEALTHY,
            label="noise floor",
            title=self.headline,
            axes=ax,
        )

    @property
    def headline(self) -> str:
        """How many layers are healthy, in a line."""
        total, sick, unknown = map(len, (self.layers, self.lagging, self.unknown))
        verdict = "not healthy" if sick else "healthy"
        count = sick or total - unknown
        text = f"{count} of {total} BatchNormalization layers {verdict}"
        return f"{text}, {unknown} unknown" if unknown else text

    @property
    def loss_line(self) -> str:
        """The losses and their gap, in a line; empty if unknown."""
        if self.loss_gap is None:
            return ""
        line = (
            f"loss: {self.loss_inference:.4g} in inference mode, "
            f"{self.loss_batch:.4g} with batch statistics (gap {self.loss_gap:.3g})"
        )
        if self.loss_recalibrated is None:
            return line
        return f"{line}, {self.loss_recalibrated:.4g} if recalibrated on these examples"

    @property
    def ranked(self) -> tuple[LayerReport, ...]:
        """All layers: first those that are not healthy, each group by its lag."""
        lagging = self.lagging
        paths = {layer.path for layer in lagging}
        rest = [layer for layer in self.layers if layer.path not in paths]
        return (*lagging, *sorted(rest, key=severity, reverse=True))

    def __str__(self) -> str:
        if not self.layers:
            return "No BatchNormalization layers."
        rows = [list(_COLUMNS), *self._rows()]
        episodes = [f"  {line}" for line in self.history]
        return "\n".join([self.headline, *episodes, table(rows), *self._notes()])

    def _repr_html_(self) -> str:
        lines = [_paragraph(line) for line in (self.headline, *self.history)]
        notes = [_paragraph(note) for note in self._notes()]
        table = _html_table(list(_COLUMNS), self._rows()) if self.layers else ""
        return "".join([*lines, table, *notes])

    @property
    def history(self) -> list[str]:
        """A line for each episode, the latest if there are many."""
        left = len(self.episodes) - MAX_LINES
        more = [f"… {left} earlier ones"] if left > 0 else []
        return more + [str(episode) for episode in self.episodes[-MAX_LINES:]]

    def _rows(self) -> list[list[str]]:
        shown = self.ranked[:MAX_ROWS]
        return [[cell(layer) for cell in _COLUMNS.values()] for layer in shown]

    def _notes(self) -> list[str]:
        left = self.ranked[MAX_ROWS:]
        notes = []
        if left:
            sick = len(self.lagging) - min(MAX_ROWS, len(self.lagging))
            notes.append(f"… and {len(left)} more layers, {sick} of them not healthy")
        notes += [self.loss_line] if self.loss_line else []
        # The advice for the worst layer of each cause.
        advice = {layer.cause: layer.advice for layer in reversed(self.lagging)}
        notes += [f"{cause}: {text}" for cause, text in advice.items() if text]
        return notes + [f"note: {clue}" for clue in self.clues]


class Shrinkage(NamedTuple):
    """How `prior="stored"` has corrected the stored statistics of a layer.

    Attributes:
        path: Path of the layer.
        start_weight: Weight of the start values, from 0 to 1, that was removed from the
            stored statistics first.
        scale: Factor by which the mean was multiplied then, and the variance by its
            square.
        share: How far the result was moved towards the statistics of the sample: from
            0, not at all, to 1, all the way.
        error: Standard error of the sample, in standard deviations.
    """

    path: str
    start_weight: float
    scale: float
    share: float
    error: float

    def __str__(self) -> str:
        parts = [f"{self.share:.0%} of the way to the sample"]
        if round(self.scale, 2) != 1:
            parts.insert(0, f"scaled by {self.scale:.2f}")
        if self.start_weight >= 0.005:
            parts.insert(0, f"{self.start_weight:.0%} of start values taken out")
        return f"{self.path}: {', '.join(parts)} (whose error is {self.error:.2g})"


@dataclass(frozen=True)
class RecalibrationReport:
    """What a recalibration has measured and done.

    Args:
        before: The layers as they were, compared with the data.
        residual: The largest lag that is left in any layer, measured in inference mode
            over the data; `None` with `refine=0`, where no pass checks the result.
        samples: Samples read in one pass.
        batches: Batches read in one pass.
        passes: Passes over the data.
        committed: Whether the new statistics were written into the model. They are not
            written if `validation_data` shows that the old ones are better, or if they
            are no nearer to what inference sees.
        loss_before: Loss on `validation_data` with the old statistics.
        loss_after: Loss on `validation_data` with the new statistics.
        unreached: Paths of layers that the data never reached; they keep their
            statistics.
        skipped: Paths of layers left alone, since `fit` would not update them.
        residuals: The residual of each of `before.layers`; `None` if no pass has
            measured it.
        notes: Remarks on the data or the result.
        shrinkage: With `prior="stored"` and few examples, how each layer's statistics
            were corrected. `residual` then includes the sample's own error.
    """

    before: BatchNormReport
    residual: float | None
    samples: int
    batches: int
    passes: int
    committed: bool
    loss_before: float | None = None
    loss_after: float | None = None
    unreached: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    residuals: tuple[float | None, ...] = ()
    notes: tuple[str, ...] = ()
    shrinkage: tuple[Shrinkage, ...] = ()
    _undo: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def undo(self) -> None:
        """Restores the statistics that the layers had before, bit for bit.

        Raises:
            RuntimeError: The report has been pickled, without the old statistics.
        """
        self._undo()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values, ready for `json.dumps`.

        JSON has no infinity: a number that is not finite is given as a string.
        """
        fields = {name: value for name, value in vars(self).items() if name[0] != "_"}
        fields["before"] = self.before.to_dict()
        fields["shrinkage"] = [each._asdict() for each in self.shrinkage]
        result: dict[str, Any] = plain(fields)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_undo": _left_behind}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecalibrationReport":
        return self  # Nobody can change it.

    def before_and_after(self) -> list[tuple[LayerReport, float | None]]:
        """Each layer as it was, and the lag that it has now, `None` if unknown."""
        after = self.residuals or [None] * len(self.before.layers)
        return list(zip(self.before.layers, after, strict=True))

    @property
    def ranked(self) -> list[tuple[LayerReport, float | None]]:
        """The same, sorted by the lag before, the worst first."""
        return sorted(
            self.before_and_after(), key=lambda pair: severity(pair[0]), reverse=True
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the lag of each layer before, as a bar, and after, as a mark.

        The worst layer is at the top. A large model shows only its worst layers.

        Needs matplotlib: `pip install "bn-callbacks[plot]"`. With `refine=0` there are
        no marks, since no pass measures the lag after.

        Args:
            ax: Where to draw; in a new figure by default.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.

        Example:
        >>> before = BatchNormReport((LayerReport("bn", lag=0.5),))
        >>> report = RecalibrationReport(before, 0.001, 64, 2, 2, committed=True)
        >>> report.plot().get_xlabel()
        'lag (standard deviations)'
        """
        pairs = self.ranked
        return draw_bars(
            [layer.path for layer, _ in pairs],
            [layer.lag for layer, _ in pairs],
            ["before"] * len(pairs),
            [after for _, after in pairs],
            quiet="",
            label="after",
            title=self.headline,
            axes=ax,
        )

    @property
    def headline(self) -> str:
        """What has been done, in a line."""
        count = len(self.before.layers) - len(self.unreached)
        layers = f"{count} BatchNormalization layer{'s' * (count != 1)}"
        done = "Recalibrated" if self.committed else "Kept the old statistics of"
        return f"{done} {layers}"

    def __str__(self) -> str:
        text = (
            f"{self.headline} over {self.samples:,} samples "
            f"({self.batches:,} batches, {self.passes} "
            f"pass{'es' * (self.passes != 1)}): lag {self.before.max_lag:.3g} before"
        )
        if self.residual is not None:
            text += f", {self.residual:.2g} after"
        if self.loss_after is not None:
            text += f"; validation loss {self.loss_before:.4g} -> {self.loss_after:.4g}"
        for paths, reason in (
            (self.unreached, "never reached by the data"),
            (self.skipped, "not updated in training"),
        ):
            if paths:
                text += f"; left alone, {reason}: {', '.join(paths)}"
        lines = [f"note: {note}" for note in self.notes]
        if self.shrinkage:
            lines.append("from what was stored to the new statistics:")
            lines += [f"  {each}" for each in self.shrinkage]
        return "\n".join([text + ".", *lines])

    def _repr_html_(self) -> str:
        pairs = self.ranked
        rows = [
            [layer.path, _number(layer.lag), _number(left)]
            for layer, left in pairs[:MAX_ROWS]
        ]
        lines = str(self).split("\n")
        if len(pairs) > MAX_ROWS:
            lines.append(f"… and {len(pairs) - MAX_ROWS} more layers")
        table = _html_table(["layer", "lag before", "lag after"], rows)
        return "".join(map(_paragraph, lines)) + table


def _left_behind() -> None:
    raise RuntimeError(
        "There is no undo in a report that has been pickled: the old statistics stayed "
        "in the process that recalibrated. Undo there, or load the model from before."
    )


def severity(layer: LayerReport) -> float:
    """A key to sort layers by: the lag; NaN is the largest, unknown the smallest."""
    if layer.lag is None:
        return -1.0
    return math.inf if math.isnan(layer.lag) else layer.lag


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns cells: two columns of names to the left, the figures to the right.

    Args:
        rows: The rows, equally long; headings first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        inner = "".join(f"<{tag}>{_html(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    return f"<table>{row('th', head)}{''.join(row('td', r) for r in rows)}</table>"


def _paragraph(text: str) -> str:
    return f"<p>{_html(text)}</p>"


def _html(text: str) -> str:
    """Escapes tags and formulas, so that a notebook shows the text as it is."""
    # A dollar alone in its element begins no formula.
    return re.sub(r"[$\\]", r"<span>\g<0></span>", html.escape(text))


def plain(value: Any) -> Any:
    """A value for `json.dumps`, in which numbers that are not finite are strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

"""Reports as Markdown, for TensorBoard's Text tab."""

import html
import re
import textwrap
from collections.abc import Mapping, Sequence

from bn_callbacks.report import (
    UNKNOWN,
    BatchNormReport,
    LayerReport,
    RecalibrationReport,
    severity,
)
from bn_callbacks.statistics.causes import HEALTHY
from bn_callbacks.tensorboard.charts import worst_first

MAX_ROWS = 30
"""Layers in a table at most, the worst."""

ADVICE_WIDTH = 36
"""Characters in a line of advice."""


def report_panel(
    report: BatchNormReport, since: Mapping[str, int], notes: Sequence[str] = ()
) -> str:
    """A report: the verdict, a table with the worst layers, and what else is known.

    Args:
        report: The report.
        since: The step since which a layer has not been healthy, by path.
        notes: Lines to add.
    """
    layers = worst_first(report)
    shown, left = layers[:MAX_ROWS], layers[MAX_ROWS:]
    advised: dict[str, str] = {}
    rows = []
    for layer in shown:
        # The same advice thirty times would bury the one line that is different.
        like = advised.setdefault(layer.cause, layer.path)
        is_first = like == layer.path or not layer.advice
        cells = (
            layer.path,
            layer.cause,
            _number(layer.lag),
            _number(layer.noise),
            _number(layer.start_weight),
            str(since.get(layer.path, "")),
        )
        advice = layer.advice if is_first else f"As for {like}."
        rows.append([*map(escape, cells), _wrap(advice)])
    head = ["layer", "cause", "lag", "noise", "start weight", "since step", "advice"]
    parts = [f"### {report.headline}", _table(head, rows)]
    if left:
        parts.append(f"{_layers(len(left))} more, {_summary(left)}.")
    if report.loss_line:
        parts.append(f"{report.loss_line.capitalize()}.")
    parts += [escape(note) for note in (*report.clues, *notes)]
    return "\n\n".join(parts)


def recalibration_panel(report: RecalibrationReport) -> str:
    """What a recalibration has done, with the lags before and after."""
    pairs = sorted(
        report.before_and_after(),
        key=lambda pair: severity(pair[0]),
        reverse=True,
    )
    rows = [
        [escape(layer.path), _number(layer.lag), _number(after)]
        for layer, after in pairs[:MAX_ROWS]
    ]
    if len(pairs) > MAX_ROWS:
        rows.append([f"and {len(pairs) - MAX_ROWS} more", "", ""])
    if report.loss_after is not None:
        losses = (report.loss_before, report.loss_after)
        rows.insert(0, ["validation loss", *map(_number, losses)])
    return f"{escape(str(report))}\n\n{_table(['', 'before', 'after'], rows)}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, whatever users have named their layers.

    Args:
        text: Any text.

    Example:
        >>> print(escape("a|b_<c>"))
        a&#124;b&#95;&lt;c&gt;
    """
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*_{}\[\]()#+!|~]", lambda found: f"&#{ord(found[0])};", text)


def _wrap(text: str) -> str:
    """Lines of their own: TensorBoard gives one long line the room of all columns."""
    return "<br>".join(map(escape, textwrap.wrap(text, ADVICE_WIDTH)))


def _summary(layers: Sequence[LayerReport]) -> str:
    sick = sum(layer.cause not in (HEALTHY, UNKNOWN) for layer in layers)
    unknown = sum(layer.cause == UNKNOWN for layer in layers)
    lags = [layer.lag for layer in layers if layer.lag is not None]
    text = f"{sick} of them not healthy" if sick else "all healthy"
    if unknown:
        text = f"{sick} of them not healthy, {unknown} unknown"
    return text + (f", with lags up to {max(lags):.3g}" if lags else "")


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"

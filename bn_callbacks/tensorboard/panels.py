"""Reports as Markdown, for TensorBoard's Text tab."""

import functools
import html
import importlib.metadata
import re
import textwrap
from collections.abc import Mapping, Sequence

from bn_callbacks.episodes import Episode
from bn_callbacks.report import (
    MAX_ROWS,
    UNKNOWN,
    BatchNormReport,
    LayerReport,
    RecalibrationReport,
)
from bn_callbacks.statistics.causes import HEALTHY

ADVICE_WIDTH = 36
"""Characters in a line of advice."""

MAX_EPISODES = 12
"""Episodes in a table at most, the latest."""


def report_panel(
    report: BatchNormReport, since: Mapping[str, int], notes: Sequence[str] = ()
) -> str:
    """A report: verdict, what came and went, the worst layers, what else is known.

    Args:
        report: The report.
        since: The step since which a layer has not been healthy, by path.
        notes: Lines to add.
    """
    layers = report.ranked
    shown, left = layers[:MAX_ROWS], layers[MAX_ROWS:]
    advised: dict[str, str] = {}
    rows = []
    for layer in shown:
        # The same advice thirty times would bury the one line that is different.
        like = advised.setdefault(layer.cause, layer.path)
        is_first = like == layer.path or not layer.advice
        cells = (
            _number(layer.lag),
            _number(layer.noise),
            _number(layer.start_weight),
            str(since.get(layer.path, "")),
        )
        advice = _wrap(layer.advice if is_first else f"As for {like}.", is_first)
        cause = escape(layer.verdict) if layer.cleared else _cause(layer.cause)
        rows.append([escape(layer.path), cause, *cells, advice])
    head = ["layer", "cause", "lag", "noise", "start weight", "since step", "advice"]
    parts = [f"### {report.headline}"]
    if report.episodes:
        parts += ["#### What came and went", _episodes(report.episodes)]
    parts += ["#### The layers now, the worst first", _table(head, rows)]
    if left:
        parts.append(f"{_layers(len(left))} more, {_summary(left)}.")
    if report.loss_line:
        parts.append(f"{report.loss_line.capitalize()}.")
    parts += [escape(note) for note in (*report.clues, *notes)]
    return "\n\n".join(parts)


def recalibration_panel(report: RecalibrationReport) -> str:
    """What a recalibration has done, with the lags before and after."""
    rows = [
        [escape(layer.path), _number(layer.lag), _number(after)]
        for layer, after in report.ranked[:MAX_ROWS]
    ]
    if len(report.ranked) > MAX_ROWS:
        rows.append([f"and {len(report.ranked) - MAX_ROWS} more", "", ""])
    if report.loss_after is not None:
        losses = (report.loss_before, report.loss_after)
        rows.insert(0, ["validation loss", *map(_number, losses)])
    return f"{escape(str(report))}\n\n{_table(['', 'before', 'after'], rows)}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, whatever users have named their layers.

    Args:
        text: Any text.

    Examples:
        >>> print(escape("a|b_<c>"))
        a&#124;b&#95;&lt;c&gt;
        >>> print(escape("- 1. a"), escape("1. a"))
        &#45; 1. a 1&#46; a
    """
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"[\\`*_{}\[\]()#+!|~]", lambda found: f"&#{ord(found[0])};", text)
    # At the beginning of a line these would make a list, or a rule.
    return re.sub(r"^(\d*)([-.])", lambda found: f"{found[1]}&#{ord(found[2])};", text)


def _episodes(episodes: Sequence[Episode]) -> str:
    rows = [
        [
            episode.when,
            episode.steps,
            _cause(episode.cause),
            str(len(episode.layers)),
            escape(episode.worst),
            _number(episode.lag),
            _number(episode.loss_gap),
            _wrap(episode.advice, has_code=True),
        ]
        for episode in episodes[-MAX_EPISODES:]
    ]
    left = len(episodes) - len(rows)
    if left:
        rows.insert(0, [f"{left} earlier", *[""] * 7])
    head = ["when", "steps", "cause", "layers", "worst", "its lag", "loss gap"]
    return _table([*head, "what to do"], rows)


def _cause(cause: str) -> str:
    """A cause, as a link to its page, if the documentation has an address."""
    site = _documentation()
    if cause in (HEALTHY, UNKNOWN) or not site:
        return escape(cause)
    return f'<a href="{html.escape(site)}/causes/#{cause}">{escape(cause)}</a>'


@functools.cache
def _documentation() -> str:
    """Where the documentation is, if the package that is installed says so."""
    try:
        urls = importlib.metadata.metadata("bn-callbacks").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    pairs = dict(str(url).split(", ", 1) for url in urls if ", " in url)
    return pairs.get("Documentation", "").rstrip("/")


def _wrap(text: str, has_code: bool) -> str:
    """Lines of their own: TensorBoard gives one long line the room of all columns.

    Args:
        text: The text.
        has_code: Whether what stands between backticks is code; not where names may
            stand in the text.
    """
    shown = "<br>".join(map(escape, textwrap.wrap(text, ADVICE_WIDTH)))
    if not has_code:
        return shown
    tick = escape("`")
    return re.sub(
        f"{tick}(.*?){tick}",
        lambda code: f"<code>{code[1]}</code>".replace("<br>", "</code><br><code>"),
        shown,
    )


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

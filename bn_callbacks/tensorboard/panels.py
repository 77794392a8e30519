"""Writes reports as Markdown for TensorBoard's Text tab."""

import functools
import html
import importlib.metadata
import re
from collections.abc import Mapping, Sequence

from bn_callbacks.report import (
    MAX_ROWS,
    UNKNOWN,
    BatchNormReport,
    LayerReport,
    RecalibrationReport,
)
from bn_callbacks.statistics.causes import HEALTHY

MAX_EPISODES = 12
"""Largest number of episodes in a panel; it shows the latest."""


def report_panel(
    report: BatchNormReport, since: Mapping[str, int], notes: Sequence[str] = ()
) -> str:
    """A report: verdict, episodes, advice, the worst layers, losses and notes.

    Args:
        report: The report.
        since: The step since which each sick layer has not been healthy, by path.
        notes: Lines to add.
    """
    shown, left = report.ranked[:MAX_ROWS], report.ranked[MAX_ROWS:]
    parts = [f"### {report.headline}", *_story(report)]
    rows = [
        [
            escape(layer.path),
            escape(layer.verdict) if layer.cleared else _cause(layer.cause),
            _number(layer.lag),
            _number(layer.noise),
            _number(layer.start_weight),
            str(since.get(layer.path, "")),
        ]
        for layer in shown
    ]
    head = ["layer", "cause", "lag", "noise", "start weight", "since step"]
    parts.append(_table(head, rows))
    if left:
        parts.append(f"{_layers(len(left))} more, {_summary(left)}.")
    if report.loss_line:
        parts.append(f"{report.loss_line.capitalize()}.")
    parts += [escape(note) for note in (*report.clues, *notes)]
    return "\n\n".join(parts)


def _story(report: BatchNormReport) -> list[str]:
    """The episodes, and what to do about each cause."""
    episodes = report.episodes[-MAX_EPISODES:]
    left = len(report.episodes) - len(episodes)
    lines = [f"- {left} earlier ones"] if left else []
    for episode in episodes:
        rest = str(episode).removeprefix(episode.cause)
        lines.append(f"- **{_cause(episode.cause)}** {escape(rest)}")
    # Advice for a layer as it is now replaces that of an episode.
    advice = {episode.cause: episode.advice for episode in episodes}
    advice |= {layer.cause: layer.advice for layer in reversed(report.lagging)}
    to_do = [
        f"- **{_cause(cause)}**: {_advice(text)}"
        for cause, text in advice.items()
        if text
    ]
    parts = ["What came and went:", "\n".join(lines)] if lines else []
    return [*parts, "What to do:", "\n".join(to_do)] if to_do else parts


def recalibration_panel(report: RecalibrationReport) -> str:
    """A recalibration, with the lags before and after."""
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
    """Escapes text, such as names of layers, so that Markdown shows it as it is.

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
    # At the beginning of a line, these begin a list or a rule.
    return re.sub(r"^(\d*)([-.])", lambda found: f"{found[1]}&#{ord(found[2])};", text)


def _cause(cause: str) -> str:
    """A cause, as a link to its section if the documentation has an address."""
    site = _documentation()
    if cause in (HEALTHY, UNKNOWN) or not site:
        return escape(cause)
    return f'<a href="{html.escape(site)}/causes/#{cause}">{escape(cause)}</a>'


@functools.cache
def _documentation() -> str:
    """The address of the documentation in the package's metadata; empty if none."""
    try:
        urls = importlib.metadata.metadata("bn-callbacks").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    pairs = dict(str(url).split(", ", 1) for url in urls if ", " in url)
    return pairs.get("Documentation", "").rstrip("/")


def _advice(text: str) -> str:
    """Advice, in which backticks enclose code: it contains no names of layers."""
    tick = escape("`")
    return re.sub(f"{tick}(.*?){tick}", r"<code>\1</code>", escape(text))


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

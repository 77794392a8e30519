"""Chooses the layers that get charts, and lays these out for Custom Scalars."""

import re
from collections.abc import Iterable

from tensorboard.plugins.custom_scalar import layout_pb2

from bn_callbacks.report import BatchNormReport, LayerReport

PERSISTENCE = 3
"""A layer that is not the worst of all gets a chart after so many reports in a row in
which it is among the worst."""

RECOVERED = 10
"""A layer can lose its chart after so many reports in a row in which it is healthy."""

TURNOVER = 2
"""At most so many times `limit` layers have a chart, one after the other."""


class ChartedLayers:
    """Chooses the layers that get charts: those with which something is wrong.

    A model with at most `limit` layers gets charts of all. In a larger one, the worst
    layers of the first report get half of the places. After that, the worst layer gets
    a place at once if it is not healthy; a layer that stays among the worst gets one
    after some reports. If all places are taken, it replaces the layer that has been
    healthy for longest.

    Args:
        limit: Largest number of layers with charts.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._healthy: dict[str, int] = {}
        self._streaks: dict[str, int] = {}
        self._seen: set[str] = set()

    def update(self, report: BatchNormReport) -> list[LayerReport]:
        """Takes a report into account.

        Returns:
            The layers of the report that have charts now, in model order.
        """
        if len(report.layers) <= self._limit or not self._limit:
            return list(report.layers[: self._limit])
        among = [layer.path for layer in report.ranked[: (self._limit + 1) // 2]]
        sick = [layer.path for layer in report.lagging]
        if not self._seen:
            self._seen.update(among)
            self._healthy.update(dict.fromkeys(among, 0))
        for path in self._healthy:
            self._healthy[path] = 0 if path in sick else self._healthy[path] + 1
        self._streaks = {
            path: self._streaks.get(path, 0) + 1 for path in among if path in sick
        }
        lasting = [path for path, n in self._streaks.items() if n >= PERSISTENCE]
        for path in dict.fromkeys((*sick[:1], *lasting)):
            self._place(path)
        return [layer for layer in report.layers if layer.path in self._healthy]

    def _place(self, path: str) -> None:
        if path in self._healthy:
            return
        if len({*self._seen, path}) > TURNOVER * self._limit:
            return
        if len(self._healthy) == self._limit:
            longest = max(self._healthy, key=lambda each: self._healthy[each])
            if self._healthy[longest] < RECOVERED:
                return
            del self._healthy[longest]
        self._healthy[path] = 0
        self._seen.add(path)


def make_layout(paths: Iterable[str], has_loss_gap: bool) -> layout_pb2.Layout:
    """Makes the page of the Custom Scalars tab, with a chart for each question.

    Args:
        paths: Paths of the layers with charts.
        has_loss_gap: Whether the loss gap is known.
    """
    summary = {
        "Largest lag": "bn/summary/max_lag$",
        "Layers not healthy": "bn/summary/layers_lagging$",
        "Lag of each layer": "bn/lag/",
    }
    if has_loss_gap:
        summary["Loss in inference mode over loss with batch statistics"] = (
            "bn/summary/loss_gap$"
        )
    patterns = {path: f"{re.escape(path)}$" for path in paths}
    return layout_pb2.Layout(
        category=[
            _category("Batch normalization", summary),
            _category(
                "Mean: moving against batches",
                {path: f"bn/mu/{pattern}" for path, pattern in patterns.items()},
            ),
            _category(
                "Standard deviation: moving against batches",
                {path: f"bn/sigma/{pattern}" for path, pattern in patterns.items()},
            ),
            _category(
                "Lag, and what of it is noise",
                {
                    path: f"bn/(lag|noise)/{pattern}"
                    for path, pattern in patterns.items()
                },
            ),
        ]
    )


def _category(title: str, charts: dict[str, str]) -> layout_pb2.Category:
    """A group of charts, each a title and a regular expression for its tags."""
    return layout_pb2.Category(
        title=title,
        chart=[
            layout_pb2.Chart(
                title=name, multiline=layout_pb2.MultilineChartContent(tag=[pattern])
            )
            for name, pattern in charts.items()
        ],
    )

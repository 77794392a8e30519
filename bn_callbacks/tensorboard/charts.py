"""Which layers get charts of their own, and how Custom Scalars lays them out."""

import re
from collections.abc import Iterable

from tensorboard.plugins.custom_scalar import layout_pb2

from bn_callbacks.report import BatchNormReport, LayerReport, severity
from bn_callbacks.statistics.causes import HEALTHY

PERSISTENCE = 3
"""Reports in a row in which a layer must be among the worst to get a chart later."""


class ChartedLayers:
    """Chooses the layers that get charts. The choice only grows, so no chart ends.

    A model with no more layers than charts gets all of them. In a larger one the worst
    layers of the first report get half of the charts. The others are kept for layers
    that stay among the worst for a while.

    Args:
        limit: How many layers at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chosen: set[str] = set()
        self._streaks: dict[str, int] = {}

    def update(self, report: BatchNormReport) -> list[LayerReport]:
        """Takes a report into account.

        Returns:
            The layers of the report that have charts now, in model order.
        """
        if len(report.layers) <= self._limit:
            return list(report.layers)
        worst = worst_first(report)[: (self._limit + 1) // 2]
        if not self._chosen:
            self._chosen.update(layer.path for layer in worst)
        self._streaks = {
            layer.path: self._streaks.get(layer.path, 0) + 1
            for layer in worst
            if layer.cause != HEALTHY
        }
        for path, streak in self._streaks.items():
            if streak >= PERSISTENCE and len(self._chosen) < self._limit:
                self._chosen.add(path)
        return [layer for layer in report.layers if layer.path in self._chosen]


def worst_first(report: BatchNormReport) -> list[LayerReport]:
    """All layers: those that are not healthy, then the others by their lag."""
    lagging = {layer.path for layer in report.lagging}
    healthy = [layer for layer in report.layers if layer.path not in lagging]
    healthy.sort(key=severity, reverse=True)
    return [*report.lagging, *healthy]


def make_layout(paths: Iterable[str], has_loss_gap: bool) -> layout_pb2.Layout:
    """The page of the Custom Scalars tab: a chart for each question.

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

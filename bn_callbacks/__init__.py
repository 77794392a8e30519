"""Watch, recalibrate and debias the moving statistics of BatchNormalization."""

from typing import TYPE_CHECKING, Any

from bn_callbacks.installing import import_with_advice
from bn_callbacks.version import __version__ as __version__

if TYPE_CHECKING:
    from bn_callbacks.auditing import audit
    from bn_callbacks.callbacks.debias import DebiasBatchNorm
    from bn_callbacks.callbacks.monitor import BatchNormMonitor
    from bn_callbacks.callbacks.recalibrate import RecalibrateBatchNorm
    from bn_callbacks.episodes import Episode
    from bn_callbacks.pooling import apply_statistics, measure
    from bn_callbacks.recalibration import recalibrate, recalibrated
    from bn_callbacks.report import (
        BatchNormLagWarning,
        BatchNormReport,
        BatchNormWarning,
        LayerReport,
        RecalibrationReport,
    )
    from bn_callbacks.statistics.moving_average import suggest_momentum
    from bn_callbacks.statistics.population import PopulationMoments
    from bn_callbacks.watching.watch import BatchNormWatch

__all__ = [
    "BatchNormLagWarning",
    "BatchNormMonitor",
    "BatchNormReport",
    "BatchNormWarning",
    "BatchNormWatch",
    "DebiasBatchNorm",
    "Episode",
    "LayerReport",
    "PopulationMoments",
    "RecalibrateBatchNorm",
    "RecalibrationReport",
    "apply_statistics",
    "audit",
    "measure",
    "recalibrate",
    "recalibrated",
    "suggest_momentum",
]

# Keras and TensorFlow take seconds to import, so only when a name is first used.
_HOMES = {
    "BatchNormLagWarning": "report",
    "BatchNormMonitor": "callbacks.monitor",
    "BatchNormReport": "report",
    "BatchNormWarning": "report",
    "BatchNormWatch": "watching.watch",
    "DebiasBatchNorm": "callbacks.debias",
    "Episode": "episodes",
    "LayerReport": "report",
    "PopulationMoments": "statistics.population",
    "RecalibrateBatchNorm": "callbacks.recalibrate",
    "RecalibrationReport": "report",
    "apply_statistics": "pooling",
    "audit": "auditing",
    "measure": "pooling",
    "recalibrate": "recalibration",
    "recalibrated": "recalibration",
    "suggest_momentum": "statistics.moving_average",
}


if not TYPE_CHECKING:  # Type checkers would believe that any name exists.

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_with_advice(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

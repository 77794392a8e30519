"""Watch, recalibrate and debias the moving statistics of BatchNormalization."""

from bn_callbacks.callbacks.debias import DebiasBatchNorm
from bn_callbacks.callbacks.monitor import BatchNormMonitor
from bn_callbacks.callbacks.recalibrate import RecalibrateBatchNorm
from bn_callbacks.recalibration import audit, recalibrate, recalibrated
from bn_callbacks.report import (
    BatchNormLagWarning,
    BatchNormReport,
    BatchNormWarning,
    LayerReport,
    RecalibrationReport,
)
from bn_callbacks.statistics.moving_average import suggest_momentum

__all__ = [
    "BatchNormLagWarning",
    "BatchNormMonitor",
    "BatchNormReport",
    "BatchNormWarning",
    "DebiasBatchNorm",
    "LayerReport",
    "RecalibrateBatchNorm",
    "RecalibrationReport",
    "audit",
    "recalibrate",
    "recalibrated",
    "suggest_momentum",
]

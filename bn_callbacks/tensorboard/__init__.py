"""Reports as TensorBoard shows them: charts, histograms, pictures and texts."""

from bn_callbacks.tensorboard.charts import MAX_CHARTS
from bn_callbacks.tensorboard.writer import SUBDIRECTORY, ReportWriter

__all__ = ["MAX_CHARTS", "SUBDIRECTORY", "ReportWriter"]

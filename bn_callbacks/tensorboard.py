"""Reports as TensorBoard scalars."""

import os

import tensorflow as tf

from bn_callbacks.report import BatchNormReport, RecalibrationReport

SUBDIRECTORY = "batch_norm"
"""Own directory under `log_dir`, so that no other writer's run is mixed with ours."""

_DESCRIPTIONS = {
    "lag": "RMS error of the normalised output from the moving statistics, in σ",
    "mean_shift": "RMS distance of batch from moving mean, in σ",
    "scale_ratio": "Batch σ over moving σ, geometric mean over channels",
    "noise": "RMS fluctuation of the moving statistics from sampling alone, in σ",
    "start_weight": "Weight of the values the moving statistics began with",
}


class ReportWriter:
    """Writes reports into event files, opened on first use.

    Args:
        log_dir: The log directory, as `keras.callbacks.TensorBoard` takes it.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        self._directory = os.path.join(os.fspath(log_dir), SUBDIRECTORY)
        self._writer: tf.summary.SummaryWriter | None = None

    def write(self, report: BatchNormReport, step: int) -> None:
        """Writes one report; figures that are not known are left out.

        Args:
            report: What to write.
            step: The optimizer's step.
        """
        with self._open().as_default(step):
            self._scalar("bn/summary/max_lag", report.max_lag, "Largest lag")
            self._scalar(
                "bn/summary/layers_lagging", len(report.lagging), "Layers not healthy"
            )
            if report.loss_gap is not None:
                self._scalar(
                    "bn/summary/loss_gap",
                    report.loss_gap,
                    "Loss in inference mode over loss with batch statistics",
                )
            for layer in report.layers:
                for name, description in _DESCRIPTIONS.items():
                    value = getattr(layer, name)
                    if value is not None:
                        self._scalar(f"bn/{name}/{layer.path}", value, description)

    def mark(self, report: RecalibrationReport, step: int) -> None:
        """Leaves a mark where a recalibration took place.

        The last one may come after `close`; what it opens it closes.

        Args:
            report: What the recalibration reported.
            step: The optimizer's step.
        """
        is_closed = self._writer is None
        with self._open().as_default(step):
            if report.residual is not None:
                self._scalar(
                    "bn/summary/residual", report.residual, "Lag left by recalibration"
                )
            tf.summary.text("bn/recalibration", str(report))
        if is_closed:
            self.close()

    def close(self) -> None:
        """Closes the event file; the next `write` opens a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> "tf.summary.SummaryWriter":
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(self._directory)
        return self._writer

    def _scalar(self, name: str, value: float, description: str) -> None:
        tf.summary.scalar(name, value, description=description)

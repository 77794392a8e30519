"""What a user may write, right and wrong; read by a type checker and never run."""

import keras
import numpy as np

import bn_callbacks as bn

x, y = np.zeros((64, 4)), np.zeros((64, 1))
model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])

# Right.
monitor = bn.BatchNormMonitor("logs", update_freq=10, on_lag="raise", probe=(x, y))
callbacks: list[keras.callbacks.Callback] = [
    monitor,
    bn.DebiasBatchNorm(),
    bn.RecalibrateBatchNorm(x, tolerance="auto", when="validation", verbose=1),
]
if monitor.report is not None and monitor.report.worst is not None:
    cause: str = monitor.report.worst.cause
gap: float | None = bn.audit(model, x).loss_gap
report: bn.RecalibrationReport = bn.recalibrate(model, x, refine=2, layers=["bn"])
report.undo()
with bn.recalibrated(model, x, tolerance=0.01) as report:
    committed: bool = report.committed
watch = bn.BatchNormWatch(model, steps=10, epochs=None)
worst: bn.LayerReport | None = watch.end_epoch().worst
momentum: float = bn.suggest_momentum(100)
version: str = bn.__version__

# Wrong.
bn.BatchNormMonitor(on_lag="wran")  # wrong: reportArgumentType
bn.BatchNormMonitor(update_freq="epoch")  # wrong: reportArgumentType
bn.BatchNormMonitor(treshold=0.1)  # wrong: reportCallIssue
bn.RecalibrateBatchNorm(x, when="train_begin")  # wrong: reportArgumentType
bn.RecalibrateBatchNorm(x, tolerance="small")  # wrong: reportArgumentType
bn.recalibrate(model, x, refine="always")  # wrong: reportArgumentType
bn.recalibrate(model, x, 32)  # wrong: reportCallIssue
bn.recalibrated(model, x, verbose="yes")  # wrong: reportArgumentType
bn.recalibrat(model, x)  # wrong: reportAttributeAccessIssue
lag = bn.audit(model, x).lag  # wrong: reportAttributeAccessIssue

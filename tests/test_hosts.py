"""The callbacks in loops and beside callbacks that are not ours."""

import keras
import numpy as np
import pytest
from models import compiled, dense, normal

import bn_callbacks as bn
from bn_callbacks.layers import find, read

X = normal(128, 6)
Y = np.abs(X[:, :1])


def values(model):
    return np.concatenate([np.ravel(part) for part in read(find(model))])


def test_a_callback_list_in_a_loop_of_ones_own_drives_them():
    model = compiled(dense(2))
    monitor = bn.BatchNormMonitor(on_lag="ignore")
    history = keras.callbacks.History()
    callbacks = keras.callbacks.CallbackList(
        [monitor, bn.RecalibrateBatchNorm(X), history],
        model=model,
        params={"epochs": 2, "steps": 4, "verbose": 0},
    )
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for step in range(4):
            callbacks.on_train_batch_begin(step)
            part = slice(32 * step, 32 * step + 32)
            logs = model.train_on_batch(X[part], Y[part], return_dict=True)
            callbacks.on_train_batch_end(step, logs)
        callbacks.on_epoch_end(epoch, logs)
    callbacks.on_train_end()
    assert len(history.history["bn_lag"]) == 2
    assert min(history.history["bn_lag"]) > 0.2
    assert monitor.report is not None
    assert bn.audit(model, X).residual < 0.001


def test_logs_carry_floats_that_loggers_can_write():
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(dict(logs))
    )
    model = compiled(dense(2))
    monitor = bn.BatchNormMonitor(on_lag="ignore", probe=(X[:64], Y[:64]))
    model.fit(X, Y, epochs=2, callbacks=[monitor, note], verbose=0)
    for logs in seen:
        ours = {name: value for name, value in logs.items() if name.startswith("bn_")}
        assert {"bn_lag", "bn_loss_gap"} <= set(ours)
        assert {type(value) for value in ours.values()} == {float}


@pytest.mark.skipif(
    keras.__version__.startswith("3.0."),
    reason="Keras 3.0 restores no optimizer that has not been built",
)
def test_a_training_that_backup_and_restore_goes_on_with_is_watched(tmp_path):
    def fit(model, *callbacks):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        monitor = bn.BatchNormMonitor(on_lag="ignore")
        model.fit(
            X,
            Y,
            epochs=4,
            verbose=0,
            callbacks=[backup, monitor, bn.RecalibrateBatchNorm(X), *callbacks],
        )
        return monitor

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("the machine is gone")

    model = compiled(dense(2))
    with pytest.raises(RuntimeError, match="the machine is gone"):
        fit(model, Stop())
    resumed = compiled(keras.models.clone_model(model))
    monitor = fit(resumed)
    assert monitor.report is not None
    assert all(np.isfinite(layer.lag) for layer in monitor.report.layers)
    assert bn.audit(resumed, X).residual < 0.001
    assert np.isfinite(values(resumed)).all()

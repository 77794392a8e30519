"""What is not known is unknown: no zero, and not healthy."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import compiled, dense, normal

from bn_callbacks import BatchNormMonitor, BatchNormWarning, DebiasBatchNorm, audit
from bn_callbacks.layers import calls_of, find
from bn_callbacks.tensorboard.panels import report_panel

X, Y = normal(160, 6, mean=5.0), normal(160, 1)


def make_model():
    return compiled(dense(2))


def fit_short_data(monitor, batches=3):
    """More steps an epoch are asked for than there are data."""
    model = make_model()
    data = tf.data.Dataset.from_tensor_slices((X[:160], Y[:160])).batch(160 // batches)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(
            data, epochs=2, steps_per_epoch=40, callbacks=[monitor], verbose=0
        ).history
    ours = [each for each in caught if issubclass(each.category, BatchNormWarning)]
    return model, history, [str(each.message) for each in ours]


def test_what_is_not_known_is_not_healthy(capsys):
    monitor = BatchNormMonitor(on_lag="ignore", verbose=1)
    model, history, warned = fit_short_data(monitor)
    assert audit(model, X).max_lag > 0.5
    assert np.isnan(history["bn_lag"]).all()
    report = monitor.report
    assert {layer.cause for layer in report.layers} == {"unknown"}
    assert report.lagging == ()
    total = len(report.layers)
    assert report.unknown == report.layers
    assert report.headline == (
        f"0 of {total} BatchNormalization layers healthy, {total} unknown"
    )
    assert np.isnan(report.max_lag)
    assert report.to_dict()["max_lag"] == "nan"
    assert "  unknown  " in capsys.readouterr().out
    assert len(warned) == 1
    assert "not known how many training steps were made" in warned[0]
    assert "Received: data that ended before steps=40 were made." in warned[0]


def test_nothing_unknown_is_charted_or_said_to_be_healthy(tmp_path):
    monitor = BatchNormMonitor(tmp_path, on_lag="ignore")
    fit_short_data(monitor)
    panel = report_panel(monitor.report, {}, ())
    assert "unknown" in panel
    assert "all healthy" not in panel


class TwoViews(keras.Model):
    """Its training step, which a `fit` before has traced, calls the model twice."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = sum(
                self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
                for _ in range(2)
            )
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@pytest.mark.filterwarnings("ignore::bn_callbacks.BatchNormWarning")
def test_passes_of_ours_are_not_counted_as_steps_of_training():
    base = dense(1)
    model = TwoViews(base.inputs[0], base.outputs[0])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(X, Y, verbose=0)
    monitor = BatchNormMonitor(probe=(X, Y), on_lag="ignore")
    model.fit(X, Y, verbose=0, callbacks=[monitor, DebiasBatchNorm()])
    # The monitor has traced its own passes while the other one was watching.
    assert [each.updates for each in calls_of(model, find(model))] == [None]


def test_an_audit_without_data_calls_nothing_healthy():
    model = make_model()
    model.fit(X, Y, verbose=0)
    report = audit(model)
    assert {layer.cause for layer in report.layers} == {"unknown"}
    assert np.isnan(report.max_lag)
    assert {layer.cause for layer in audit(model, X).layers}.isdisjoint({"unknown"})

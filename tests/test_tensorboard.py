"""What a `fit` leaves under `log_dir`, read back from the event files."""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_callbacks import (
    BatchNormLagWarning,
    BatchNormMonitor,
    BatchNormReport,
    LayerReport,
    RecalibrateBatchNorm,
    RecalibrationReport,
)
from bn_callbacks.tensorboard import SUBDIRECTORY, ReportWriter
from bn_callbacks.tensorboard.panels import recalibration_panel
from bn_callbacks.tensorboard.writer import OVERVIEW

BATCH = 16
X = np.random.default_rng(0).normal(3, 2, (10 * BATCH, 3)).astype("float32")
Y = X.sum(1, keepdims=True)
FIGURES = ("lag", "mean_shift", "scale_ratio", "noise", "start_weight")


def make_model(momentum=0.99, **compile_arguments):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.BatchNormalization(momentum=momentum),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(momentum=momentum),
            keras.layers.Dense(1),
        ]
    )
    arguments = {"optimizer": "sgd", "loss": "mse"} | compile_arguments
    model.compile(**arguments)
    return model


def fit(model, *callbacks, **arguments):
    arguments = {"batch_size": BATCH, "verbose": 0} | arguments
    return model.fit(X, Y, callbacks=list(callbacks), **arguments)


def monitor_of(log_dir, *arguments, **keywords):
    return BatchNormMonitor(log_dir, *arguments, on_lag="ignore", **keywords)


def events_of(log_dir, subdirectory=SUBDIRECTORY):
    everything = dict.fromkeys(("tensors", "scalars", "images", "histograms"), 0)
    directory = str(Path(log_dir) / subdirectory)
    return EventAccumulator(directory, size_guidance=everything).Reload()


def read(log_dir, subdirectory=SUBDIRECTORY, plugin="scalars"):
    """`{tag: {step: value}}` of all that was written for a plugin of TensorBoard."""
    events = events_of(log_dir, subdirectory)
    return {
        tag: {
            event.step: tf.make_ndarray(event.tensor_proto)
            for event in events.Tensors(tag)
        }
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == plugin
    }


def texts(log_dir):
    return {
        tag: {step: value.item().decode() for step, value in values.items()}
        for tag, values in read(log_dir, plugin="text").items()
    }


def event_files(log_dir):
    return sorted((Path(log_dir) / SUBDIRECTORY).glob("events.*"))


def approx(values):
    return pytest.approx(values, rel=1e-6)


def test_every_figure_of_each_epochs_report_is_a_scalar(tmp_path):
    reports = []
    monitor = monitor_of(tmp_path, update_freq=1000, probe=(X, Y))
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: reports.append(monitor.report)
    )
    fit(make_model(), monitor, look, epochs=3)
    written = read(tmp_path)
    steps = [10, 20, 30]
    expected = {
        "bn/summary/max_lag": [report.max_lag for report in reports],
        "bn/summary/layers_lagging": [len(report.lagging) for report in reports],
        "bn/summary/loss_gap": [report.loss_gap for report in reports],
    }
    for index, layer in enumerate(reports[0].layers):
        for name in FIGURES:
            values = [getattr(report.layers[index], name) for report in reports]
            expected[f"bn/{name}/{layer.path}"] = values
    for tag, values in expected.items():
        known = {s: v for s, v in zip(steps, values, strict=True) if v is not None}
        assert written.pop(tag, {}) == approx(known), tag
    assert all(tag.startswith(f"{OVERVIEW}/") for tag in written)


def test_the_summary_is_also_where_tensorboard_shows_it_first(tmp_path):
    fit(make_model(), monitor_of(tmp_path, probe=(X, Y)))
    written = read(tmp_path)
    summary = {tag for tag in written if tag.startswith("bn/summary/")}
    assert {f"{OVERVIEW}/{tag.split('/')[2]}" for tag in summary} == {
        tag for tag in written if tag.startswith(OVERVIEW)
    }
    for tag in summary:
        assert written[tag] == written[f"{OVERVIEW}/{tag.split('/')[2]}"]
    # TensorBoard sorts groups by the codes of their characters.
    assert sorted(written)[0].startswith(OVERVIEW)


def test_scalars_say_what_they_are(tmp_path):
    fit(make_model(), monitor_of(tmp_path))
    events = EventAccumulator(str(tmp_path / SUBDIRECTORY))
    events.Reload()
    for tag in events.Tags()["tensors"]:
        metadata = events.SummaryMetadata(tag)
        if metadata.plugin_data.plugin_name != "custom_scalars":
            assert metadata.summary_description


def test_what_is_not_known_is_left_out(tmp_path):
    writer = ReportWriter(tmp_path)
    layers = (LayerReport("a", lag=0.5), LayerReport("b/c", noise=0.1))
    writer.write(BatchNormReport(layers), 7)
    writer.close()
    written = read(tmp_path)
    assert {tag: v for tag, v in written.items() if not tag.startswith(OVERVIEW)} == {
        "bn/summary/max_lag": {7: 0.5},
        "bn/summary/layers_lagging": {7: 0.0},
        "bn/lag/a": {7: 0.5},
        "bn/noise/b/c": {7: approx(0.1)},
    }


@pytest.mark.parametrize(
    ("update_freq", "steps"),
    [
        ("batch", list(range(1, 21))),
        # Epochs of ten steps: so many batches into each, and at its end.
        (1, list(range(1, 21))),
        (4, [4, 8, 10, 14, 18, 20]),
        (7, [7, 10, 17, 20]),
        (100, [10, 20]),
        # A window is a tenth of the run.
        ("auto", list(range(2, 21, 2))),
    ],
)
def test_update_freq_is_how_often_scalars_are_written(tmp_path, update_freq, steps):
    monitor = monitor_of(tmp_path, update_freq)
    fit(make_model(), monitor, epochs=2)
    lag = read(tmp_path)["bn/summary/max_lag"]
    assert sorted(lag) == steps
    assert lag[20] == approx(monitor.report.max_lag)


def test_how_often_scalars_are_written_changes_no_figure(tmp_path):
    reports = []
    for update_freq in ("auto", "batch"):
        keras.utils.set_random_seed(0)
        monitor = monitor_of(tmp_path, update_freq)
        fit(make_model(), monitor, epochs=4, shuffle=False)
        reports.append([layer.lag for layer in monitor.report.layers])
    assert reports[0] == pytest.approx(reports[1], rel=1e-4)


def test_the_step_is_the_optimizers(tmp_path):
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=5)
    fit(make_model(optimizer=optimizer), monitor_of(tmp_path, 1000), epochs=2)
    steps = [2, 4]
    if (
        int(keras.ops.convert_to_numpy(optimizer.iterations)) == 20
    ):  # Keras 3.0 counts micro-batches.
        steps = [10, 20]
    assert list(read(tmp_path)["bn/summary/max_lag"]) == steps


def test_lives_beside_the_callback_of_keras_in_the_same_log_dir(tmp_path):
    log_dir = tmp_path / "logs"
    keras_own = keras.callbacks.TensorBoard(log_dir)
    history = fit(make_model(), monitor_of(log_dir), keras_own).history
    assert {"batch_norm", "train"} <= set(os.listdir(log_dir))
    own = read(log_dir)
    assert all(tag.startswith(("bn/", f"{OVERVIEW}/")) for tag in own)
    assert read(log_dir, "train")["epoch_bn_lag"] == {0: approx(history["bn_lag"][0])}


def test_log_dir_may_be_a_string(tmp_path):
    fit(make_model(), monitor_of(str(tmp_path)))
    assert read(tmp_path)


def test_nothing_is_opened_before_there_is_something_to_write(tmp_path):
    log_dir = tmp_path / "logs"
    monitor = monitor_of(log_dir)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: seen.append(log_dir.exists())
    )
    fit(make_model(), monitor, look)
    assert seen == [False]
    assert len(event_files(log_dir)) == 1


def test_a_second_fit_opens_a_new_file_and_goes_on(tmp_path):
    monitor, model = monitor_of(tmp_path, 1000), make_model()
    fit(model, monitor)
    (first,) = event_files(tmp_path)
    size = first.stat().st_size
    fit(model, monitor)
    assert len(event_files(tmp_path)) == 2
    assert first.stat().st_size == size, "closed"
    assert list(read(tmp_path)["bn/summary/max_lag"]) == [10, 20]


def test_what_was_written_is_there_after_on_lag_has_raised(tmp_path):
    with pytest.raises(BatchNormLagWarning):
        fit(make_model(), BatchNormMonitor(tmp_path, on_lag="raise"))
    assert 10 in read(tmp_path)["bn/summary/max_lag"]


# --- Recalibrations leave a mark


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize(
    ("when", "steps"),
    [("train_end", [20]), ("validation", [10, 20]), ("epoch_end", [10, 20])],
)
def test_recalibrations_leave_a_mark(tmp_path, when, steps, is_first):
    callback = RecalibrateBatchNorm(X, when=when)
    callbacks = [monitor_of(tmp_path), callback]
    fit(make_model(), *(callbacks[::-1] if is_first else callbacks), epochs=2,
        validation_data=(X, Y))  # fmt: skip
    written = read(tmp_path)
    marks = texts(tmp_path)["bn/recalibration"]
    assert sorted(marks) == steps
    assert marks[20] == recalibration_panel(callback.report)
    assert written["bn/summary/residual"][20] == approx(callback.report.residual)


def test_without_a_log_dir_recalibrations_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    logs = tmp_path / "logs"
    fit(model, monitor_of(logs))
    files = event_files(logs)
    fit(model, monitor_of(None), RecalibrateBatchNorm(X))
    fit(model, RecalibrateBatchNorm(X))
    assert event_files(logs) == files
    assert os.listdir(tmp_path) == ["logs"]


def test_a_mark_left_after_closing_is_closed_again(tmp_path):
    writer = ReportWriter(tmp_path)
    report = RecalibrationReport(
        before=BatchNormReport(), residual=None, samples=1, batches=1, passes=1,
        committed=True,
    )  # fmt: skip
    writer.mark(report, 3)
    assert list(texts(tmp_path)) == ["bn/recalibration"]
    writer.write(BatchNormReport(), 4)
    writer.mark(report, 5)
    writer.write(BatchNormReport(), 6)
    writer.close()
    writer.close()
    assert len(event_files(tmp_path)) == 2
    assert list(texts(tmp_path)["bn/recalibration"]) == [3, 5]

"""What a `fit` leaves under `log_dir`, read back from the event files."""

import copy
import html
import itertools
import os
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks import event_files as event_files_benchmark
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import bn_callbacks.callbacks.monitor
import bn_callbacks.tensorboard.event_file
import bn_callbacks.tensorboard.writer
from bn_callbacks import (
    BatchNormLagWarning,
    BatchNormMonitor,
    BatchNormReport,
    BatchNormWarning,
    LayerReport,
    RecalibrateBatchNorm,
    RecalibrationReport,
)
from bn_callbacks.layers import find, iterations
from bn_callbacks.tensorboard import SUBDIRECTORY, ReportWriter
from bn_callbacks.tensorboard.panels import escape, recalibration_panel
from bn_callbacks.tensorboard.runs import choose_run
from bn_callbacks.tensorboard.writer import CARD, WHOLE

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


def runs_of(log_dir):
    return sorted(path.name for path in Path(log_dir).glob(f"{SUBDIRECTORY}*"))


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
        "bn/summary/loss_recalibrated": [each.loss_recalibrated for each in reports],
    }
    for index, layer in enumerate(reports[0].layers):
        for name in FIGURES:
            values = [getattr(report.layers[index], name) for report in reports]
            expected[f"bn/{name}/{layer.path}"] = values
    for tag, values in expected.items():
        known = {s: v for s, v in zip(steps, values, strict=True) if v is not None}
        assert written.pop(tag, {}) == approx(known), tag
    assert written == {}, "and nothing is there twice"


def test_the_picture_is_where_tensorboard_shows_it_first(watched):
    tags = events_of(watched.directory).Tags()["tensors"]
    # TensorBoard sorts groups by the codes of their characters.
    assert min(tags) == CARD
    assert list(read(watched.directory, plugin="images")) == [CARD]


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
    assert read(tmp_path) == {
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
def test_update_freq_is_how_often_scalars_are_written(
    tmp_path, update_freq, steps, monkeypatch
):
    # As if nothing took any time.
    monkeypatch.setattr(bn_callbacks.callbacks.monitor, "WRITING_SHARE", 1e6)
    monitor = monitor_of(tmp_path, update_freq)
    fit(make_model(), monitor, epochs=2)
    lag = read(tmp_path)["bn/summary/max_lag"]
    assert sorted(lag) == steps
    assert lag[20] == approx(monitor.report.max_lag)


def test_writing_between_the_ends_of_epochs_must_not_take_long(tmp_path, monkeypatch):
    # As if writing took so many seconds that the share is spent by the first time.
    monkeypatch.setattr(bn_callbacks.callbacks.monitor, "WRITING_COST", 1e6)
    monkeypatch.setattr(bn_callbacks.callbacks.monitor, "WRITING_SHARE", 1e-9)
    monitor = monitor_of(tmp_path, "auto")
    fit(make_model(), monitor, epochs=2)
    assert sorted(read(tmp_path)["bn/summary/max_lag"]) == [10, 20]


@pytest.mark.slow
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
    assert all(tag.startswith("bn/") for tag in own)
    assert read(log_dir, "train")["epoch_bn_lag"] == {0: approx(history["bn_lag"][0])}


def test_log_dir_may_be_a_string(tmp_path):
    fit(make_model(), monitor_of(str(tmp_path)))
    assert read(tmp_path)


def is_open(writer):
    return any(file.is_open for file in writer._files.values())


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


@pytest.mark.slow
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


class Watched(NamedTuple):
    """A fit of three epochs of ten steps, of which each has been reported."""

    directory: Path
    model: keras.Model
    monitor: BatchNormMonitor


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    directory = tmp_path_factory.mktemp("logs")
    model, monitor = make_model(), monitor_of(directory, "batch", probe=(X, Y))
    fit(model, monitor, epochs=3)
    return Watched(directory, model, monitor)


# --- What a layer sees against what it stores


def root_mean(squares):
    return float(np.sqrt(np.mean(squares)))


def test_moving_and_batch_statistics_are_two_runs_of_the_same_tags(tmp_path):
    model = make_model()
    stored = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: stored.append(
            [variable.numpy() for variable in model.layers[0].non_trainable_variables]
        )
    )
    # The first layer sees this data whatever is learnt, in one batch an epoch.
    fit(model, monitor_of(tmp_path, 1000), look, epochs=3, batch_size=len(X))
    paths = [bn.path for bn in find(model)]
    path = paths[0]
    mu, sigma = f"bn/mu/{path}", f"bn/sigma/{path}"
    moving, batch = (read(tmp_path, f"{SUBDIRECTORY}/{x}") for x in ("moving", "batch"))
    tags = {f"bn/{name}/{path}" for name in ("mu", "sigma") for path in paths}
    assert moving.keys() == batch.keys() == tags
    for step, (mean, variance) in enumerate(stored, 1):
        assert moving[mu][step] == approx(root_mean(mean**2))
        assert moving[sigma][step] == approx(root_mean(variance))
        assert batch[mu][step] == pytest.approx(root_mean(X.mean(0) ** 2), rel=1e-3)
        assert batch[sigma][step] == pytest.approx(root_mean(X.var(0)), rel=1e-3)


@pytest.mark.slow
def test_the_layout_overlays_them_by_a_regular_expression_for_each_layer(watched):
    layouts = read(watched.directory, plugin="custom_scalars")[
        "custom_scalars__config__"
    ]
    assert list(layouts) == [1, 10], "again only when there is something new to show"
    layout = layout_pb2.Layout.FromString(layouts[10].item())
    assert layout.category[0].title == "Batch normalization"
    charts = {
        (category.title, chart.title): chart.multiline.tag
        for category in layout.category
        for chart in category.chart
    }
    everything = [
        tag
        for run in ("", "/moving", "/batch")
        for tag in read(watched.directory, SUBDIRECTORY + run)
    ]
    # As TensorBoard does it.
    shown = {
        key: {tag for tag in everything if re.match(pattern, tag)}
        for key, (pattern,) in charts.items()
    }
    assert all(shown.values()), "no chart is empty"
    path = find(watched.model)[1].path
    assert shown["Mean: moving against batches", path] == {f"bn/mu/{path}"}
    assert shown["Lag, and what of it is noise", path] <= {
        f"bn/lag/{path}",
        f"bn/noise/{path}",
    }
    assert shown["Batch normalization", "Largest lag"] == {"bn/summary/max_lag"}


# --- Histograms, the heat map, and the report, once an epoch


def test_once_an_epoch_there_is_a_histogram_of_the_channels_lags(watched):
    written = read(watched.directory, plugin="histograms")
    lags = read(watched.directory)
    for layer, channels in zip(find(watched.model), (3, 4), strict=True):
        histogram = written[f"bn/per_channel_lag/{layer.path}"]
        assert list(histogram) == [10, 20, 30]
        for step, buckets in histogram.items():
            left, right, count = buckets.T
            assert count.sum() == channels
            # `lag` is the root of the mean square of what is counted here.
            lag = lags[f"bn/lag/{layer.path}"][step]
            low, high = (
                root_mean(np.repeat(edge, count.astype(int)) ** 2)
                for edge in (left, right)
            )
            assert low * (1 - 1e-6) <= lag <= high * (1 + 1e-6)


def test_a_large_model_has_a_picture_of_all_layers_besides(tmp_path):
    for count, tags in ((15, {CARD}), (16, {CARD, WHOLE})):
        writer = ReportWriter(tmp_path / f"{count}")
        layers = tuple(LayerReport(f"bn_{index}", lag=0.5) for index in range(count))
        writer.write(BatchNormReport(layers), 1, ends_epoch=True)
        writer.conclude(BatchNormReport(layers), 2)
        writer.close()
        assert read(tmp_path / f"{count}", plugin="images").keys() == tags


def test_at_the_end_there_is_a_heat_map_of_all_layers(watched):
    (pictures,) = read(watched.directory, plugin="images").values()
    assert set(pictures) <= {10, 20, 30}
    assert 30 in pictures
    for width, height, png in pictures.values():
        assert tf.io.decode_png(png).shape == (int(height), int(width), 3)


def test_short_trainings_get_the_last_heat_map_only(tmp_path):
    writer = ReportWriter(tmp_path)
    report = BatchNormReport((LayerReport("a", lag=0.5),))
    for epoch in range(1, 4):
        writer.write(report, 7 * epoch, ends_epoch=True)
    writer.conclude(report, 21)
    writer.close()
    (pictures,) = read(tmp_path, plugin="images").values()
    assert list(pictures) == [21]


@pytest.mark.slow
def test_long_trainings_get_fewer_heat_maps_but_always_the_last(tmp_path, monkeypatch):
    # As if drawing took no time.
    monkeypatch.setattr(bn_callbacks.tensorboard.writer, "PICTURE_SHARE", 1e6)
    writer = ReportWriter(tmp_path)
    report = BatchNormReport((LayerReport("a", lag=0.5),))
    for epoch in range(1, 51):
        writer.write(report, 7 * epoch, ends_epoch=True)
    writer.conclude(report, 350)
    writer.conclude(report, 350)
    writer.close()
    (pictures,) = read(tmp_path, plugin="images").values()
    epochs = [step / 7 for step in pictures]
    assert epochs[:10] == list(range(1, 11))
    assert epochs[-1] == 50
    assert len(epochs) < 26
    between = [(b - a) / a for a, b in itertools.pairwise(epochs)]
    assert max(between[10:]) <= 0.2, "a picture never lags by more"


def test_the_report_is_a_table_once_an_epoch(watched):
    report = watched.monitor.report
    panels = texts(watched.directory)["bn/report"]
    assert list(panels) == [10, 20, 30]
    rows = [row for row in panels[30].splitlines() if row.startswith("|")]
    head = "| layer | cause | lag | noise | start weight | since step |"
    rows = rows[rows.index(head) + 1 :]
    cells = [cell.strip() for cell in rows[1].strip("|").split("|")]
    worst = report.worst
    assert cells[:3] == [escape(worst.path), escape(worst.cause), f"{worst.lag:.3g}"]
    assert cells[4] == f"{worst.start_weight:.3g}"
    assert int(cells[5]) in range(1, 31)
    shown = re.sub("</?code>", escape("`"), panels[30])
    assert f"- **{escape(worst.cause)}**: {escape(worst.advice)}\n" in shown
    assert f"gap {report.loss_gap:.3g}" in panels[30]


def test_the_report_has_the_last_word(tmp_path):
    # The optimizer puts averaged weights in when training has ended.
    optimizer = keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.9)
    monitor = monitor_of(tmp_path)
    fit(make_model(momentum=0.5, optimizer=optimizer), monitor, epochs=3)
    assert monitor.report.worst.cause == "weights_replaced"
    assert "weights&#95;replaced" in texts(tmp_path)["bn/report"][30]


def test_without_pillow_all_but_the_heat_map_is_written(tmp_path, monkeypatch):
    model = make_model()
    fit(model, monitor_of(tmp_path / "with"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    fit(model, monitor_of(tmp_path / "without"))
    for plugin in ("scalars", "histograms", "text", "custom_scalars"):
        written = [read(tmp_path / x, plugin=plugin) for x in ("with", "without")]
        assert written[0].keys() == written[1].keys() != set()
    assert read(tmp_path / "with", plugin="images")
    assert not read(tmp_path / "without", plugin="images")
    note = 'python -m pip install "bn-callbacks[plot]"'
    for directory, is_noted in (("with", False), ("without", True)):
        (panel,) = texts(tmp_path / directory)["bn/report"].values()
        assert (note in html.unescape(panel)) is is_noted


def test_the_report_says_since_when_a_layer_is_not_healthy(tmp_path):
    writer = ReportWriter(tmp_path)
    for step, cause in enumerate(["drifting", "healthy", "noisy", "drifting"], 1):
        writer.write(BatchNormReport((LayerReport("a", cause),)), step, ends_epoch=True)
    writer.close()
    panels = texts(tmp_path)["bn/report"]
    assert ["| 1 |" in panels[1], "| 3 |" in panels[3], "| 3 |" in panels[4]] == [
        True
    ] * 3
    assert not re.search(r"\| \d \|", panels[2])


def test_what_the_probe_has_shown_holds_until_it_is_asked_again(tmp_path):
    # The statistics are off, but the model does not mind: its last layer is 0.
    model = make_model()
    model.layers[-1].trainable = False
    model.layers[-1].kernel.assign(np.zeros((4, 1)))
    model.compile("sgd", "mse")
    fit(model, monitor_of(tmp_path, "batch", probe=(X, Y)), epochs=2)
    lagging = read(tmp_path)["bn/summary/layers_lagging"]
    assert lagging[9] > 0, "not yet known"
    assert [lagging[step] for step in range(10, 21)] == [0] * 11


# --- Large models


def make_deep_model(layers):
    model = keras.Sequential([keras.Input((3,))])
    for index in range(layers):
        model.add(keras.layers.BatchNormalization(name=f"bn_{index}"))
    model.compile("sgd", "mse")
    return model


@pytest.mark.slow
def test_only_so_many_layers_have_charts_and_all_are_in_the_summary(tmp_path):
    model = make_deep_model(6)
    monitor = monitor_of(tmp_path, "batch", max_charts=4)
    history = model.fit(X, X, BATCH, epochs=2, verbose=0, callbacks=[monitor]).history
    written = read(tmp_path)
    charted = {tag for tag in written if tag.startswith("bn/lag/")}
    assert 2 <= len(charted) <= 4
    worst = f"bn/lag/{monitor.report.worst.path}"
    assert worst in charted
    for plugin, tag in (("scalars", "bn/start_weight"), ("histograms", "bn/per_chan")):
        found = {x for x in read(tmp_path, plugin=plugin) if x.startswith(tag)}
        assert len(found) == len(charted)
    # A chart goes on from where it begins.
    assert all(max(written[tag]) == 20 for tag in charted)
    assert written["bn/summary/max_lag"][20] == approx(history["bn_lag"][-1])


def test_no_charts_of_layers_are_a_choice_too(tmp_path):
    fit(make_model(), monitor_of(tmp_path, max_charts=0))
    assert all(tag.startswith("bn/summary") for tag in read(tmp_path))
    assert read(tmp_path, plugin="images")


@pytest.mark.parametrize("value", [-1, 1.5, None, "all"])
def test_max_charts_is_a_number_of_layers(value):
    with pytest.raises(ValueError, match=rf"`max_charts`.*max_charts={value!r}"):
        BatchNormMonitor(max_charts=value)


@pytest.mark.parametrize("layers", [1, 12, 200])
def test_event_files_stay_small(tmp_path, layers):
    cost = event_files_benchmark.measure(layers, tmp_path)
    report, _ = event_files_benchmark.make_report(layers)
    charted = min(layers, 12)
    name = max(len(layer.path) for layer in report.layers)
    # As docs/tensorboard.md states it.
    assert cost.step <= 600 + charted * 9 * (50 + name)
    assert cost.epoch <= 25_000 + 500 * layers
    assert cost.seconds < 0.05


# --- Beside keras.callbacks.TensorBoard


def test_the_callback_of_keras_does_not_decide_when_we_write(tmp_path):
    # It lets nothing be recorded between its own steps.
    callbacks = [keras.callbacks.TensorBoard(tmp_path, update_freq=7),
                 monitor_of(tmp_path, 1)]  # fmt: skip
    for order in (callbacks, callbacks[::-1]):
        fit(make_model(), *order)
    assert len(runs_of(tmp_path)) == 2
    for run in runs_of(tmp_path):
        assert list(read(tmp_path, run)["bn/summary/max_lag"]) == list(range(1, 11))


def test_steps_are_those_of_the_batches_of_keras(tmp_path):
    made = []
    model = make_model()
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: made.append(iterations(model))
    )
    keras_own = keras.callbacks.TensorBoard(tmp_path, update_freq=1)
    fit(model, keras_own, monitor_of(tmp_path, 1), look, epochs=2)
    steps = list(read(tmp_path, "train")["batch_loss"])
    if steps == [0]:
        pytest.skip("Keras 3.0 gives all batches the step 0.")
    assert steps == list(read(tmp_path)["bn/summary/max_lag"]) == made


# --- Trials in one log_dir, and trainings that resume


def test_each_training_has_a_run_of_its_own(tmp_path):
    monitor = monitor_of(tmp_path)
    for _ in range(3):  # As keras-tuner does it, with copies of one callback.
        fit(make_model(), copy.deepcopy(monitor), epochs=2)
    first, *others = runs_of(tmp_path)
    assert first == SUBDIRECTORY
    for number, run in enumerate(others, 2):
        assert re.fullmatch(rf"batch_norm_{number}_\d{{8}}-\d{{6}}", run)
    for run in (first, *others):
        assert 20 in read(tmp_path, run)["bn/summary/max_lag"]
        assert len(list((tmp_path / run).glob("events.*"))) == 1
        assert read(tmp_path, f"{run}/moving")
        assert read(tmp_path, f"{run}/batch")


@pytest.mark.parametrize("is_same_process", [True, False])
def test_a_training_that_resumes_goes_on_in_its_own_run(tmp_path, is_same_process):
    models = make_model(), make_model()
    for model in models:
        fit(model, monitor_of(tmp_path, 1000), epochs=2)
    if not is_same_process:
        # As in another process: nothing is remembered, and the run is the longest.
        fit(models[1], monitor_of(tmp_path, 1000), epochs=3, initial_epoch=2)
        for model in models:
            bn_callbacks.callbacks.monitor._writers.pop(model)
    runs = runs_of(tmp_path)
    which = 0 if is_same_process else 1
    begin = 2 if is_same_process else 3
    fit(models[which], monitor_of(tmp_path, 1000), epochs=4, initial_epoch=begin)
    assert runs_of(tmp_path) == runs
    steps = [list(read(tmp_path, run)["bn/summary/max_lag"]) for run in runs]
    assert steps[which] == [10, 20, 30, 40]
    assert steps[1 - which] == [10, 20]


def test_a_training_that_was_interrupted_goes_on_in_the_run_that_had_come_as_far(
    tmp_path,
):
    for last in (20, 50, 90):
        writer = ReportWriter(tmp_path)
        for step in range(10, last + 1, 10):
            writer.write(BatchNormReport(), step)
        writer.close()
    short, middle, _ = runs_of(tmp_path)
    assert Path(choose_run(str(tmp_path), 40)).name == middle
    assert Path(choose_run(str(tmp_path), 20)).name == short
    # Nobody has come so far: a model that was trained elsewhere.
    assert Path(choose_run(str(tmp_path), 91)).name.startswith("batch_norm_4_")


def test_two_processes_that_begin_at_once_do_not_share_a_run(tmp_path, monkeypatch):
    # Each looks before the others have made their directory.
    monkeypatch.setattr(tf.io.gfile, "glob", lambda pattern: [])
    runs = {choose_run(str(tmp_path), 0) for _ in range(3)}
    assert len(runs) == 3


def test_the_heat_map_of_a_training_that_resumes_shows_all_of_it(tmp_path):
    model, monitor = make_model(), monitor_of(tmp_path, 1000)
    fit(model, monitor, epochs=2)
    first = monitor._writer
    fit(model, monitor, epochs=4, initial_epoch=2)
    assert monitor._writer is first
    assert first._history.edges == [0, 10, 20, 30, 40]
    assert [len(each.layers) for each in monitor.report.episodes] == [2]


def test_a_training_that_resumes_may_watch_other_layers(tmp_path):
    model = make_model()
    fit(model, monitor_of(tmp_path, 1000), epochs=1)
    some = monitor_of(tmp_path, 1000, layers=[find(model)[0].path])
    fit(model, some, epochs=2, initial_epoch=1)
    assert len(runs_of(tmp_path)) == 1
    assert some._writer._history.edges == [10, 20]
    assert list(read(tmp_path)["bn/summary/max_lag"]) == [10, 20]


def test_a_recompiled_model_begins_anew(tmp_path):
    model = make_model()
    fit(model, monitor_of(tmp_path))
    model.compile("sgd", "mse")
    fit(model, monitor_of(tmp_path))
    assert len(runs_of(tmp_path)) == 2


# --- Charts go where the trouble is


def test_a_chart_that_begins_late_has_its_past(tmp_path):
    writer = ReportWriter(tmp_path, max_charts=2)
    lags = {f"bn_{index}": 0.01 * index for index in range(6)}
    for step in range(1, 9):
        if step == 6:
            lags["bn_0"] = 0.9
        layers = [
            LayerReport(path, "noisy" if lag > 0.2 else "healthy", lag=lag, noise=0.001)
            for path, lag in lags.items()
        ]
        writer.write(BatchNormReport(tuple(layers)), step)
    writer.close()
    written = read(tmp_path)
    charted = {tag for tag in written if tag.startswith("bn/lag/")}
    assert charted == {"bn/lag/bn_5", "bn/lag/bn_0"}
    expected = {step: 0.0 if step < 6 else 0.9 for step in range(1, 9)}
    assert written["bn/lag/bn_0"] == approx(expected)
    assert written["bn/noise/bn_0"] == approx(dict.fromkeys(expected, 0.001))
    assert list(written["bn/lag/bn_5"]) == list(range(1, 9))


# --- What the file system does


class Full(keras.callbacks.Callback):
    """Fills the disk at the end of the first epoch, as far as we are concerned."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, most))


@pytest.fixture
def size_limit():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("size_limit")
def test_a_full_disk_ends_no_training_and_is_told_once(tmp_path):
    monitor = monitor_of(tmp_path / "ours", "batch")
    with pytest.warns(BatchNormWarning, match="cannot be written any more") as seen:
        history = fit(make_model(), monitor, Full(1000), epochs=4).history
    assert len(seen) == 1
    assert len(history["bn_lag"]) == 4
    assert not is_open(monitor._writer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    # Nobody else notices: not the next `fit`, and not TensorFlow's own writers.
    assert tf.summary.should_record_summaries().numpy() is np.False_
    fit(make_model(), keras.callbacks.TensorBoard(tmp_path / "keras"))
    assert events_of(tmp_path / "keras", "train").Tags()["tensors"]
    fit(make_model(), monitor)
    assert read(tmp_path / "ours")


@pytest.mark.parametrize("error", [OSError(5, "gone"), tf.errors.UnknownError])
def test_whatever_the_file_system_raises_is_survived(tmp_path, monkeypatch, error):
    if isinstance(error, type):
        error = error(None, None, "gone")

    def fail(*_):
        raise error

    monkeypatch.setattr(bn_callbacks.tensorboard.event_file.EventFile, "write", fail)
    with pytest.warns(BatchNormWarning, match="Received: .*gone in "):
        fit(make_model(), monitor_of(tmp_path), RecalibrateBatchNorm(X))


@pytest.mark.parametrize("kind", ["file", "below a file", "impossible"])
def test_a_log_dir_that_cannot_be_shows_before_training(tmp_path, kind):
    (tmp_path / "file").touch()
    log_dir = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "logs",
        "impossible": "/proc/self/logs",
    }[kind]
    model = make_model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"^`log_dir` must be .* Received: log_dir='"):
        fit(model, monitor_of(log_dir))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_of_a_fit_that_an_exception_has_ended_are_closed(tmp_path):
    monitor, model = monitor_of(tmp_path, "batch"), make_model()

    def stop(epoch, logs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, monitor, keras.callbacks.LambdaCallback(on_epoch_end=stop))
    first = monitor._writer
    assert is_open(first)
    assert read(tmp_path), "all that was written can be read already"
    fit(model, monitor)
    assert not is_open(first)

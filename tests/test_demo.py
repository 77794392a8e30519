"""The demo on real data, from training to the model loaded again."""

import contextlib
import io
import re
import sys
import warnings
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_callbacks import demo
from bn_callbacks.auditing import audit

README = Path(__file__).parents[1] / "README.md"
FIGURE = re.compile(r"\d[\d.,]*(?:e-\d+)?")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    output, runs, train = io.StringIO(), [], demo._train

    def record(*arguments):
        runs.append(train(*arguments))
        return runs[-1]

    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_train", record)
        rows = demo.run(directory)
    return SimpleNamespace(
        rows=rows, output=output.getvalue(), directory=directory, runs=runs
    )


def test_data_are_whole_batches_of_pixels_from_0_to_1():
    training, validation = demo.load_examples()
    assert training.x.shape == (1280, 64)
    assert validation.x.shape == (512, 64)
    assert (training.x.min(), training.x.max()) == (0, 1)
    assert set(training.y) == set(validation.y) == set(range(10))


def test_the_model_as_trained_predicts_badly(ran):
    row = ran.rows["as trained"]
    assert row.loss > 5 * row.loss_batch
    assert row.val_accuracy < 0.93


@pytest.mark.parametrize("name", ["debiased", "recalibrated"])
def test_debiasing_and_recalibrating_repair_it(ran, name):
    row, before = ran.rows[name], ran.rows["as trained"]
    assert row.loss < row.loss_batch < before.loss / 5
    assert row.val_loss < before.val_loss / 5
    assert row.accuracy > before.accuracy
    assert row.val_accuracy > max(0.96, before.val_accuracy)


def test_rows_differ_in_statistics_only(ran):
    assert len({row.loss_batch for row in ran.rows.values()}) == 1


def test_the_loaded_model_gives_the_same_figures(ran):
    assert ran.rows["loaded again"] == ran.rows["recalibrated"]


def test_the_saved_model_holds_the_statistics_of_the_training_data(ran):
    model = keras.models.load_model(ran.directory / "model.keras")
    x = demo.load_examples()[0].x
    kernel, bias = map(np.float64, model.get_layer("dense_1").get_weights())
    inputs = np.float64(x) @ kernel + bias
    first = model.get_layer("bn_1")
    np.testing.assert_allclose(first.moving_mean, inputs.mean(0), atol=1e-5)
    np.testing.assert_allclose(first.moving_variance, inputs.var(0), rtol=1e-4)
    # The other layers by the fixed point: batch and stored statistics agree.
    assert audit(model, x, batch_size=len(x)).max_lag < 1e-4


def test_the_finding_is_printed(ran):
    finding = ran.output.split("BatchNormMonitor:\n")[1].split("\n\n")[0]
    assert "3 of 3 BatchNormalization layers lag" in finding
    assert "Likely cause: warming_up." in finding
    assert all(len(line) <= demo.WIDTH for line in finding.splitlines())


def test_the_table_shows_the_rows(ran):
    for name, row in ran.rows.items():
        (line,) = re.findall(rf"^{name} (.*)$", ran.output, re.MULTILINE)
        shown = [
            float(cell.rstrip("%")) / (100 if cell.endswith("%") else 1)
            for cell in line.split()
        ]
        np.testing.assert_allclose(shown, astuple(row), atol=6e-4)


def test_the_end_tells_how_to_open_tensorboard(ran):
    assert ran.output.endswith(f"\n  tensorboard --logdir {ran.directory}\n")


def test_the_readme_shows_what_the_demo_prints(ran):
    printed = {FIGURE.sub("0", line.rstrip()) for line in ran.output.splitlines()}
    (block,) = re.findall(
        r"^```text\n(.*?)^```", README.read_text("utf-8"), re.S | re.M
    )
    shown = [line for line in block.splitlines() if line not in ("", "...")]
    # The directory is of the user's own choice.
    assert len(shown) > 15
    assert [
        line
        for line in shown
        if "logs/demo" not in line and FIGURE.sub("0", line) not in printed
    ] == []


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory)).Reload()
    return {
        tag: [
            (event.step, float(tf.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


def test_tensorboard_shows_the_lag_of_each_layer(ran):
    shown = scalars(ran.directory / "as_trained" / "batch_norm")
    lags = [tag for tag in shown if tag.startswith("bn/lag/")]
    assert [tag[-4:] for tag in sorted(lags)] == ["bn_1", "bn_2", "bn_3"]
    for step, value in shown["bn/summary/max_lag"]:
        assert value == max(dict(shown[tag])[step] for tag in lags)
    assert shown["bn/summary/max_lag"][-1][0] == 20 * demo.EPOCHS


def test_tensorboard_shows_the_validation_loss_with_and_without_debiasing(ran):
    plain, debiased = (
        scalars(ran.directory / run / "validation")["epoch_loss"]
        for run in ("as_trained", "debiased")
    )
    assert len(plain) == len(debiased) == demo.EPOCHS
    assert all(
        less < loss for (_, less), (_, loss) in zip(debiased, plain, strict=True)
    )
    np.testing.assert_allclose(
        [plain[-1][1], debiased[-1][1]],
        [ran.rows[name].val_loss for name in ("as trained", "debiased")],
        rtol=1e-4,
    )


def test_missing_scikit_learn_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(demo.DemoError, match=r'pip install "bn-callbacks\[demo\]"$'):
        demo.run(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def run_again(ran, directory, monkeypatch):
    """The demo, but with what it trained before and nothing to measure."""
    runs = iter(ran.runs)
    monkeypatch.setattr(demo, "_train", lambda *_: next(runs))
    monkeypatch.setattr(demo, "_measure", lambda *_: ran.rows["recalibrated"])
    demo.run(directory)


def test_runs_with_different_weights_are_not_compared(ran, tmp_path, monkeypatch):
    bias = ran.runs[1][0].get_layer("digit").bias
    bias.assign_add(np.full(10, 1e-6))
    with pytest.raises(demo.DemoError, match="gave different weights"):
        run_again(ran, tmp_path, monkeypatch)
    bias.assign(ran.runs[0][0].get_layer("digit").bias)
    run_again(ran, tmp_path, monkeypatch)


def test_a_model_that_does_not_load_as_it_was_saved_is_told(ran, tmp_path, monkeypatch):
    load = keras.models.load_model

    def load_and_spoil(path):
        model = load(path)
        model.get_layer("bn_2").moving_mean.assign_add(np.full(demo.UNITS, 1e-6))
        return model

    monkeypatch.setattr(keras.models, "load_model", load_and_spoil)
    with pytest.raises(demo.DemoError, match=r"model\.keras does not give the figures"):
        run_again(ran, tmp_path, monkeypatch)


def test_warnings_of_others_are_passed_on(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("not ours", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="not ours"):
        demo._print_findings(caught)
    assert "Nothing to warn of." in capsys.readouterr().out

"""`bn-callbacks measure`, `merge` and `apply`: data in parts."""

import json

import keras
import numpy as np
import pytest

from bn_callbacks import recalibrate

MEASURE = ("measure", "model.keras", "--data")


@pytest.fixture
def parts(here):
    """The training data of `here`, in two files."""
    with np.load("train.npz") as data:
        x = next(data[name] for name in data.files if data[name].shape[1:] == (4,))
    np.save("one.npy", x[:96])
    np.save("two.npy", x[96:])
    return x


def statistics(path):
    layer = keras.models.load_model(path).get_layer("bn")
    return np.stack([layer.moving_mean.numpy(), layer.moving_variance.numpy()])


def test_two_rounds_over_parts_are_recalibration_with_all_data(parts, run):
    for options in ([], ["--statistics", "all.npz"]):
        for name in ("one", "two"):
            arguments = (f"{name}.npy", "--output", f"{name}.npz", *options)
            assert run(*MEASURE, *arguments).status == 0
        merged = run("merge", "one.npz", "two.npz", "--output", "all.npz")
        assert merged.status == 0
        assert "Merged 2 files of 192 samples (6 batches)." in merged.out
    applied = run("apply", "model.keras", "--moments", "all.npz", "--output", "n.keras")
    assert applied.status == 0
    assert "moved the statistics by" in applied.out
    model = keras.models.load_model("model.keras")
    recalibrate(model, parts, refine=1, verbose=0)
    layer = model.get_layer("bn")
    wanted = np.stack([layer.moving_mean.numpy(), layer.moving_variance.numpy()])
    np.testing.assert_allclose(statistics("n.keras"), wanted, rtol=1e-5)


def test_json_and_in_place(parts, run):
    ran = run(*MEASURE, "one.npy", "--json", "--output", "one.npz")
    told = json.loads(ran.out)
    assert told["samples"] == 96
    assert told["layers"] == ["bn"]
    run(*MEASURE, "two.npy", "--output", "two.npz")
    ran = run("merge", "one.npz", "two.npz", "--json", "--output", "all.npz")
    assert json.loads(ran.out) == {
        "parts": ["one.npz", "two.npz"],
        "layers": ["bn"],
        "samples": 192,
        "batches": 6,
        "output": "all.npz",
    }
    before = statistics("model.keras")
    ran = run("apply", "model.keras", "--moments", "one.npz", "--json", "--in-place")
    assert json.loads(ran.out)["output"] == "model.keras"
    assert (statistics("model.keras") != before).any()


def test_what_cannot_be_read_is_said(parts, fails):
    assert "Cannot read no.npz" in fails("merge", "no.npz", "--output", "all.npz")
    line = fails("merge", "train.npz", "--output", "all.npz")
    assert "holds no moments that can be read" in line
    line = fails(*MEASURE, "one.npy", "--output", "one.npy")
    assert "must end in .npz" in line
    line = fails("apply", "model.keras", "--moments", "one.npy", "--output", "n.keras")
    assert "holds no moments that can be read" in line


def test_parts_of_different_rounds_are_refused(parts, run, fails):
    run(*MEASURE, "one.npy", "--output", "one.npz")
    run(*MEASURE, "two.npy", "--statistics", "one.npz", "--output", "two.npz")
    line = fails("merge", "one.npz", "two.npz", "--output", "all.npz")
    assert "measured with different statistics" in line

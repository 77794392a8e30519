"""`bn-callbacks inspect`: what it shows, and when it finds something."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from cli_kit import make_model

from bn_callbacks.cli.inspect import StoredLayer, find_faults
from bn_callbacks.report import BatchNormReport, LayerReport
from bn_callbacks.statistics.anomalies import Anomaly


def save(mean=0.5, variance=2.0, **bn):
    """A model whose BN layer stores what is given."""
    model = make_model(**bn)
    layer = model.get_layer("bn")
    layer.moving_mean.assign(np.broadcast_to(mean, 6))
    layer.moving_variance.assign(np.broadcast_to(variance, 6))
    model.save("model.keras")


def test_a_trained_model_is_healthy_without_data(run, here):
    ran = run("inspect", "model.keras")
    assert (ran.status, ran.err) == (0, "")
    heading, layer, _, verdict = ran.out.splitlines()
    assert heading.split()[:3] == ["layer", "suspicious", "channels"]
    assert layer.split()[:5] == ["bn", "-", "6", "0.99", "0.001"]
    assert verdict == "model.keras: nothing wrong with 1 BatchNormalization layer."


def test_the_ranges_are_those_of_the_statistics(run, here):
    save([-1, 0, 0, 0, 0, 2.5], [0.25, 1, 1, 1, 1, 30])
    row = run("inspect", "model.keras").out.splitlines()[1]
    assert row.split()[5:] == ["-1", "..", "2.5", "0.25", "..", "30"]


def test_the_documentation_shows_what_is_printed(run, here):
    page = Path(__file__).parents[2] / "docs" / "command-line.md"
    (shown,) = re.findall(
        r"```text\n(layer .*?)```", page.read_text("utf-8"), re.DOTALL
    )
    save([-1.28, 0, 0, 0, 0, 1.32], [0, 1, 1, 1, 1, 3.13])
    assert run("inspect", "model.keras").out == shown


@pytest.mark.parametrize(
    ("mean", "variance", "suspicion", "ends"),
    [
        (0, 1, "never_updated", ([0, 0], [1, 1])),
        ([np.nan, 0, 0, 0, 0, 1], 1, "non_finite", ([0, 1], [1, 1])),
        (np.nan, np.nan, "non_finite", (["nan", "nan"], ["nan", "nan"])),
        (0, [1, 1, 1, 1, 1, -1], "negative_variance", ([0, 0], [-1, 1])),
        (0, [1, 1, 1, 1, 1, 0], "zero_variance", ([0, 0], [0, 1])),
        (0, [1, 1, 1, 1, 1, 2.0**40], "huge_variance", ([0, 0], [1, 2.0**40])),
    ],
)
def test_each_suspicion_is_a_finding(run, here, mean, variance, suspicion, ends):
    save(mean, variance)
    ran = run("inspect", "model.keras", "--json")
    content = json.loads(ran.out)
    assert (ran.status, content["healthy"]) == (1, False)
    assert content["findings"] == {"bn": [suspicion]}
    (layer,) = content["layers"]
    assert [one["name"] for one in layer["suspicions"]] == [suspicion]
    assert (layer["mean"], layer["variance"]) == ends


def test_a_frozen_layer_is_shown_and_is_no_finding(run, here):
    save(trainable=False)
    ran = run("inspect", "model.keras")
    assert ran.status == 0
    assert "\nfrozen: bn: " in ran.out
    save(0, 1, trainable=False)
    ran = run("inspect", "model.keras")
    assert ran.status == 1
    assert "\nnever_updated: bn: " in ran.out


def test_low_precision_is_a_finding(run, here):
    save(dtype="bfloat16")
    ran = run("inspect", "model.keras", "--json")
    content = json.loads(ran.out)
    assert content["layers"][0]["dtype"] == "bfloat16"
    assert content["findings"] == {"bn": ["low_precision"]}


def test_a_model_without_batch_normalization_is_healthy(run, here):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save("plain.keras")
    ran = run("inspect", "plain.keras")
    assert (ran.status, ran.out) == (0, "plain.keras: no BatchNormalization layers.\n")
    content = json.loads(run("inspect", "plain.keras", "--json").out)
    assert content["healthy"]
    assert content["layers"] == []


def test_data_name_the_cause_and_the_loss_gap(run, here):
    ran = run("inspect", "model.keras", "--data", "train.npz", "--json")
    content = json.loads(ran.out)
    assert ran.status == 1
    assert content["findings"] == {"bn": ["warming_up"]}
    audit = content["audit"]
    assert audit["loss_gap"] == audit["loss_inference"] / audit["loss_batch"] > 1.4
    assert audit["layers"][0]["cause"] == "warming_up"
    ran = run("inspect", "model.keras", "--data", "train.npz", "--steps", "2")
    assert ran.status == 1
    assert "\nAgainst the data:\n" in ran.out
    assert "with batch statistics (gap " in ran.out


def test_the_layers_that_are_named_are_looked_at(run, fails, here):
    assert run("inspect", "model.keras", "--layers", "bn").status == 0
    assert "selects no" in fails("inspect", "model.keras", "--layers", "bn_9")


def layer(*suspicions, channels=4):
    return StoredLayer(
        "bn",
        channels,
        0.99,
        0.001,
        "float32",
        True,
        (0.0, 1.0),
        (0.0, 1.0),
        tuple(Anomaly(name, "") for name in suspicions),
    )


def judged(lag, cause="healthy", gap=None):
    losses = (None, None) if gap is None else (1.0, gap)
    return BatchNormReport((LayerReport("bn", cause=cause, lag=lag),), *losses)


@pytest.mark.parametrize(
    ("report", "is_cleared"),
    [
        (judged(0.2), True),
        (judged(0.3), False),  # One of four channels may be off by 0.6.
        (judged(3.0, gap=1.1), True),
        (judged(0.1, gap=1.5), False),
        (judged(np.nan), False),
        (judged(None), True),  # Nothing calls it.
        (judged(0.1, gap=np.nan), False),
    ],
)
def test_data_clear_a_layer_that_is_right_for_them(report, is_cleared):
    faults = find_faults([layer("zero_variance", "huge_variance")], report)
    assert faults == ({} if is_cleared else {"bn": ["zero_variance", "huge_variance"]})


@pytest.mark.parametrize("certain", ["non_finite", "negative_variance"])
def test_no_data_clear_what_is_certain(certain):
    report = judged(0.0, gap=1.0)
    assert find_faults([layer(certain, "zero_variance")], report) == {"bn": [certain]}


def test_the_cause_that_data_name_is_a_finding_once():
    found = find_faults([layer("non_finite")], judged(np.nan, "non_finite"))
    assert found == {"bn": ["non_finite"]}
    found = find_faults([layer("never_updated")], judged(2.0, "drifting"))
    assert found == {"bn": ["never_updated", "drifting"]}


def test_layers_that_data_do_not_judge_keep_their_suspicions():
    assert find_faults([layer("zero_variance")], BatchNormReport()) == {
        "bn": ["zero_variance"]
    }

"""`measure` and `apply_statistics`: data in many places, pooled as if in one."""

import json

import keras
import numpy as np
import pytest
from models import compiled, dense, normal, state

import bn_callbacks as bn
from bn_callbacks.layers import find, read
from bn_callbacks.statistics.population import PopulationMoments

layers = keras.layers
X = normal(320, 6)
PARTS = X[:96], X[96:160], X[160:]


@pytest.fixture
def model():
    return compiled(dense(3))


def round_of(model, statistics=None, **arguments):
    """One round: every part measured by itself, and merged."""
    parts = [bn.measure(model, x, statistics=statistics, **arguments) for x in PARTS]
    return parts[0].merge(parts[1]).merge(parts[2])


def values(model):
    return np.concatenate([np.ravel(part) for part in read(find(model))])


@pytest.mark.parametrize("further", [0, 1, 3])
def test_rounds_over_parts_are_recalibration_with_all_data(model, further):
    merged = round_of(model)
    for _ in range(further):
        merged = round_of(model, merged)
    report = bn.apply_statistics(model, merged)
    ours = values(model)
    report.undo()
    bn.recalibrate(model, X, refine=further, verbose=0)
    np.testing.assert_allclose(ours, values(model), rtol=1e-6, atol=1e-6)


def test_enough_rounds_end_where_recalibration_ends(model):
    merged = round_of(model)
    for _ in range(4):
        merged = round_of(model, merged)
    report = bn.apply_statistics(model, merged)
    assert "moved the statistics by" in report.notes[0]
    assert bn.audit(model, X).residual < 0.001


def test_a_round_with_what_is_stored_changes_nothing_in_a_right_model(model):
    bn.recalibrate(model, X, verbose=0)
    before = values(model)
    bn.apply_statistics(model, round_of(model, "stored"))
    np.testing.assert_allclose(values(model), before, atol=2e-3)


def test_measuring_leaves_the_model_alone(model):
    before = state(model)
    bn.measure(model, X)
    assert state(model) == before


def test_the_report_is_that_of_a_recalibration(model):
    before = state(model)
    report = bn.apply_statistics(model, round_of(model))
    assert report.committed
    assert report.samples == 320
    assert report.batches == 10
    assert report.before.max_lag > 0.2
    assert "Another round" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["passes"] == 1
    assert state(model) != before
    report.undo()
    assert state(model) == before


def test_files_carry_it(model, tmp_path):
    for index, x in enumerate(PARTS):
        bn.measure(model, x).save(tmp_path / f"{index}.npz")
    first, *rest = (PopulationMoments.load(tmp_path / f"{i}.npz") for i in range(3))
    for each in rest:
        first = first.merge(each)
    bn.apply_statistics(model, first)
    ours = values(model)
    bn.apply_statistics(model, round_of(model))
    np.testing.assert_array_equal(ours, values(model))


def test_a_layer_that_no_part_has_reached_keeps_its_statistics():
    inputs = keras.Input((4, 3))
    masked = layers.Masking()(inputs)
    model = keras.Model(
        inputs,
        [
            layers.BatchNormalization(name="masked")(masked),
            layers.BatchNormalization(name="plain")(inputs),
        ],
    )
    moments = bn.measure(model, np.zeros((8, 4, 3), "float32"))
    report = bn.apply_statistics(model, moments)
    assert report.unreached == ("masked",)
    assert model.get_layer("masked").moving_variance.numpy().tolist() == [1, 1, 1]
    assert model.get_layer("plain").moving_variance.numpy().tolist() == [0, 0, 0]


def test_nothing_measured_is_an_error():
    model = keras.Sequential(
        [keras.Input((4, 3)), layers.Masking(), layers.BatchNormalization()]
    )
    moments = bn.measure(model, np.zeros((8, 4, 3), "float32"))
    with pytest.raises(ValueError, match="nothing to apply"):
        bn.apply_statistics(model, moments)


def test_an_error_while_writing_leaves_the_model_as_it_was(model, monkeypatch):
    moments = round_of(model)
    before = state(model)
    last = find(model)[-1].layer.moving_variance

    def fail(value):
        raise OSError("no")

    monkeypatch.setattr(last, "assign", fail)
    with pytest.raises(OSError, match="no"):
        bn.apply_statistics(model, moments)
    assert state(model) == before


def test_moments_of_another_model_are_refused(model):
    other = compiled(dense(2))
    moments = bn.measure(other, X)
    with pytest.raises(ValueError, match="of another model, or of other layers"):
        bn.apply_statistics(model, moments)
    with pytest.raises(ValueError, match="of another model, or of other layers"):
        bn.measure(model, X, statistics=moments)


def test_what_is_no_moments_is_refused(model):
    with pytest.raises(TypeError, match="Received: dict"):
        bn.apply_statistics(model, {})
    with pytest.raises(TypeError, match="Received: statistics=0"):
        bn.measure(model, X, statistics=0)
    with pytest.raises(ValueError, match="Received: dropout='yes'"):
        bn.measure(model, X, dropout="yes")


def test_selected_layers_are_measured_and_written_alone(model):
    path = find(model)[1].path
    moments = bn.measure(model, X, layers=path)
    assert [path.endswith(name) for name in moments.moments] == [True]
    before = read(find(model))
    bn.apply_statistics(model, moments)
    after = read(find(model))
    assert [
        bool((a.mean != b.mean).any()) for a, b in zip(after, before, strict=True)
    ] == [
        False,
        True,
        False,
    ]


def test_a_copy_of_another_name_measures_for_the_model():
    def make(name):
        stack = [keras.Input((6,)), layers.BatchNormalization(name="bn")]
        return keras.Sequential(stack, name=name)

    model = make("server")
    moments = bn.measure(make("client"), X)
    bn.apply_statistics(model, moments)
    np.testing.assert_allclose(model.layers[0].moving_mean, X.mean(0), rtol=1e-5)

"""Moments of layers: merged exactly, saved and loaded."""

import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_callbacks.statistics.moments import Moments, Statistics
from bn_callbacks.statistics.population import MAX_ROWS, PopulationMoments

SIZES = {"a": 3, "b/c": 1, "ü": 2}


def part(values, given=None):
    moments = {path: Moments.from_values(values[:, :n]) for path, n in SIZES.items()}
    return PopulationMoments(moments, given, len(values), 1)


def numbers(population):
    return np.concatenate(
        [np.r_[m.count, m.mean, m.m2] for m in population.moments.values()]
    )


def fixed(value=0.0):
    return {p: Statistics(np.full(n, value), np.ones(n)) for p, n in SIZES.items()}


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=3, max_size=3),
    shift=st.floats(-1e4, 1e4),
    seed=st.integers(0, 2**31),
)
def test_merging_is_exact_associative_and_commutative(sizes, shift, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(size, 3)) + shift * rng.normal() for size in sizes]
    a, b, c = map(part, parts)
    whole = part(np.concatenate(parts))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        np.testing.assert_allclose(
            numbers(merged), numbers(whole), rtol=1e-12, atol=1e-9
        )
        assert merged.samples == sum(sizes)
        assert merged.batches == 3


def test_variances_of_parts_are_not_averaged():
    """PFLlib#269: clients' variances, averaged, forget how clients differ."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(5 * sign, 1, (200, 3)) for sign in (-1, 1)]
    merged = part(parts[0]).merge(part(parts[1])).statistics["a"]
    whole = np.concatenate(parts)
    np.testing.assert_allclose(merged.variance, whole.var(0), rtol=1e-12)
    assert (merged.variance > 20 * np.mean([each.var(0) for each in parts])).all()


@pytest.mark.parametrize("given", [None, fixed(2.0)])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, given):
    one = part(np.random.default_rng(0).normal(size=(5, 3)), given)
    path = tmp_path / "part.npz"
    one.save(path)
    one.save(str(path))  # Replaces it.
    again = PopulationMoments.load(path)
    assert numbers(again).tobytes() == numbers(one).tobytes()
    assert (again.samples, again.batches) == (5, 1)
    assert list(again.moments) == list(SIZES)
    assert one.merge(again).samples == 10
    assert [each.name for each in tmp_path.iterdir()] == ["part.npz"]


def test_moments_of_nothing_are_saved_too(tmp_path):
    PopulationMoments({}, None, 0, 0).save(tmp_path / "none.npz")
    assert PopulationMoments.load(tmp_path / "none.npz").moments == {}
    empty = PopulationMoments({"a": Moments.empty(2)}, None, 0, 0)
    empty.save(tmp_path / "empty.npz")
    loaded = PopulationMoments.load(tmp_path / "empty.npz")
    assert loaded.moments["a"].is_empty


def test_the_text_has_a_headline_and_a_row_for_each_layer():
    values = np.array([[1.0, 10.0, 5.0], [3.0, 10.0, 5.0]])
    headline, *rows = str(part(values, fixed())).splitlines()
    assert headline == (
        "Moments of 3 BatchNormalization layers: 2 samples, 1 batches, normalised with "
        "given statistics"
    )
    cells = [re.split("  +", row) for row in rows]
    assert cells == [
        ["layer", "channels", "values per channel", "mean", "variance"],
        ["a", "3", "2", "2 .. 10", "0 .. 1"],
        ["b/c", "1", "2", "2", "1"],
        ["ü", "2", "2", "2 .. 10", "0 .. 1"],
    ]
    assert len({len(row) for row in rows}) == 1


def test_a_text_of_many_layers_shows_the_first():
    some = {f"bn_{i}": Moments.empty(2) for i in range(MAX_ROWS + 2)}
    lines = str(PopulationMoments(some, None, 0, 0)).splitlines()
    assert len(lines) == 1 + 1 + MAX_ROWS + 1
    assert lines[2].split() == ["bn_0", "2", "0", "-", "-"]
    assert lines[-1] == "… and 2 more layers"


def test_the_text_of_no_layers_is_its_headline():
    assert str(PopulationMoments({}, None, 0, 0)) == (
        "Moments of 0 BatchNormalization layers: 0 samples, 0 batches, normalised by "
        "batch"
    )


def test_the_text_of_a_strangers_file_does_not_act_on_the_terminal():
    moments = {"bn\n\x1b[2K": Moments.empty(1)}
    text = str(PopulationMoments(moments, None, 0, 0))
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        part(np.ones((1, 3))).save(tmp_path / "part.npy")


def test_moments_of_another_model_are_refused():
    other = PopulationMoments({"a": Moments.empty(3)}, None, 0, 0)
    with pytest.raises(ValueError, match="of different models"):
        part(np.ones((1, 3))).merge(other)


@pytest.mark.parametrize("other", [None, fixed(1.0)])
def test_rounds_are_not_mixed(other):
    x = np.ones((1, 3))
    with pytest.raises(ValueError, match="measured with different statistics"):
        part(x, fixed()).merge(part(x, other))
    assert part(x, other).merge(part(x, other)).samples == 2


def test_only_moments_are_merged():
    with pytest.raises(TypeError, match="Received: dict"):
        part(np.ones((1, 3))).merge({})


def damaged(**changes):
    """The arrays of a file, some of them changed or, where None, left out."""
    arrays = {
        "format": np.array(1),
        "paths": np.array(["a"]),
        "channels": np.array([2]),
        "read": np.array([3, 1]),
        "count": np.ones(2),
        "mean": np.ones(2),
        "m2": np.ones(2),
    }
    arrays.update(changes)
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (damaged(format=np.array(2)), "format 2 instead of 1"),
        (damaged(format=None), "format"),
        (damaged(paths=np.array(["a", "a"])), "1 layers of 1 names"),
        (damaged(channels=np.array([-2])), "a layer of -2 channels"),
        (damaged(channels=np.array([3])), r"count of shape \(2,\)"),
        (damaged(m2=np.ones(2, np.float32)), "dtype float32"),
        (damaged(m2=-np.ones(2)), "values of a that are no moments"),
        (damaged(mean=np.full(2, np.nan)), "values of a that are no moments"),
        (damaged(m2=np.full(2, np.inf)), "values of a that are no moments"),
        (damaged(given_mean=np.ones(2)), "given_variance"),
        (damaged(paths=np.array([{}], object)), "allow_pickle=False"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, arrays, reason):
    path = tmp_path / "part.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="holds no moments") as error:
        PopulationMoments.load(path)
    assert error.match(reason)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1])])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "part.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no moments that can be read"):
        PopulationMoments.load(path)


def test_an_array_is_no_file_of_moments(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(ValueError, match="holds no moments that can be read"):
        PopulationMoments.load(tmp_path / "x.npy")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        PopulationMoments.load(tmp_path / "none.npz")

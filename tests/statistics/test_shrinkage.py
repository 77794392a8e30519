"""Statistics from few examples: against formulas, and against what is right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_callbacks.statistics.moments import Moments, Statistics, pool
from bn_callbacks.statistics.shrinkage import _directions, _sample, shrunk

CHANNELS = 64
START = Statistics(np.zeros(CHANNELS), np.ones(CHANNELS))


def truth(rng):
    return Statistics(rng.normal(size=CHANNELS) * 2, rng.gamma(2, 2, CHANNELS))


def examples(rng, right, count, pixels=1, alike=0.0):
    """Each of some pixels; `alike` is the share of the variance that they share."""
    shape = (count, pixels, CHANNELS)
    own, shared = rng.normal(size=shape), rng.normal(size=(count, 1, CHANNELS))
    unit = np.sqrt(1 - alike) * own + np.sqrt(alike) * shared
    values = right.mean + np.sqrt(right.variance) * unit
    return [Moments.from_values(each) for each in values]


def off(statistics, right):
    """The lag: in standard deviations of what is right."""
    ratio = np.sqrt(statistics.variance / right.variance) - 1
    shift = (statistics.mean - right.mean) / np.sqrt(right.variance)
    return np.sqrt(np.mean(shift**2 + ratio**2))


def test_sample_has_the_unbiased_variance_and_the_error_of_the_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 3))
    ones = np.ones_like(values)
    sample = _sample(ones, values, np.zeros_like(values))
    np.testing.assert_allclose(sample.mean, values.mean(0))
    np.testing.assert_allclose(sample.variance, values.var(0, ddof=1))
    error2 = np.square(sample.of_mean).sum(0)
    np.testing.assert_allclose(error2, values.var(0, ddof=1) / 7)
    for index in range(7):
        rest = np.delete(values, index, axis=0)
        np.testing.assert_allclose(sample.without.mean[index], rest.mean(0))
        np.testing.assert_allclose(sample.without.variance[index], rest.var(0, ddof=1))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), parts=st.integers(3, 9))
def test_sample_of_parts_of_different_sizes_has_their_pooled_mean(seed, parts):
    rng = np.random.default_rng(seed)
    each = [
        Moments.from_values(rng.normal(size=(rng.integers(1, 9), 2)))
        for _ in range(parts)
    ]
    counts, means = (
        np.stack([getattr(one, n) for one in each]) for n in ("count", "mean")
    )
    sample = _sample(counts, means, np.stack([one.variance for one in each]))
    whole = pool(each)
    np.testing.assert_allclose(sample.mean, whole.mean, atol=1e-12)
    # Each adds to the error in proportion to its weight.
    assert (sample.variance >= whole.variance).all()
    np.testing.assert_allclose(sample.of_mean.sum(0), 0, atol=1e-12)


@pytest.mark.parametrize("count", [8, 16, 32])
def test_what_is_right_is_left_almost_alone(count):
    distances, shares = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        right = truth(rng)
        found = shrunk(examples(rng, right, count), right, START, 1e-3)
        distances.append(off(found.statistics, right))
        shares.append(found.share)
        assert found.start_weight < 0.05
    plain = np.sqrt(1.5 / count)
    assert np.mean(distances) < 0.15 * plain
    assert np.median(shares) < 0.05


@pytest.mark.parametrize("count", [8, 16])
def test_the_start_values_are_taken_out_of_all_channels_at_once(count):
    rng = np.random.default_rng(1)
    right = truth(rng)
    weight = 0.99**100
    stored = Statistics(
        (1 - weight) * right.mean, (1 - weight) * right.variance + weight
    )
    found = shrunk(examples(rng, right, count), stored, START, 0.0)
    assert found.start_weight == pytest.approx(weight, abs=0.08)
    assert off(found.statistics, right) < 0.4 * np.sqrt(1.5 / count)


def test_one_factor_for_all_channels_is_found():
    rng = np.random.default_rng(2)
    right = truth(rng)
    stored = Statistics(right.mean / 255, right.variance / 255**2)
    found = shrunk(examples(rng, right, 16), stored, START, 0.0)
    assert found.scale == pytest.approx(255, rel=0.1)
    assert off(found.statistics, right) < 0.2


def test_what_is_wrong_in_each_channel_its_own_way_comes_from_the_sample():
    rng = np.random.default_rng(3)
    right, stored = truth(rng), truth(rng)
    each = examples(rng, right, 16)
    found = shrunk(each, stored, START, 1e-3)
    assert found.share > 0.8
    assert off(found.statistics, right) < 0.5 * off(stored, right)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 20))
def test_units_do_not_matter(seed, share):
    rng = np.random.default_rng(seed)
    right, stored = truth(rng), truth(rng)
    each = examples(rng, right, 8)
    found = shrunk(each, stored, START, 0.0)
    other = shrunk(
        [Moments(m.count, share * m.mean, share**2 * m.m2) for m in each],
        Statistics(share * stored.mean, share**2 * stored.variance),
        Statistics(share * START.mean, share**2 * START.variance),
        0.0,
    )
    assert other.share == pytest.approx(found.share, abs=1e-6)
    np.testing.assert_allclose(
        other.statistics.variance, share**2 * found.statistics.variance, rtol=1e-5
    )


def test_pixels_that_are_alike_are_no_further_examples():
    rng = np.random.default_rng(4)
    right = truth(rng)
    alone = shrunk(examples(rng, right, 16), right, START, 1e-3)
    alike = shrunk(examples(rng, right, 16, 100, alike=0.99), right, START, 1e-3)
    apart = shrunk(examples(rng, right, 16, 100), right, START, 1e-3)
    assert alike.error == pytest.approx(alone.error, rel=0.2)
    assert apart.error == pytest.approx(alone.error / 10, rel=0.2)


def test_error_is_that_of_the_sample():
    rng = np.random.default_rng(5)
    right = truth(rng)
    found = shrunk(examples(rng, right, 200), right, START, 0.0)
    assert found.error == pytest.approx(np.sqrt(1.5 / 200), rel=0.15)


def test_with_many_examples_it_is_the_sample():
    rng = np.random.default_rng(6)
    right, stored = truth(rng), truth(rng)
    each = examples(rng, right, 2000)
    found = shrunk(each, stored, START, 1e-3).statistics
    assert off(found, pool(each).statistics) < 0.01


def test_directions_are_counted_not_channels():
    rng = np.random.default_rng(7)
    few = rng.normal(size=(400, 3)) @ np.linalg.qr(rng.normal(size=(60, 3)))[0].T
    assert _directions(few) == pytest.approx(3, rel=0.1)
    assert _directions(rng.normal(size=(400, 60))) == pytest.approx(60, rel=0.1)
    assert _directions(np.eye(6)[:3]) == 6


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_examples_are_an_error(count):
    rng = np.random.default_rng(0)
    each = [*examples(rng, START, count), Moments.empty(CHANNELS)]
    with pytest.raises(ValueError, match=f"Received: {count} that are not empty"):
        shrunk(each, START, START, 1e-3)


def test_stored_values_that_are_no_numbers_are_no_prior():
    rng = np.random.default_rng(8)
    right = truth(rng)
    each = examples(rng, right, 16)
    stored = Statistics(right.mean.copy(), right.variance.copy())
    stored.mean[0], stored.variance[1], stored.variance[2] = np.nan, np.inf, -1.0
    found = shrunk(each, stored, START, 1e-3)
    values = np.stack([one.mean for one in each])
    np.testing.assert_allclose(found.statistics.mean[:3], values.mean(0)[:3])
    np.testing.assert_allclose(found.statistics.variance[:3], values.var(0, ddof=1)[:3])
    assert found.share < 0.3
    none = Statistics(np.full(CHANNELS, np.nan), right.variance)
    assert shrunk(each, none, START, 1e-3).share == 1.0


def test_channels_that_nothing_reaches_keep_what_is_stored():
    rng = np.random.default_rng(9)
    right, stored = truth(rng), truth(rng)
    each = [
        Moments(np.r_[0.0, index < 2, index < 3, np.ones(61)], one.mean, one.m2)
        for index, one in enumerate(examples(rng, right, 8))
    ]
    found = shrunk(each, stored, START, 1e-3).statistics
    for part, kept in zip(found, stored, strict=True):
        assert (part[:2] == kept[:2]).all()
        assert part[2] != kept[2]
        assert np.isfinite(part).all()


def test_nothing_reached_at_all_is_nothing_changed():
    each = [Moments(np.eye(3)[i], np.ones(3), np.zeros(3)) for i in range(3)]
    stored = Statistics(np.ones(3), np.ones(3))
    found = shrunk(each, stored, Statistics(np.zeros(3), np.ones(3)), 1e-3)
    assert (found.statistics.mean == 1).all()
    assert (found.share, found.error) == (0.0, 0.0)


def test_examples_that_are_all_the_same_are_believed():
    same = [Moments.from_values(np.full((1, 4), 5.0))] * 4
    stored = Statistics(np.zeros(4), np.ones(4))
    found = shrunk(same, stored, stored, 1e-3)
    assert found.share == 1.0
    np.testing.assert_allclose(found.statistics.mean, 5.0)
    np.testing.assert_allclose(found.statistics.variance, 0.0, atol=1e-12)


def test_a_channel_that_is_silent_in_the_sample_does_not_decide_for_all():
    rng = np.random.default_rng(10)
    right = truth(rng)
    each = examples(rng, right, 16)
    for one in each:
        one.mean[0] = one.m2[0] = 0.0
    stored = Statistics(np.where(np.arange(CHANNELS), right.mean, 0.0), right.variance)
    assert shrunk(each, stored, START, 0.0).share < 0.3

"""Moments of parts are the moments of the whole, however it is split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_callbacks.statistics.moments import (
    Moments,
    Statistics,
    is_finite,
    pool,
    pool_batches,
    pool_replicas,
)

pytestmark = pytest.mark.filterwarnings("error")

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
locations = st.sampled_from([0.0, 1.0, -1e4, 1e6])


def sample(seed, size=60, channels=3, location=0.0):
    rng = np.random.default_rng(seed)
    return location + rng.normal(size=(size, channels)) * [0.1, 1.0, 10.0][:channels]


def assert_same(actual, expected, *, scale=1.0):
    """Equal but for rounding at the size of the values."""
    assert actual.count == pytest.approx(expected.count, rel=1e-12)
    np.testing.assert_allclose(
        actual.mean, expected.mean, rtol=1e-13, atol=1e-14 * scale
    )
    np.testing.assert_allclose(
        actual.variance, expected.variance, rtol=1e-9, atol=1e-18 * scale**2
    )


@quick
@given(seed=seeds, location=locations)
def test_from_values_gives_mean_and_biased_variance(seed, location):
    x = sample(seed, location=location)
    moments = Moments.from_values(x)
    assert moments.count.tolist() == [60] * moments.mean.size
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(moments.variance, x.var(axis=0, ddof=0), rtol=1e-9)
    np.testing.assert_allclose(moments.m2, moments.variance * 60, rtol=1e-13)


def test_all_axes_but_the_last_are_elements():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    moments = Moments.from_values(x)
    assert (moments.count == 24).all()
    np.testing.assert_allclose(moments.mean, x.mean(axis=(0, 1, 2)), atol=1e-15)
    np.testing.assert_allclose(moments.variance, x.var(axis=(0, 1, 2)), rtol=1e-13)


def test_statistics_are_mean_and_variance():
    moments = Moments.from_values([[1.0], [5.0]])
    assert isinstance(moments.statistics, Statistics)
    assert moments.statistics.mean.tolist() == [3.0]
    assert moments.statistics.variance.tolist() == [4.0]


@pytest.mark.parametrize("location", [1e4, 1e6])
def test_large_mean_costs_no_digit_of_the_variance(location):
    # Sixteenths: exact in float32 even at 1e6, so the variance is known exactly.
    offsets = np.random.default_rng(1).integers(-40, 41, size=(5000, 1)) / 16
    x = (location + offsets).astype(np.float32)
    parts = np.array_split(x, 7)
    for moments in (Moments.from_values(x), pool(map(Moments.from_values, parts))):
        np.testing.assert_allclose(moments.variance, offsets.var(axis=0), rtol=1e-10)
    naive = np.mean(x * x) - np.mean(x) ** 2
    assert abs(naive / offsets.var() - 1) > 0.01


@pytest.mark.parametrize(
    "moments",
    [
        Moments.empty(3),
        Moments.from_values(np.ones((0, 3))),
        Moments.from_sums(0, shift=np.zeros(3), sum1=np.zeros(3), sum2=np.zeros(3)),
    ],
    ids=["empty", "no values", "no sums"],
)
def test_without_weight_the_statistics_are_undefined(moments):
    assert moments.is_empty
    assert moments.m2.tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(moments.statistics).all()
    assert np.shape(moments.statistics) == (2, 3)


def test_zero_channels_are_allowed():
    assert Moments.from_values(np.ones((4, 0))).statistics.mean.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_that_count_show_in_their_channel_alone(bad):
    x = sample(5)
    clean = Moments.from_values(x)
    x[7, 1] = bad
    poisoned = Moments.from_values(x)
    assert np.isfinite(poisoned.variance).tolist() == [True, False, True]
    assert np.isfinite(poisoned.merge(clean).variance).tolist() == [True, False, True]


@quick
@given(seed=seeds, location=locations, offset=st.floats(-3, 3))
def test_from_sums_does_not_depend_on_the_shift(seed, location, offset):
    x = sample(seed, location=location)
    w = np.random.default_rng(seed).uniform(0.1, 2, size=60)
    shift = location + offset
    sums = w @ (x - shift), w @ (x - shift) ** 2
    np.testing.assert_allclose(
        Moments.from_sums(w.sum(), shift, *sums).variance,
        np.average(np.square(x - np.average(x, axis=0, weights=w)), axis=0, weights=w),
        rtol=1e-9,
    )
    np.testing.assert_allclose(
        Moments.from_sums(w.sum(), shift, *sums).mean,
        np.average(x, axis=0, weights=w),
        rtol=1e-12,
        atol=1e-12,
    )


def test_variance_never_becomes_negative_by_rounding():
    x = np.full(10, 0.1)
    sum1, sum2 = x.sum(), (x**2).sum()
    candidates = [sum2, np.nextafter(sum1**2 / 10, 0)]
    assert sum1 * (sum1 / 10) > candidates[1]
    for total in candidates:
        assert Moments.from_sums(10, [0.0], [sum1], [total]).m2[0] >= 0


@quick
@given(
    seed=seeds,
    location=locations,
    cuts=st.lists(st.integers(0, 60), max_size=12).map(sorted),
)
def test_pooling_does_not_depend_on_the_split(seed, location, cuts):
    x = sample(seed, location=location)
    parts = [Moments.from_values(part) for part in np.split(x, cuts)]
    assert_same(pool(parts), Moments.from_values(x), scale=10 + abs(location))


@pytest.mark.parametrize("size", [1, 2, 4, 7, 16, 32, 60])
def test_pooling_counts_the_short_last_batch_by_its_size(size):
    x = sample(6, location=1e4)
    batches = (x[start : start + size] for start in range(0, 60, size))
    moments = pool(map(Moments.from_values, batches))
    assert moments.count.tolist() == [60] * moments.mean.size
    np.testing.assert_allclose(moments.variance, x.var(axis=0), rtol=1e-9)


@quick
@given(seed=seeds, location=locations, sizes=st.tuples(*[st.integers(0, 30)] * 3))
def test_merge_is_associative_and_commutative(seed, location, sizes):
    scale = 10 + abs(location)
    parts = np.split(sample(seed, size=90, location=location), np.cumsum(sizes))[:3]
    # Far apart, so that the distance of the means is most of the variance.
    a, b, c = (
        Moments.from_values(part + 100 * number) for number, part in enumerate(parts)
    )
    assert_same(a.merge(b), b.merge(a), scale=scale)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), scale=scale)


@pytest.mark.parametrize("mean", [np.nan, np.inf, 7.0])
def test_merging_an_empty_part_changes_nothing(mean):
    part = Moments.from_values(sample(7))
    empty = Moments(np.zeros(3), np.full(3, mean), np.zeros(3))
    for merged in (part.merge(empty), empty.merge(part)):
        for now, before in zip(vars(merged).values(), vars(part).values(), strict=True):
            np.testing.assert_array_equal(now, before)
    assert empty.merge(Moments.empty(3)).is_empty


def test_channels_are_counted_each_for_itself():
    x = sample(11)
    hidden = Moments.from_sums([0, 60, 30], np.zeros(3), [0, 6, 30], [0, 6, 60])
    assert hidden.count.tolist() == [0, 60, 30]
    assert np.isnan(hidden.mean[0])
    np.testing.assert_allclose(hidden.mean[1:], [0.1, 1.0])
    whole = hidden.merge(Moments.from_values(x))
    assert whole.count.tolist() == [60, 120, 90]
    np.testing.assert_allclose(whole.mean[0], x[:, 0].mean())
    np.testing.assert_allclose(whole.mean[2], (30 + x[:, 2].sum()) / 90)


def test_pool_of_one_part_is_that_part():
    part = Moments.from_values(sample(8))
    assert pool(iter([part])) is part


def test_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="Received: ") as error:
        pool(iter(()))
    assert str(error.value) == (
        "There is nothing to pool. Received: moments=[]. "
        "Pass the moments of at least one batch."
    )


def test_moments_are_immutable():
    with pytest.raises(AttributeError):
        Moments.empty(1).count = 1.0


def test_pool_of_batches_is_the_pool_of_each():
    rng = np.random.default_rng(0)
    parts = [Moments.from_values(rng.normal(i, 1 + i, size=(i, 3))) for i in (1, 5, 9)]
    together = pool_batches(
        np.array([0, 1, 5, 9]),
        np.stack([np.full(3, np.nan), *(part.mean for part in parts)]),
        np.stack([np.full(3, np.nan), *(part.variance for part in parts)]),
    )
    expected = pool(parts)
    assert (together.count == expected.count).all()
    np.testing.assert_allclose(together.mean, expected.mean)
    np.testing.assert_allclose(together.m2, expected.m2)


def test_pool_of_empty_batches_is_empty():
    nothing = pool_batches(np.zeros(2), np.zeros((2, 3)), np.zeros((2, 3)))
    assert nothing.is_empty
    assert nothing.mean.shape == (3,)


@quick
@given(seed=seeds, replicas=st.integers(1, 5))
def test_statistics_of_replicas_pool_to_those_of_all_their_values(seed, replicas):
    values = sample(seed, size=12 * replicas)
    each = [Moments.from_values(part).statistics for part in np.split(values, replicas)]
    whole = Moments.from_values(values).statistics
    for actual, expected in zip(pool_replicas(each), whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_statistics_with_a_nan_are_not_finite():
    one = Statistics(np.zeros(2), np.ones(2))
    assert is_finite([one, one])
    assert not is_finite([one, Statistics(np.array([0.0, np.nan]), np.ones(2))])

"""How single batches differ: against brute force, and apart from drift."""

import math

import numpy as np
import pytest

from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.scatter import (
    MIN_BATCHES,
    Scatter,
    larger,
    rounding_of,
    scatter,
    scatter_of_runs,
)

RNG = np.random.default_rng(0)


def batches(means, variances=None):
    means = np.asarray(means, float)
    if variances is None:
        variances = np.ones_like(means)
    return Statistics(means, np.asarray(variances, float))


def test_scatter_is_the_sample_variance_of_the_means():
    means = RNG.normal(size=(6, 3))
    variances = RNG.uniform(1, 2, size=(6, 3))
    found = scatter(batches(means, variances), 0.0)
    unit = variances.mean(axis=0)
    assert found.mean == pytest.approx(np.mean(means.var(axis=0, ddof=1) / unit))
    spread = variances.var(axis=0, ddof=1) / unit**2
    assert found.variation == pytest.approx(math.sqrt(spread.mean()))
    usual = np.quantile(variances, 0.75, axis=0)
    assert found.dominance == pytest.approx((variances.max(axis=0) / usual).max())


def test_random_batches_scatter_by_one_over_their_size():
    x = RNG.normal(size=(2000, 16, 4))
    each = batches(x.mean(axis=1), x.var(axis=1))
    expected = 1 / 15  # The biased variance within is smaller by 15/16.
    assert scatter(each, 0.0).mean == pytest.approx(expected, rel=0.1)
    run = [batches(*(part[i : i + 9] for part in each)) for i in range(0, 1800, 9)]
    assert scatter_of_runs(run, 0.0).mean == pytest.approx(expected, rel=0.35)


def test_drift_is_no_difference_between_scatter_of_runs():
    steady = np.arange(9.0)[:, None]
    assert scatter_of_runs([batches(steady)], 0.0).mean == 0
    walk = np.cumsum(RNG.normal(size=(9, 2000)), axis=0)
    assert scatter_of_runs([batches(walk)], 0.0).mean < 0.5


def test_batches_that_alternate_differ_in_full():
    means = np.array([0.0, 2.0] * 4)[:, None]
    assert scatter_of_runs([batches(means)], 0.0).mean == 4.0


def test_a_window_that_no_run_explains_is_dominated_by_a_few():
    run = batches(np.zeros((8, 2)))
    assert scatter_of_runs([run], 0.0).dominance == 1
    window = Statistics(np.zeros(2), np.array([1.0, 90.0]))
    assert scatter_of_runs([run], 0.0, windows=window).dominance == 90


def test_too_few_batches_and_wild_ones_say_nothing():
    few = batches(np.zeros((MIN_BATCHES - 1, 2)))
    wild = batches(np.full((8, 2), np.nan))
    for each in (few, wild):
        assert scatter(each, 0.0) is None
        assert scatter_of_runs([each], 0.0) is None


def test_rounding_is_taken_off():
    means = np.array([0.0, 2.0, 0.0, 2.0])[:, None]
    plain = scatter_of_runs([batches(means)], 0.0).mean
    less = scatter_of_runs([batches(means)], 0.0, rounding=1.0).mean
    assert less == pytest.approx(plain - 1)
    assert scatter_of_runs([batches(means)], 0.0, rounding=9.0).mean == 0
    far = Statistics(np.full(3, 1e4), np.ones(3))
    error = 2.0**-24 * 1e4 / 0.01
    assert rounding_of(far, 0.0, 0.99) == pytest.approx(4 * error**2)
    assert rounding_of(far, 0.0, 1.0) == math.inf


def test_the_larger_of_two_is_taken_figure_by_figure():
    one, other = Scatter(1.0, 2.0, 3.0), Scatter(3.0, 1.0, 2.0)
    assert larger(one, other) == Scatter(3.0, 2.0, 3.0)
    assert larger(one, None) is one
    assert larger(None, other) is other
    assert larger(None, None) is None

"""The lag is the RMS difference of two normalised outputs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bn_callbacks.statistics.lag import channel_lags, distance, lag
from bn_callbacks.statistics.moments import Moments, Statistics

pytestmark = pytest.mark.filterwarnings("error")

quick = settings(deadline=None, max_examples=100)
statistics = st.builds(
    Statistics,
    arrays(np.float64, 4, elements=st.floats(-1e3, 1e3)),
    arrays(np.float64, 4, elements=st.floats(0, 1e3)),
)
epsilons = st.sampled_from([1e-3, 1e-5, 1.0])


def of(mean, variance):
    return Statistics(np.atleast_1d(mean) * 1.0, np.atleast_1d(variance) * 1.0)


def mean_shift(batch, moving, epsilon):
    return distance(batch, moving, epsilon).mean_shift


def scale_ratio(batch, moving, epsilon):
    return distance(batch, moving, epsilon).scale_ratio


@quick
@given(seed=st.integers(0, 2**32 - 1), moving=statistics)
def test_lag_is_the_rms_difference_of_training_and_inference_output(seed, moving):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 4)) * rng.uniform(0.5, 5, 4) + rng.normal(size=4)
    batch = Moments.from_values(x).statistics
    moving = Statistics(moving.mean, moving.variance + 0.01)
    training = (x - batch.mean) / np.sqrt(batch.variance)
    inference = (x - moving.mean) / np.sqrt(moving.variance)
    rms = np.sqrt(np.mean((inference - training) ** 2))
    assert lag(batch, moving, epsilon=0.0) == pytest.approx(rms, rel=1e-9)


@quick
@given(batch=statistics, moving=statistics, epsilon=epsilons)
def test_every_figure_is_its_formula(batch, moving, epsilon):
    sigma_b = np.sqrt(batch.variance + epsilon)
    sigma_m = np.sqrt(moving.variance + epsilon)
    shift = (batch.mean - moving.mean) / sigma_m
    ratio = sigma_b / sigma_m
    assert lag(batch, moving, epsilon) == pytest.approx(
        np.sqrt(np.mean(shift**2 + (ratio - 1) ** 2))
    )
    assert channel_lags(batch, moving, epsilon) == pytest.approx(
        np.sqrt(shift**2 + (ratio - 1) ** 2)
    )
    assert mean_shift(batch, moving, epsilon) == pytest.approx(
        np.sqrt(np.mean(shift**2))
    )
    assert scale_ratio(batch, moving, epsilon) == pytest.approx(
        np.prod(ratio) ** (1 / 4)
    )
    assert distance(batch, moving, epsilon).lag == lag(batch, moving, epsilon)


@quick
@given(batch=statistics, epsilon=epsilons)
def test_statistics_that_agree_have_no_lag(batch, epsilon):
    assert lag(batch, batch, epsilon) == 0.0
    assert mean_shift(batch, batch, epsilon) == 0.0
    assert scale_ratio(batch, batch, epsilon) == 1.0


def test_lag_is_in_units_of_the_moving_statistics():
    assert lag(of(3, 4), of(0, 1), 0.0) == pytest.approx(math.sqrt(3**2 + 1))
    assert lag(of(0, 1), of(3, 4), 0.0) == pytest.approx(math.sqrt(1.5**2 + 0.5**2))
    assert scale_ratio(of(3, 4), of(0, 1), 0.0) == pytest.approx(2)
    assert scale_ratio(of(0, 1), of(3, 4), 0.0) == pytest.approx(1 / 2)


def test_scale_ratio_is_a_geometric_mean():
    assert scale_ratio(of([0, 0], [16, 1]), of([0, 0], [1, 16]), 0.0) == pytest.approx(
        1
    )


def test_epsilon_keeps_constant_channels_quiet():
    assert lag(of(0, 0), of(0, 1e-9), 1e-3) < 1e-6
    assert mean_shift(of(1, 0), of(0, 0), 1.0) == 1.0


def test_negative_variance_counts_as_zero():
    for measure in (lag, mean_shift, scale_ratio):
        negative = measure(of(1, -1e-3), of(0, -1e-9), 1e-3)
        assert negative == measure(of(1, 0), of(0, 0), 1e-3)


def test_without_channels_nothing_lags():
    none = Statistics(np.zeros(0), np.zeros(0))
    assert lag(none, none, 1e-3) == 0.0
    assert mean_shift(none, none, 1e-3) == 0.0
    assert scale_ratio(none, none, 1e-3) == 1.0


@pytest.mark.parametrize("measure", [lag, mean_shift, scale_ratio])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", range(4))
def test_any_non_finite_statistic_makes_it_infinite(measure, bad, position):
    parts = np.ones((4, 2))
    assert math.isfinite(measure(Statistics(*parts[:2]), Statistics(*parts[2:]), 1e-3))
    parts[position, 1] = bad
    assert measure(Statistics(*parts[:2]), Statistics(*parts[2:]), 1e-3) == math.inf


@pytest.mark.parametrize("measure", [lag, mean_shift, scale_ratio])
def test_division_by_a_zero_deviation_makes_it_infinite(measure):
    assert measure(of(0, 0), of(0, 0), 0.0) == math.inf


def test_scale_ratio_of_a_constant_batch_is_zero():
    assert scale_ratio(of(0, 0), of(0, 1), 0.0) == 0.0


def test_huge_finite_statistics_do_not_warn():
    assert lag(of(1e300, 1), of(-1e300, 1), 1e-3) == math.inf
    assert mean_shift(of(1e308, 1), of(-1e308, 1), 1e-3) == math.inf


def test_results_are_plain_floats():
    for measure in (lag, mean_shift, scale_ratio):
        assert type(measure(of(1, 1), of(0, 1), 1e-3)) is float

"""Noise and drift from windows, on synthetic streams whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bn_callbacks.statistics.causes import HEALTHY
from bn_callbacks.statistics.diagnosis import diagnose
from bn_callbacks.statistics.evidence import Evidence
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import window_noise, window_statistic
from bn_callbacks.statistics.stream import Stream, observe, recurrence

CHANNELS = 16


def normal_batches(rng, count, size, channels=CHANNELS):
    """Means and biased variances of batches of independent normal values."""
    means = rng.normal(scale=size**-0.5, size=(count, channels))
    variances = rng.chisquare(size - 1, size=(count, channels)) / size
    return means, variances


def average(batches, momentum, start=(0.0, 1.0)):
    """The moving averages after each batch, the start included."""
    series = []
    for values, first in zip(batches, start, strict=True):
        now = np.full(values.shape[1], first)
        path = [now]
        for batch in values:
            now = momentum * now + (1 - momentum) * batch
            path.append(now)
        series.append(np.array(path))
    return series


def windows_of(series, momentum, length):
    """What a monitor recovers that reads every `length` updates."""
    ends = range(0, len(series[0]) - length, length)
    return Statistics(
        *(
            np.array(
                [window_statistic(x[i], x[i + length], momentum, length) for i in ends]
            )
            for x in series
        )
    )


def last(windows, count):
    return Statistics(windows.mean[-count:], windows.variance[-count:])


def evidence(batches, momentum, length, start=(0.0, 1.0), **more):
    series = average(batches, momentum, start)
    windows = windows_of(series, momentum, length)
    return Evidence(
        path="bn",
        momentum=momentum,
        epsilon=1e-3,
        moving=Statistics(series[0][-1], series[1][-1]),
        batch=Statistics(windows.mean[-1], windows.variance[-1]),
        updates=len(series[0]) - 1,
        start=Statistics(series[0][0], series[1][0]),
        windows=last(windows, 16),
        window_updates=length,
        window_share=window_noise(momentum, length),
        **more,
    )


def stream_of(batches, momentum, length):
    windows = windows_of(average(batches, momentum), momentum, length)
    return observe(windows, 0.0, window_noise(momentum, length), length)


@pytest.mark.parametrize(("momentum", "length"), [(0.99, 10), (0.9, 5), (0.0, 3)])
@pytest.mark.parametrize("size", [8, 128])
def test_noise_of_random_batches_is_their_sampling_variance(momentum, length, size):
    rng = np.random.default_rng(0)
    streams = [
        stream_of(normal_batches(rng, 16 * length, size), momentum, length)
        for _ in range(20)
    ]
    # Of one batch's mean 1/n, of its σ 1/(2n), in units of its own variance 1 − 1/n.
    assert np.mean([s.mean_noise for s in streams]) == pytest.approx(
        1 / (size - 1), rel=0.2
    )
    assert np.mean([s.scale_noise for s in streams]) == pytest.approx(
        0.5 / (size - 1), rel=0.25
    )
    # Of a batch's variance, sqrt(2/n): far from what outliers cause.
    assert np.mean([s.variation for s in streams]) == pytest.approx(
        np.sqrt(2 / (size - 1)), rel=0.2
    )


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("size", [2, 8, 32, 256])
def test_stationary_random_batches_raise_no_alarm(momentum, size):
    """At most 1 % false alarms; 12 settings of 84 runs are over 1,000."""
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(84):
        batches = normal_batches(rng, 160, size, channels=4)
        # A run that began with the statistics that batches have.
        start = (0.0, 1 - 1 / size)
        seen = evidence(batches, momentum, 10, start, batch_size=max(size, 3))
        verdicts.append(diagnose(seen).cause)
    expected = {HEALTHY}
    if momentum == 0.9 and size == 2:
        # Honest noise: s²·(1 − m)/(1 + m) is above the threshold here.
        expected.add("noisy")
    assert sum(verdict not in expected for verdict in verdicts) <= 0.01 * 84


def test_autocorrelated_batches_show_as_drift_not_as_noise():
    rng = np.random.default_rng(0)
    means, variances = normal_batches(rng, 320, 64)
    shift = np.zeros(CHANNELS)
    for i in range(len(means)):
        shift = 0.99 * shift + rng.normal(scale=0.05, size=CHANNELS)
        means[i] += shift
    stream = stream_of((means, variances), 0.99, 10)
    assert stream.drift_lag(0.99) > 3 * stream.average_noise(0.99)


def test_grouped_batches_show_as_noise_far_above_random_sampling():
    rng = np.random.default_rng(0)
    means, variances = normal_batches(rng, 160, 64)
    means += rng.normal(size=means.shape)
    stream = stream_of((means, variances), 0.9, 5)
    assert 63 * stream.mean_noise == pytest.approx(64, rel=0.3)


def test_heavy_tails_show_in_the_variation_of_variances():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(320, 32, CHANNELS))
    values[rng.random(values.shape) < 0.001] *= 100
    stream = stream_of((values.mean(1), values.var(1)), 0.9, 5)
    assert stream.variation > 3


@pytest.mark.parametrize("speed", [0.003, 0.01])
def test_steady_drift_is_measured_and_its_lag_predicted(speed):
    rng = np.random.default_rng(0)
    means, variances = normal_batches(rng, 1000, 64)
    means += speed * np.arange(1000)[:, None]
    series = average((means, variances), 0.99)
    windows = last(windows_of(series, 0.99, 20), 16)
    stream = observe(windows, 0.0, window_noise(0.99, 20), 20)
    truth = speed * 999 - series[0][-1].mean()
    assert truth == pytest.approx(speed * 99, rel=0.1)
    assert stream.power == pytest.approx(2, abs=0.3)
    assert stream.drift_lag(0.99) == pytest.approx(truth, rel=0.5)


def simulated_error(momentum, speed, step, noise, rng):
    """RMS distance of the average from what it follows, after the start has gone."""
    count = 3000
    walk = np.cumsum(rng.normal(scale=step, size=count)) if step else np.zeros(count)
    truth = speed * np.arange(count) + walk
    now, squares = truth[0], []
    for i in range(count):
        batch = truth[i] + rng.normal(scale=noise)
        now = momentum * now + (1 - momentum) * batch
        if i > count // 2:
            squares.append((now - truth[i]) ** 2)
    return np.sqrt(np.mean(squares))


@pytest.mark.parametrize(
    ("speed", "step"), [(0.001, 0.0), (0.01, 0.0), (0.0, 0.01), (0.0, 0.05)]
)
def test_best_momentum_is_as_good_as_the_best_of_a_search(speed, step):
    noise = 0.2
    stream = Stream(
        mean_noise=noise**2,
        scale_noise=0.0,
        drift=speed**2 if speed else step**2,
        power=2.0 if speed else 1.0,
        variation=0.1,
    )
    errors = {
        m: simulated_error(m, speed, step, noise, np.random.default_rng(0))
        for m in 1 - np.geomspace(1, 0.001, 25)
    }
    best = stream.best_momentum()
    found = simulated_error(best, speed, step, noise, np.random.default_rng(0))
    assert found < 1.1 * min(errors.values())


@given(noise=st.floats(0, 4), drift=st.floats(0, 4), power=st.floats(1, 2))
def test_no_momentum_has_a_smaller_error_than_the_best(noise, drift, power):
    stream = Stream(noise, 0.0, drift, power, variation=0.1)

    def error(momentum):
        lag, noise = stream.drift_lag(momentum), stream.average_noise(momentum)
        return lag**2 + noise**2

    least = min(error(m) for m in 1 - np.geomspace(1, 0.001, 50))
    assert error(stream.best_momentum()) <= least * 1.01 + 1e-12


def test_best_momentum_keeps_to_the_bound_that_forgets_the_start():
    still = Stream(0.1, 0.0, drift=0.0, power=1.0, variation=0.1)
    assert still.best_momentum(0.95) == pytest.approx(0.95)
    assert still.drift_lag(1.0) == 0.0
    assert Stream(0.1, 0.0, 1.0, 1.0, 0.1).drift_lag(1.0) == np.inf


def test_too_few_windows_or_infinite_ones_say_nothing():
    windows = Statistics(np.zeros((5, 2)), np.ones((5, 2)))
    assert observe(last(windows, 3), 1e-3, 0.1, 10) is None
    assert observe(last(windows, 4), 1e-3, 0.1, 10) == Stream(0, 0, 0, 1, 0)
    windows.mean[-1] = np.nan
    assert observe(windows, 1e-3, 0.1, 10) is None


def epochs(ordered, rng, count=5):
    """Windows of two epochs whose means vary by 2 σ: in the same order, or not."""
    first = rng.normal(scale=2.0, size=(count, 1000))
    second = first if ordered else rng.normal(scale=2.0, size=first.shape)
    noise = rng.normal(scale=0.1, size=(2, *first.shape))
    variance = np.full(first.shape, 4.0)
    return [
        Statistics(2.0 * mean + more, variance)
        for mean, more in zip((first, second), noise, strict=True)
    ]


def test_a_pattern_that_epochs_repeat_is_measured_in_batch_variances():
    before, after = epochs(True, np.random.default_rng(0))
    # The variance of 5 windows is 4/5 of that of which they are a sample.
    assert recurrence(before, after, 0.0) == pytest.approx(4 * 4 / 5, rel=0.1)


def test_what_changes_between_epochs_is_no_pattern():
    before, after = epochs(False, np.random.default_rng(0))
    assert recurrence(before, after, 0.0) == 0


@pytest.mark.parametrize(("before", "after"), [(3, 3), (5, 4), (0, 5), (0, 0)])
def test_epochs_of_few_or_unequal_windows_are_not_compared(before, after):
    windows = epochs(True, np.random.default_rng(0))
    shorter = [
        Statistics(part.mean[:count], part.variance[:count])
        for part, count in zip(windows, (before, after), strict=True)
    ]
    assert recurrence(*shorter, 0.0) is None

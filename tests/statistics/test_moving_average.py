"""Each formula of the moving average against the loop it abbreviates."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bn_callbacks.statistics.moving_average import (
    average_noise,
    debias,
    new_weight,
    start_weight,
    suggest_momentum,
    updates_to_forget,
    window_noise,
    window_statistic,
)

pytestmark = pytest.mark.filterwarnings("error")

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
lengths = st.one_of(st.integers(1, 60), st.integers(1, 10_000))
moving = st.sampled_from([0.0, 0.9, 0.99, 0.999, 0.9999])
momenta = st.one_of(moving, st.just(1.0))


def average(batches, momentum, start):
    """The readings of a moving average before and after each batch, as Keras does."""
    readings = [start]
    for batch in batches:
        readings.append(readings[-1] * momentum + batch * (1 - momentum))
    return readings


def window_weights(momentum, updates):
    weights = float(momentum) ** np.arange(updates)[::-1]
    return weights / weights.sum()


def rounding(momentum, scale):
    """What float64 loses in the loop, magnified by the inversion."""
    return 8 * np.finfo(np.float64).eps * scale / (1 - momentum)


@quick
@given(seed=seeds, momentum=moving, updates=lengths, location=st.floats(-100, 100))
@example(seed=0, momentum=0.9999, updates=1, location=0.0)
@example(seed=0, momentum=0.9999, updates=10_000, location=0.0)
def test_window_statistic_recovers_weighted_average_of_batches(
    seed, momentum, updates, location
):
    rng = np.random.default_rng(seed)
    batches = location + rng.normal(size=(updates, 3))
    old = rng.normal(size=3)
    new = average(batches, momentum, old)[-1]
    np.testing.assert_allclose(
        window_statistic(old, new, momentum, updates),
        window_weights(momentum, updates) @ batches,
        rtol=0,
        atol=rounding(momentum, abs(location) + 5),
    )


@quick
@given(seed=seeds, momentum=moving, cut=st.integers(1, 99))
def test_windows_can_be_read_at_any_step_of_a_run(seed, momentum, cut):
    batches = np.random.default_rng(seed).normal(size=(100, 2))
    readings = average(batches, momentum, np.zeros(2))
    np.testing.assert_allclose(
        window_statistic(readings[cut], readings[100], momentum, 100 - cut),
        window_weights(momentum, 100 - cut) @ batches[cut:],
        rtol=0,
        atol=rounding(momentum, 5),
    )


@pytest.mark.parametrize(
    ("momentum", "updates", "error"),
    [
        (0.99, 10, 2e-6),
        (0.99, 50, 2e-6),
        (0.999, 20, 2e-5),
        (0.99, 1, 1e-5),
        (0.999, 1, 7e-5),
    ],
)
def test_readings_stored_in_float32_recover_the_window(momentum, updates, error):
    rng = np.random.default_rng(7)
    batches = (2 + rng.normal(size=(500 + updates, 256))).astype(np.float32)
    m, rest = np.float32(momentum), np.float32(1 - momentum)
    readings = [np.zeros(256, np.float32)]
    for batch in batches:
        readings.append(readings[-1] * m + batch * rest)
    assert readings[-1].dtype == np.float32
    window = window_statistic(readings[500], readings[-1], momentum, updates)
    expected = window_weights(momentum, updates) @ batches[500:].astype(np.float64)
    relative = np.linalg.norm(window - expected) / np.linalg.norm(expected)
    assert relative < 3 * error
    assert relative > error / 30, "this accuracy is none of float32: a wrong test"


def test_window_of_constant_batches_is_that_constant():
    for momentum in (0.0, 0.9, 0.9999):
        new = average([5.0] * 20, momentum, 1.0)[-1]
        assert window_statistic(1.0, new, momentum, 20) == pytest.approx(5.0, rel=1e-11)


def test_window_statistic_forgets_a_huge_old_value_without_its_rounding():
    assert window_statistic([1e30], [1e-20], 0.0, 1).tolist() == [1e-20]
    assert window_statistic([1e30], [1e-20], 0.9, 10_000).tolist() == [1e-20]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_window_statistic_passes_non_finite_readings_on_quietly(bad):
    window = window_statistic([bad, 0.0], [bad, 1.0], 0.5, 1)
    assert not np.isfinite(window[0])
    assert window[1] == 2.0


@pytest.mark.parametrize(("momentum", "updates"), [(1.0, 5), (0.9, 0), (0.0, 0)])
def test_window_statistic_needs_an_update(momentum, updates):
    with pytest.raises(ValueError, match="Received: ") as error:
        window_statistic(0.0, 1.0, momentum, updates)
    assert str(error.value) == (
        "No batch entered the moving average, so nothing can be read from it. "
        f"Received: momentum={momentum}, updates={updates}. "
        "Wait for an update, and leave out layers whose momentum is 1."
    )


@quick
@given(momentum=momenta, updates=st.one_of(st.just(0), lengths))
def test_start_weight_is_what_a_loop_without_batches_leaves(momentum, updates):
    left = average([0.0] * updates, momentum, 1.0)[-1]
    assert start_weight(momentum, updates) == pytest.approx(left, rel=1e-9)


@quick
@given(momentum=momenta, updates=st.one_of(st.just(0), st.integers(1, 300)))
@example(momentum=0.9999, updates=1)
@example(momentum=1 - 1e-12, updates=3)
def test_new_weight_is_exact(momentum, updates):
    exact = 1 - Fraction(momentum) ** updates
    weight = new_weight(momentum, updates)
    assert weight == pytest.approx(float(exact), rel=2e-15, abs=0)


def test_weights_before_the_first_update_are_one_and_zero():
    for momentum in (0.0, 0.5, 1.0):
        assert start_weight(momentum, 0) == 1.0
        assert math.copysign(1, new_weight(momentum, 0)) == 1.0
        assert new_weight(momentum, 0) == 0.0


def test_a_hundred_steps_at_99_percent_reach_63_4_percent():
    assert new_weight(0.99, 100) == pytest.approx(0.634, abs=5e-4)


@quick
@given(seed=seeds, momentum=moving, updates=lengths, start=st.sampled_from([0.0, 1.0]))
def test_debias_removes_what_is_left_of_the_start(seed, momentum, updates, start):
    batches = np.random.default_rng(seed).normal(2.0, size=(updates, 3))
    value = average(batches, momentum, np.full(3, start))[-1]
    np.testing.assert_allclose(
        debias(value, np.full(3, start), start_weight(momentum, updates)),
        window_weights(momentum, updates) @ batches,
        rtol=0,
        atol=rounding(momentum, 7),
    )


def test_debias_without_weight_of_the_start_changes_nothing():
    assert debias([3.0, -1e-20], 1e30, 0.0).tolist() == [3.0, -1e-20]


@pytest.mark.parametrize("weight", [1.0, -0.1, 1.5, math.nan])
def test_debias_needs_more_than_the_start(weight):
    with pytest.raises(ValueError, match="Received: ") as error:
        debias(1.0, 0.0, weight)
    assert str(error.value) == (
        "The start value can only be taken out of an average that holds more "
        f"than it. Received: weight={weight}. "
        "Pass `start_weight(momentum, updates)` after at least one update."
    )


@quick
@given(momentum=momenta, updates=lengths)
@example(momentum=1 - 1e-12, updates=10)
def test_window_noise_is_the_sum_of_squared_weights(momentum, updates):
    squares = float(np.sum(window_weights(momentum, updates) ** 2))
    assert window_noise(momentum, updates) == pytest.approx(squares, rel=1e-9)
    assert 1 / updates - 1e-12 <= window_noise(momentum, updates) <= 1 + 1e-12


def test_window_noise_becomes_that_of_the_average_in_a_long_window():
    for momentum in (0.0, 0.9, 0.99):
        long = window_noise(momentum, 10_000)
        assert long == pytest.approx(average_noise(momentum), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_average_noise_is_the_variance_of_a_simulated_average(momentum):
    batches = np.random.default_rng(11).normal(size=(300, 20_000))
    simulated = average(batches, momentum, np.zeros(20_000))[-1].var()
    assert average_noise(momentum) == pytest.approx(simulated, rel=0.05)


@pytest.mark.parametrize(("momentum", "updates"), [(0.9, 1), (0.9, 8), (0.99, 30)])
def test_window_noise_is_the_variance_of_simulated_windows(momentum, updates):
    batches = np.random.default_rng(12).normal(size=(updates, 20_000))
    new = average(batches, momentum, np.ones(20_000))[-1]
    simulated = window_statistic(1.0, new, momentum, updates).var()
    assert window_noise(momentum, updates) == pytest.approx(simulated, rel=0.05)


def test_average_noise_spans_zero_to_one():
    assert (average_noise(0.0), average_noise(1.0)) == (1.0, 0.0)
    assert average_noise(0.99) == pytest.approx(0.01 / 1.99)


@pytest.mark.parametrize(
    ("momentum", "weight", "updates"),
    [
        (0.99, 0.01, 459),
        (0.999, 0.01, 4603),
        (0.9, 0.5, 7),
        (0.5, 0.125, 3),
        (0.1, 0.01, 2),
        (0.8, 0.64, 2),
        (0.0, 0.01, 1),
        (0.001, 1 - 1e-12, 1),
        (1.0, 0.01, None),
    ],
)
def test_updates_to_forget(momentum, weight, updates):
    assert updates_to_forget(momentum, weight) == updates


@quick
@given(momentum=st.floats(0.01, 0.9999), weight=st.floats(1e-6, 0.99))
def test_updates_to_forget_are_just_enough(momentum, weight):
    updates = updates_to_forget(momentum, weight)
    assert momentum**updates <= weight * (1 + 1e-8)
    assert momentum ** (updates - 1) > weight * (1 - 1e-8)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5, math.nan])
def test_updates_to_forget_refuses_a_weight_out_of_range(weight):
    with pytest.raises(ValueError, match="Received: ") as error:
        updates_to_forget(0.9, weight)
    assert str(error.value) == (
        "The weight that may be left of the start value must lie between 0 and 1, "
        f"both excluded. Received: weight={weight}. Pass for instance 0.01."
    )


@pytest.mark.parametrize(
    ("steps", "momentum"),
    [
        (1, 0.5),
        (6, 0.05 ** (1 / 6)),
        (20, 0.05 ** (1 / 20)),
        (50, 0.05 ** (1 / 20)),
        (100, 0.9),
        (1_000, 0.99),
        (10_000, 0.999),
        (10**6, 0.999),
    ],
)
def test_suggested_momentum_grows_with_the_run(steps, momentum):
    assert suggest_momentum(steps) == momentum


@quick
@given(steps=st.integers(1, 10**7))
def test_suggested_momentum_forgets_the_start(steps):
    left = start_weight(suggest_momentum(steps), steps)
    assert left < 1e-4 or (left <= 0.05 + 1e-12 and steps < 75) or steps < 5


@quick
@given(steps=st.integers(1, 20_000), more=st.integers(0, 1000))
def test_suggested_momentum_never_falls_and_is_no_noise(steps, more):
    assert 0.5 <= suggest_momentum(steps) <= suggest_momentum(steps + more) <= 0.999


@pytest.mark.parametrize("steps", [0, -3])
def test_suggest_momentum_needs_a_step(steps):
    with pytest.raises(ValueError, match="Received: ") as error:
        suggest_momentum(steps)
    assert str(error.value) == (
        "A momentum can only be suggested for a run of at least one step. "
        f"Received: steps={steps}. "
        "Pass the steps of the whole run: steps an epoch times epochs."
    )


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize(
    "call",
    [
        lambda m: start_weight(m, 1),
        lambda m: new_weight(m, 1),
        lambda m: window_statistic(0.0, 1.0, m, 1),
        lambda m: window_noise(m, 1),
        lambda m: updates_to_forget(m, 0.01),
        average_noise,
    ],
)
def test_momentum_out_of_range_is_refused(call, momentum):
    with pytest.raises(ValueError, match="Received: ") as error:
        call(momentum)
    assert str(error.value) == (
        "The momentum of a moving average must lie between 0 and 1. "
        f"Received: momentum={momentum}. "
        "Pass the layer's `momentum`, the weight of the old value."
    )


@pytest.mark.parametrize(
    ("call", "updates", "least"),
    [
        (start_weight, -1, 0),
        (new_weight, -1, 0),
        (lambda m, n: window_statistic(0.0, 1.0, m, n), -1, 0),
        (window_noise, 0, 1),
    ],
)
def test_too_few_updates_are_refused(call, updates, least):
    with pytest.raises(ValueError, match="Received: ") as error:
        call(0.9, updates)
    assert str(error.value) == (
        f"The number of updates of a moving average must be at least {least}. "
        f"Received: updates={updates}. "
        "Pass training steps times the layer's calls in each."
    )

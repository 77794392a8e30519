"""What stored statistics give away."""

import numpy as np
import pytest

from bn_callbacks.statistics.anomalies import (
    FROZEN,
    HUGE,
    HUGE_VARIANCE,
    LOW_PRECISION,
    NEGATIVE_VARIANCE,
    NEVER_UPDATED,
    NON_FINITE,
    ZERO_VARIANCE,
    find_anomalies,
)
from bn_callbacks.statistics.moments import Statistics

EPSILON = 1e-3
START = Statistics(np.zeros(4), np.ones(4))


def found(mean=(0.1, -2.0, 30.0, 0.0), variance=(0.5, 1.0, 2e-5, 900.0), **known):
    stored = Statistics(np.array(mean, float), np.array(variance, float))
    return find_anomalies(stored, **{"start": START, "epsilon": EPSILON, **known})


def names(*args, **known):
    return [suspicion.name for suspicion in found(*args, **known)]


def test_statistics_of_any_usual_scale_are_fine():
    assert names() == []


def test_the_start_values_are_never_updated_ones():
    assert names(*START) == [NEVER_UPDATED]


def test_one_value_that_moved_is_an_update():
    assert names([0, 0, 0, 1e-7], np.ones(4)) == []
    assert names(np.zeros(4), [1, 1, 1, 0.99]) == []


def test_a_start_of_its_own_is_no_update():
    start = Statistics(np.full(4, 3.0), np.full(4, 2.0))
    assert names(*start, start=start) == [NEVER_UPDATED]
    assert names(*START, start=start) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_is_counted_once(value, part):
    stored = np.ones((2, 4))
    stored[part, 1] = value
    (suspicion,) = found(*stored)
    assert suspicion.name == NON_FINITE
    assert "in 1 of 4 channels" in suspicion.text


def test_a_negative_variance_is_neither_zero_nor_finite_luck():
    (suspicion,) = found(variance=[1, -0.25, 1, -0.5])
    assert suspicion.name == NEGATIVE_VARIANCE
    assert "in 2 of 4 channels, down to -0.5." in suspicion.text


def test_a_variance_is_zero_in_comparison_to_epsilon():
    assert names(variance=[1, 1, 1, 1.01e-3 * EPSILON]) == []
    (suspicion,) = found(variance=[1, 0, 1, 1e-3 * EPSILON])
    assert suspicion.name == ZERO_VARIANCE
    assert "in 2 of 4 channels" in suspicion.text


def test_without_epsilon_only_zero_is_zero():
    assert names(variance=[1, 1, 1, 1e-30], epsilon=0.0) == []
    assert names(variance=[1, 1, 1, 0], epsilon=0.0) == [ZERO_VARIANCE]


def test_a_huge_variance_is_named_with_its_size():
    assert names(variance=[1, 1, 1, HUGE]) == []
    (suspicion,) = found(variance=[1, 1, 1, 3e8])
    assert suspicion.name == HUGE_VARIANCE
    assert "a variance of up to 3e+08 in 1 of 4 channels" in suspicion.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_names_the_policy_that_helps(dtype):
    (suspicion,) = found(dtype=dtype)
    assert suspicion.name == LOW_PRECISION
    assert f"'mixed_{dtype}'" in suspicion.text
    assert names(dtype="float64") == []


def test_frozen_layers_are_named_last():
    assert names(trainable=False) == [FROZEN]
    assert names(*START, trainable=False, dtype="float16") == [
        NEVER_UPDATED,
        LOW_PRECISION,
        FROZEN,
    ]


def test_all_that_is_wrong_is_found_the_worst_first():
    assert names(variance=[np.nan, -1, 0, 1e9]) == [
        NON_FINITE,
        NEGATIVE_VARIANCE,
        ZERO_VARIANCE,
        HUGE_VARIANCE,
    ]


def test_a_layer_without_channels_has_nothing_wrong_but_never_moved():
    assert names([], [], start=Statistics(np.zeros(0), np.ones(0))) == [NEVER_UPDATED]

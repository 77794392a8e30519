"""The table of DESIGN: what three losses say, and when a ratio counts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bn_callbacks.statistics import causes
from bn_callbacks.statistics.losses import (
    BATCH_LIMIT,
    CAUSES_OF,
    FACTS,
    FAMILIES,
    GAP_LIMIT,
    LONELY_LIMIT,
    STALE_LIMIT,
    STANDARD_ERRORS,
    Family,
    Losses,
)

SPREAD = np.array([0.99, 1.0, 1.01, 1.0])


def losses(batch, inference, recalibrated=None, spread=SPREAD):
    r = None if recalibrated is None else recalibrated * spread
    return Losses.of(batch * spread, inference * spread, r)


@pytest.mark.parametrize(
    ("b", "i", "r", "family"),
    [
        (1.0, 1.0, 1.0, Family.INNOCENT),
        (1.0, 1.24, 1.0, Family.SLIGHT),
        (1.0, 0.33, 0.33, Family.INNOCENT),  # overfitting
        (1.0, 1.29, 1.0, Family.SLIGHT),  # the largest gap of a healthy model
        (1.0, 1.0, 1.2, Family.INNOCENT),  # a little harm is chance
        (1.0, 1.0, 1.3, Family.ADAPTED),
        (1.0, 1.5, 1.0, Family.STALE),
        (1.0, 20.0, 0.9, Family.STALE),
        (1.0, 1.6, 1.25, Family.STALE),  # neither ratio counts alone
        (1.0, 1.6, 1.3, Family.BATCHES),
        (1.0, 1.05, 0.7, Family.HELPED),
        (1.0, 18.0, 17.0, Family.BATCHES),
        (1.0, 170.0, 40.0, Family.BATCHES),  # recalibrating helps in part
        (0.31, 0.07, 0.31, Family.ADAPTED),
        (1.0, 2.0, 9.0, Family.BATCHES),  # and recalibrating would harm
        (1.0, 1.1, 9.0, Family.ADAPTED),
        (1.0, math.nan, 1.0, Family.STALE),
        (math.nan, 1.0, 1.0, Family.UNKNOWN),
        (0.0, 1.0, 1.0, Family.UNKNOWN),
        (-1.0, 1.0, -1.0, Family.UNKNOWN),
        (1.0, 2.0, None, Family.STALE),
        (1.0, 1.1, None, Family.INNOCENT),
        (1.0, 1.04, 1.0, Family.INNOCENT),
        (1.0, 1.2, 1.19, Family.INNOCENT),
    ],
)
def test_each_row_of_the_table(b, i, r, family):
    assert losses(b, i, r).family is family


def test_a_ratio_counts_only_beyond_three_standard_errors_of_the_difference():
    batch = np.ones(8)
    gap = np.array([0.0, 0.2, 1.2, 0.1, 1.4, 0.0, 1.3, 0.2])
    error = gap.std(ddof=1) / math.sqrt(8)
    assert 2 * error < gap.mean() < STANDARD_ERRORS * error
    assert (1 + gap.mean()) > GAP_LIMIT
    assert Losses.of(batch, batch + gap, batch).family is Family.UNCLEAR
    # The same gap in every batch is sure.
    assert Losses.of(batch, batch + gap.mean(), batch).family is Family.STALE


def test_what_makes_batches_differ_in_both_modes_does_not_count():
    batch = np.array([0.1, 9.0, 0.3, 4.0, 0.2, 7.0])
    assert (batch + 2).mean() - batch.mean() < 3 * batch.std(ddof=1) / math.sqrt(6)
    assert Losses.of(batch, batch + 2, batch).family is Family.STALE


def test_a_single_batch_needs_more():
    assert not losses(1.0, 2.2, 1.0, np.ones(1)).exceeds("inference", "batch", 1.4)
    assert losses(1.0, LONELY_LIMIT, 1.0, np.ones(1)).family is Family.STALE


def test_losses_are_means_over_examples():
    seen = Losses.of([1.0, 3.0], [2.0, 4.0], weights=[3, 1])
    assert seen.mean("batch") == 1.5
    assert seen.mean("inference") == 2.5
    assert seen.mean("recalibrated") is None
    assert seen.gap == pytest.approx(2.5 / 1.5)
    assert seen.ratio("recalibrated", "batch") is None


@given(
    values=st.lists(st.floats(0.1, 10), min_size=6, max_size=12),
    weights=st.lists(st.floats(1, 64), min_size=4, max_size=4),
)
def test_the_standard_error_is_that_of_a_weighted_mean(values, weights):
    b, i = np.array([*values[:3], 1.0]), np.array([*values[3:6], 2.0])
    w = np.array(weights) / np.sum(weights)
    seen = Losses.of(b, i, weights=weights)
    d = i - b
    expected = math.sqrt(4 / 3 * np.sum(w**2 * (d - w @ d) ** 2))
    assert seen._standard_error(d) == pytest.approx(expected, abs=1e-12)


def test_families_are_complete_and_limits_lie_between_what_was_measured():
    assert {row.family for row in FAMILIES} == set(Family)
    assert 1.29 < GAP_LIMIT < 1.5
    assert 1.28 < STALE_LIMIT < 1.4
    assert 1.24 < BATCH_LIMIT < 4
    cured = CAUSES_OF[Family.STALE]
    assert {causes.WARMING_UP, causes.DRIFTING, causes.STALE} < cured
    assert causes.INFERENCE_MODE not in cured
    assert causes.WARMING_UP not in CAUSES_OF[Family.BATCHES]
    assert CAUSES_OF[Family.INNOCENT] == FACTS
    assert causes.NON_FINITE in FACTS
    assert not FACTS & {causes.STALE, causes.DRIFTING, causes.OUTLIERS}

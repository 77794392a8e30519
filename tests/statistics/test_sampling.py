"""The standard error of pooled statistics, against repeated sampling."""

import numpy as np
import pytest

from bn_callbacks.statistics.moments import Moments, pool
from bn_callbacks.statistics.sampling import (
    MAX_BLOCKS,
    MIN_BLOCKS,
    Blocks,
    design_effect,
    standard_error,
)

CHANNELS = 40


def batches(rng, count, size, group=0.0, span=1):
    """Normal batches; `group` is the σ of what `span` successive batches share."""
    shared = rng.normal(scale=group, size=(-(-count // span), CHANNELS)) if group else 0
    values = rng.normal(size=(count, size, CHANNELS))
    if group:
        values += np.repeat(shared, span, axis=0)[:count, None]
    return [Moments.from_values(batch) for batch in values]


def true_error(draw, mean, variance, runs=60):
    """RMS over runs and channels of the pooled statistics' error, as the lag has it."""
    squares = []
    for _ in range(runs):
        pooled = pool(draw())
        of_scale = np.sqrt(pooled.variance / variance) - 1
        squares.append(np.mean((pooled.mean - mean) ** 2 / variance + of_scale**2))
    return np.sqrt(np.mean(squares))


@pytest.mark.parametrize(("count", "size"), [(16, 50), (64, 20), (100, 5)])
def test_error_of_random_batches_is_what_repetition_shows(count, size):
    rng = np.random.default_rng(0)
    truth = true_error(lambda: batches(rng, count, size), 0, 1)
    assert truth == pytest.approx(np.sqrt(1.5 / (count * size)), rel=0.1)
    errors = [standard_error(batches(rng, count, size), 0.0) for _ in range(20)]
    # The largest of several estimates leans to the safe side.
    assert 0.9 * truth < np.mean(errors) < 1.35 * truth


def test_batches_that_belong_together_are_not_taken_for_many_samples():
    rng = np.random.default_rng(0)
    grouped = standard_error(batches(rng, 64, 20, group=1.0), 0.0)
    truth = true_error(lambda: batches(rng, 64, 20, group=1.0), 0, 2)
    assert truth > 2.5 * np.sqrt(1.5 / (64 * 20))
    # The mean over channels and runs: one run has only 64 groups to go by.
    assert 0.8 * truth < grouped < 1.6 * truth


def test_groups_that_span_batches_are_seen_by_joining_blocks():
    rng = np.random.default_rng(0)
    spanning = batches(rng, 128, 20, group=1.0, span=8)
    truth = true_error(lambda: batches(rng, 128, 20, group=1.0, span=8), 0, 2, 30)
    assert standard_error(spanning, 0.0) == pytest.approx(truth, rel=0.4)


def test_blocks_join_as_data_grow_and_lose_nothing():
    rng = np.random.default_rng(0)
    blocks = Blocks()
    everything = batches(rng, 4 * MAX_BLOCKS, 3)
    for batch in everything:
        blocks.add(batch)
        assert len(blocks.blocks) < MAX_BLOCKS
    kept, whole = pool(blocks.blocks), pool(everything)
    assert (kept.count == whole.count).all()
    np.testing.assert_allclose(kept.mean, whole.mean, atol=1e-12)
    np.testing.assert_allclose(kept.variance, whole.variance, rtol=1e-12)
    # All of one size, as neighbours that are to be compared have to be.
    assert len({block.count[0] for block in blocks.blocks}) == 1
    # Independent batches: joined or not, they tell the same error.
    truth = np.sqrt((1 + 1 / 2) / whole.count[0])
    assert blocks.standard_error(0.0) == pytest.approx(truth, rel=0.2)


def test_too_few_blocks_say_nothing():
    rng = np.random.default_rng(0)
    blocks = Blocks()
    for batch in batches(rng, MIN_BLOCKS - 1, 3):
        blocks.add(batch)
    blocks.add(Moments.empty(CHANNELS))
    assert blocks.standard_error(1e-3) is None


def test_a_constant_channel_has_no_error():
    constant = [Moments.from_values(np.ones((4, 2)))] * MIN_BLOCKS
    assert standard_error(constant, 0.0) == 0.0


def test_the_scatter_of_few_blocks_has_the_correction_of_bessel():
    means = np.array([0.0, 1.0, 4.0, 2.0, 0.5, 3.0, 1.5, 2.5])
    blocks = [Moments.from_sums(10.0, [mean], [0.0], [10.0]) for mean in means]
    second = 1 + (means - means.mean()) ** 2
    sigma2 = second.mean()
    of_mean = 8 / 7 * np.sum((means - means.mean()) ** 2) / 64 / sigma2
    of_scale = 8 / 7 * np.sum((second - sigma2) ** 2) / 64 / (2 * sigma2) ** 2
    expected = np.sqrt(of_mean + of_scale)
    assert standard_error(blocks, 0.0) == pytest.approx(expected)


def test_few_batches_or_constant_channels_have_no_design_effect():
    few = Moments.from_values(np.arange(7.0)[:, None])
    many = Moments.from_values(np.arange(9.0)[:, None])
    constant = Moments.from_values(np.ones((9, 1)))
    assert design_effect(few, many, 32) is None
    assert design_effect(many, constant, 32) is None

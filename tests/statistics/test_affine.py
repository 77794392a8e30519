"""One factor for all channels, against layers computed by hand."""

import numpy as np
import pytest

from bn_callbacks.statistics.affine import (
    InputMap,
    is_felt,
    is_proportional,
    ratio_of,
    shift_between,
)
from bn_callbacks.statistics.moments import Statistics

EPSILON = 1e-3
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(6, 16))
BIAS = RNG.normal(size=16)
X = RNG.normal(2, 1, size=(4000, 6)) * np.arange(1, 7)


def common_factor(given, stored, epsilon):
    ratio = ratio_of(given, stored, epsilon)
    return ratio.median if ratio.is_factor else None


def behind(x, kernel=KERNEL, bias=BIAS):
    """What a dense layer makes of data."""
    z = x @ kernel + bias
    return Statistics(z.mean(axis=0), z.var(axis=0))


STORED = behind(X)


@pytest.mark.parametrize("factor", [255.0, -255.0, 1 / 127.5, 2.0, 0.5, 32767.0])
@pytest.mark.parametrize("shift", [0.0, -1.0, 100.0])
def test_every_affine_map_of_the_data_scales_all_deviations_alike(factor, shift):
    given = behind(factor * X + shift)
    assert common_factor(given, STORED, EPSILON) == pytest.approx(abs(factor))
    # Other examples of the same data, and nearly the same factor in each channel.
    others = RNG.normal(2, 1, size=(4000, 6)) * np.arange(1, 7)
    given = behind((factor + 0.01 * factor * RNG.normal(size=6)) * others + shift)
    assert common_factor(given, STORED, EPSILON) == pytest.approx(abs(factor), rel=0.1)


def test_factors_of_channels_that_differ_are_none():
    apart = np.array([1, 1, 1, 4, 4, 4])
    assert common_factor(behind(X * apart), STORED, EPSILON) is None


@pytest.mark.parametrize("seed", range(1, 20))
@pytest.mark.parametrize("step", [0.3, 1.0, 3.0])
def test_weights_that_walk_have_no_common_factor(seed, step):
    draw = np.random.default_rng(seed)
    moved = KERNEL + step * draw.normal(size=KERNEL.shape)
    assert common_factor(behind(X, moved), STORED, EPSILON) is None


@pytest.mark.parametrize("weight", [0.02, 0.2, 0.8, 0.99])
def test_a_start_has_no_common_factor(weight):
    moving = Statistics(
        (1 - weight) * STORED.mean, weight + (1 - weight) * STORED.variance
    )
    # But for weights of 1 − w, if the data are far from the start.
    factor = common_factor(STORED, moving, EPSILON)
    assert factor is None or factor == pytest.approx((1 - weight) ** -0.5, rel=0.05)


@pytest.mark.parametrize(("spread", "is_one"), [(0.03, True), (0.1, False)])
def test_channels_share_a_factor_but_for_chance(spread, is_one):
    signs = np.resize([1.0, -1.0], 16)
    given = Statistics(STORED.mean, 9 * STORED.variance * (1 + spread * signs) ** 2)
    assert (common_factor(given, STORED, EPSILON) is not None) == is_one


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (behind(1.2 * X), STORED),
        (STORED._replace(variance=np.zeros(16)), STORED),
        (STORED, STORED._replace(variance=np.zeros(16))),
        (STORED._replace(variance=np.full(16, np.inf)), STORED),
        (STORED, STORED._replace(variance=np.full(16, np.inf))),
    ],
)
def test_what_is_near_or_says_nothing_has_no_factor(given, stored):
    assert common_factor(given, stored, EPSILON) is None


def test_means_are_proportional_where_nothing_but_a_factor_has_changed():
    plain = behind(X, bias=0.0)
    assert is_proportional(behind(255 * X, bias=0.0), plain, 255.0)
    # A shift, means of 0, all divided by a constant, few channels.
    assert not is_proportional(behind(255 * X + 500, bias=0.0), plain, 255.0)
    centred = behind(X - X.mean(axis=0), bias=0.0)
    assert not is_proportional(behind(255 * X + 9, bias=0.0), centred, 255.0)
    whole = Statistics(plain.mean / 900, plain.variance / 900)
    assert not is_proportional(whole, plain, 1 / 30)
    few = Statistics(*(part[:3] for part in plain))
    assert not is_proportional(few, few, 1.0)


@pytest.mark.parametrize("shift", [-1.0, 0.5, 100.0])
def test_the_shift_is_found_through_kernel_and_bias(shift):
    wanted = behind(X + shift)
    assert shift_between(STORED, behind(X + 1), wanted) == pytest.approx(shift)


def test_a_shift_is_felt_by_the_means():
    ends = STORED, behind(X + 1)
    assert is_felt(1.0, *ends, STORED)
    assert not is_felt(0.01, *ends, STORED)
    # Kernels that add up to nothing; nothing that varies.
    assert shift_between(STORED, STORED, behind(X + 1)) == 0.0
    assert not is_felt(1.0, STORED, STORED, STORED)
    flat = STORED._replace(variance=np.zeros(16))
    assert shift_between(flat, flat, flat) == 0.0
    assert not is_felt(1.0, flat, flat, flat)


@pytest.mark.parametrize(
    ("known", "text"),
    [
        (InputMap(255.0), "a factor of 255"),
        (InputMap(1 / 127.5), "a factor of 1/128"),
        (InputMap(2.0, -1.0), "a factor of 2 and a shift of -1"),
    ],
)
def test_a_map_reads_well(known, text):
    assert str(known) == text

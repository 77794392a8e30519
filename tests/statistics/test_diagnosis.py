"""Each rule of the diagnosis on evidence made by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bn_callbacks.statistics import causes
from bn_callbacks.statistics.advice import advise
from bn_callbacks.statistics.diagnosis import (
    DESIGN_LIMIT,
    GAP_LIMIT,
    RULES,
    VARIATION_LIMIT,
    diagnose,
    diagnose_model,
)
from bn_callbacks.statistics.evidence import Evidence, measure
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import average_noise, window_noise
from bn_callbacks.statistics.stream import observe

CHANNELS = 8
UPDATES = 1000


def constant(mean, variance=1.0):
    return Statistics(np.full(CHANNELS, float(mean)), np.full(CHANNELS, variance))


def random_windows(mean_noise, outlier=0.0, count=16, seed=0):
    """Windows of normal means; every third holds an outlier."""
    means = np.random.default_rng(seed).normal(scale=mean_noise, size=(count, CHANNELS))
    variances = np.ones((count, CHANNELS))
    variances[::3] += outlier
    return Statistics(means, variances)


HEALTHY = Evidence(
    path="bn",
    momentum=0.99,
    epsilon=1e-3,
    moving=constant(0),
    batch=constant(0),
    updates=UPDATES,
    total_updates=UPDATES,
    start=constant(5),
    windows=random_windows(0.01),
    window_updates=10,
    window_share=window_noise(0.99, 10),
    batch_size=32.0,
)


def young(lag, updates=50):
    """Statistics that follow batches of mean 1, with the rest of a start at 0."""
    weight = 0.99**updates
    return replace(
        HEALTHY,
        start=constant(1 - lag / weight),
        moving=constant(1 - lag),
        batch=constant(1),
        updates=updates,
        windows=None,
    )


PROBLEMS = {
    causes.NON_FINITE: replace(HEALTHY, moving=constant(math.nan)),
    causes.UNEXPECTED_UPDATE: replace(HEALTHY, trainable=False),
    causes.NOT_UPDATING: replace(HEALTHY, momentum=1.0, is_still=True),
    causes.INFERENCE_MODE: replace(HEALTHY, is_still=True),
    causes.TINY_BATCH: replace(HEALTHY, batch_size=2.0, windows=random_windows(1.0)),
    causes.LOW_PRECISION: replace(HEALTHY, moving=constant(3), precision=2.0**-7),
    causes.REPLICAS_DIFFER: replace(HEALTHY, replicas=[constant(0), constant(1)]),
    causes.OUTLIERS: replace(HEALTHY, windows=random_windows(0.01, 50.0)),
    causes.CORRELATED_BATCHES: replace(HEALTHY, windows=random_windows(0.5)),
    causes.WEIGHTS_REPLACED: replace(HEALTHY, are_weights_replaced=True),
    causes.MIXED_CALLS: replace(HEALTHY, has_mixed_calls=True, loss_gap=5.0),
    causes.WARMING_UP: young(0.5),
    causes.NOISY: replace(
        HEALTHY,
        momentum=0.0,
        batch_size=None,
        windows=random_windows(0.5),
        window_share=1.0,
    ),
    causes.DRIFTING: replace(HEALTHY, moving=constant(0.5)),
}


@pytest.mark.parametrize("cause", PROBLEMS)
def test_each_cause_is_named_with_its_remedy(cause):
    verdict = diagnose(PROBLEMS[cause])
    assert verdict.cause == cause
    assert verdict.advice


def test_every_cause_has_a_rule_and_a_problem():
    vocabulary = {value for name, value in vars(causes).items() if name.isupper()}
    assert {cause for cause, _ in RULES} == vocabulary
    assert set(PROBLEMS) == vocabulary - {causes.HEALTHY}


@pytest.mark.parametrize(
    "seen",
    [
        HEALTHY,
        replace(HEALTHY, batch=None),
        replace(HEALTHY, trainable=False, is_still=True),
        replace(HEALTHY, trainable=False, start=HEALTHY.moving),
        replace(HEALTHY, is_pinned=True, loss_gap=1.0),
        replace(HEALTHY, is_still=True, is_initial=False),
        replace(HEALTHY, moving=constant(0.5), loss_gap=GAP_LIMIT - 0.01),
        replace(HEALTHY, windows=random_windows(0.5), batch_size=None),
        replace(HEALTHY, windows=random_windows(0.05), batch_size=3.0),
        replace(HEALTHY, batch_size=1.0),
        replace(HEALTHY, has_mixed_calls=True),
        replace(HEALTHY, precision=2.0**-10),
        replace(HEALTHY, precision=2.0**-7, momentum=1.0),
        young(0.1),
        # What the last window says is noise: it scatters by as much itself.
        replace(HEALTHY, batch=constant(0.3), windows=random_windows(0.3, seed=1),
                batch_size=8.0),
    ],
)  # fmt: skip
def test_nothing_is_said_where_nothing_is_wrong(seen):
    verdict = diagnose(seen)
    assert verdict.cause == causes.HEALTHY
    assert verdict.advice == ""


def test_a_proven_gap_names_what_is_too_small_to_be_named_without():
    small = replace(HEALTHY, moving=constant(0.1))
    assert diagnose(small).cause == causes.HEALTHY
    assert diagnose(replace(small, loss_gap=2.0)).cause == causes.DRIFTING


def test_a_layer_that_never_moved_used_batches_if_the_gap_says_so():
    still = replace(HEALTHY, is_still=True, loss_gap=10.0)
    assert diagnose(still).cause == causes.NOT_UPDATING
    assert diagnose(replace(still, loss_gap=0.2)).cause == causes.INFERENCE_MODE


def test_a_model_that_was_never_trained_has_everything_to_learn():
    new = replace(
        HEALTHY, moving=constant(0), batch=constant(3), updates=0, windows=None
    )
    assert diagnose(new).cause == causes.WARMING_UP


def test_batches_of_one_value_are_tiny_whatever_their_size_is_called():
    windows = Statistics(np.zeros((8, CHANNELS)), np.zeros((8, CHANNELS)))
    seen = replace(HEALTHY, windows=windows, batch_size=None)
    assert diagnose(seen).cause == causes.TINY_BATCH
    assert "so few examples" in diagnose(seen).advice


def test_examples_in_an_order_show_in_windows_that_recur():
    seen = replace(HEALTHY, recurrence=1.0)
    assert diagnose(seen).cause == causes.CORRELATED_BATCHES
    assert diagnose(seen).design_effect == pytest.approx(31 / window_noise(0.99, 10))


def test_replicas_differ_only_beyond_what_sampling_explains():
    apart = replace(HEALTHY, replicas=[constant(0), constant(0.6)])
    assert diagnose(apart).cause == causes.REPLICAS_DIFFER
    assert diagnose(apart).disagreement == pytest.approx(0.3 / math.sqrt(1.09), rel=0.1)
    noisy = replace(apart, windows=random_windows(0.9))
    assert measure(noisy).own_noise > measure(noisy).disagreement
    assert diagnose(noisy).cause != causes.REPLICAS_DIFFER
    assert diagnose(replace(apart, loss_gap=1.0)).cause == causes.HEALTHY


def test_a_small_last_batch_adds_its_noise():
    seen = replace(HEALTHY, momentum=0.5, windows=random_windows(0.1), window_share=1.0)
    plain = diagnose(seen).noise
    small = diagnose(replace(seen, last_batch_size=1.0))
    stream = observe(seen.windows, seen.epsilon, 1.0, 10)
    expected = stream.noise * average_noise(0.5)
    assert plain == pytest.approx(math.sqrt(expected))
    expected += 0.25 * stream.noise * 32
    expected += (0.5 * min(32 * stream.mean_noise, 1) / 2) ** 2
    assert small.noise == pytest.approx(math.sqrt(expected))
    proven = replace(seen, last_batch_size=1.0, loss_gap=9.0)
    assert diagnose(proven).cause == causes.NOISY
    assert "drop_remainder" in diagnose(proven).advice


def test_past_statistics_stand_in_for_averages_made_of_the_window_itself():
    seen = replace(HEALTHY, past=constant(2), start=None)
    assert diagnose(seen).lag == pytest.approx(2 / math.sqrt(1.001))
    assert diagnose(seen).cause == causes.DRIFTING


def test_bad_batches_explain_the_layers_behind():
    first = PROBLEMS[causes.OUTLIERS]
    verdicts = diagnose_model([first, PROBLEMS[causes.DRIFTING], HEALTHY])
    assert [v.cause for v in verdicts] == [causes.OUTLIERS] * 2 + [causes.HEALTHY]
    assert all(v.advice for v in verdicts[:2])


def test_bad_batches_have_advice_without_their_figures():
    for cause in (causes.OUTLIERS, causes.CORRELATED_BATCHES, causes.TINY_BATCH):
        seen = replace(HEALTHY, batch_size=None)
        assert advise(seen, measure(seen), cause, None)


def test_advice_quotes_no_scatter_that_belies_it():
    quiet = replace(HEALTHY, windows=random_windows(0.0001))
    figures = measure(quiet)
    assert figures.design_effect < 2
    text = advise(quiet, figures, causes.CORRELATED_BATCHES, None)
    assert "times as much" not in text
    assert "Batches are no random sample. Shuffle" in text


def test_a_gap_that_no_layer_explains_means_replaced_weights():
    gap = replace(HEALTHY, loss_gap=5.0)
    frozen = replace(gap, trainable=False, is_still=True)
    verdicts = diagnose_model([gap, frozen])
    assert [v.cause for v in verdicts] == [causes.WEIGHTS_REPLACED, causes.HEALTHY]


def test_a_gap_that_no_layer_explains_may_come_from_mixed_calls():
    gap = replace(HEALTHY, loss_gap=5.0)
    # Large enough to hide that the layer follows, too small to be named.
    mixed = replace(gap, has_mixed_calls=True, moving=constant(0.04))
    verdicts = diagnose_model([gap, mixed])
    assert [v.cause for v in verdicts] == [causes.HEALTHY, causes.MIXED_CALLS]


def test_only_the_largest_error_explains_a_gap():
    large = replace(HEALTHY, loss_gap=5.0, moving=constant(0.5))
    small = replace(HEALTHY, loss_gap=5.0, moving=constant(0.1))
    assert [v.cause for v in diagnose_model([large, small])] == [
        causes.DRIFTING,
        causes.HEALTHY,
    ]
    noisy = replace(
        HEALTHY,
        loss_gap=5.0,
        momentum=0.0,
        batch_size=None,
        windows=random_windows(0.08),
        window_share=1.0,
    )
    assert [v.cause for v in diagnose_model([small, noisy])].count(causes.HEALTHY) == 1


def test_suggestions_move_the_momentum_the_right_way():
    noisy = diagnose(PROBLEMS[causes.NOISY])
    assert 0 < noisy.suggested_momentum <= 0.999
    warming = diagnose(PROBLEMS[causes.WARMING_UP])
    assert warming.suggested_momentum == pytest.approx(1 - 10 / UPDATES)
    drifting = replace(
        PROBLEMS[causes.DRIFTING],
        windows=Statistics(
            0.1 * np.arange(16)[:, None].repeat(CHANNELS, axis=1),
            np.ones((16, CHANNELS)),
        ),
        total_updates=None,
    )
    suggested = diagnose(drifting)
    assert suggested.suggested_momentum < 0.99
    assert "set momentum=" in suggested.advice
    assert diagnose(replace(drifting, windows=None)).suggested_momentum is None
    best = replace(
        PROBLEMS[causes.NOISY], momentum=0.9995, threshold=1e-3, start=constant(0)
    )
    assert diagnose(best).suggested_momentum is None


def test_limits_lie_between_what_was_measured():
    assert 1.29 < GAP_LIMIT < 1.5
    assert 4.6 < DESIGN_LIMIT < 12
    assert 1.4 < VARIATION_LIMIT < 7
    assert diagnose_model([]) == []

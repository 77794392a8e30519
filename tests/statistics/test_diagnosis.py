"""Each rule of the diagnosis on evidence made by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bn_callbacks.statistics import causes
from bn_callbacks.statistics.advice import _distance, advise
from bn_callbacks.statistics.affine import InputMap
from bn_callbacks.statistics.diagnosis import (
    APART_LIMIT,
    CRIPPLING,
    DESIGN_LIMIT,
    DOMINANCE_LIMIT,
    FEW,
    LARGE,
    RULES,
    VARIATION_LIMIT,
    diagnose,
    diagnose_model,
)
from bn_callbacks.statistics.evidence import (
    Evidence,
    is_negative,
    measure,
    scatter_of_means,
)
from bn_callbacks.statistics.losses import CAUSES_OF, Family
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import average_noise, window_noise
from bn_callbacks.statistics.scatter import Scatter
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


def drifting(step=0.1):
    """Windows of means that go up, and an average that is left behind."""
    means = step * np.arange(16)[:, None].repeat(CHANNELS, axis=1)
    return replace(
        HEALTHY,
        moving=Statistics(means[-1] - 10 * step, np.ones(CHANNELS)),
        batch=Statistics(means[-1], np.ones(CHANNELS)),
        windows=Statistics(means, np.ones((16, CHANNELS))),
        start=None,
    )


STALE = {"family": Family.STALE}

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
    causes.BATCH_DEPENDENT: replace(HEALTHY, family=Family.BATCHES),
    causes.MIXED_CALLS: replace(HEALTHY, has_mixed_calls=True, family=Family.BATCHES),
    causes.WARMING_UP: young(0.5),
    causes.NOISY: replace(
        HEALTHY,
        momentum=0.0,
        batch_size=None,
        windows=random_windows(0.5),
        window_share=1.0,
    ),
    causes.DRIFTING: drifting(),
    causes.STALE: replace(HEALTHY, moving=constant(0.5)),
    causes.RESCALED_INPUTS: replace(
        HEALTHY, windows=None, batch=constant(9), input_map=InputMap(255.0)
    ),
}


@pytest.mark.parametrize("cause", PROBLEMS)
def test_each_cause_is_named_with_its_remedy(cause):
    verdict = diagnose(PROBLEMS[cause])
    assert verdict.cause == cause
    assert verdict.advice


def test_every_cause_has_a_rule_and_a_problem():
    vocabulary = {value for name, value in vars(causes).items() if name.isupper()}
    # That one the losses alone prove.
    by_rules = {cause for cause, _ in RULES}
    assert by_rules | {causes.BATCH_DEPENDENT} == vocabulary
    assert vocabulary - {causes.HEALTHY} == CAUSES_OF[Family.UNKNOWN]
    assert set(PROBLEMS) == vocabulary - {causes.HEALTHY}


@pytest.mark.parametrize(
    "seen",
    [
        HEALTHY,
        replace(HEALTHY, batch=None),
        replace(HEALTHY, trainable=False, is_still=True),
        replace(HEALTHY, trainable=False, start=HEALTHY.moving),
        replace(HEALTHY, is_pinned=True, family=Family.INNOCENT),
        replace(PROBLEMS[causes.STALE], is_called=False),
        replace(PROBLEMS[causes.STALE], family=Family.INNOCENT),
        replace(PROBLEMS[causes.STALE], family=Family.ADAPTED),
        # Inference brings what is stored: recalibrating would change nothing.
        replace(PROBLEMS[causes.STALE], inferred=constant(0.51)),
        replace(HEALTHY, is_still=True, family=Family.INNOCENT),
        replace(HEALTHY, is_still=True, is_initial=False),
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
    small = drifting(0.02)
    assert diagnose(replace(small, threshold=0.3)).cause == causes.HEALTHY
    proven = replace(small, threshold=0.3, **STALE)
    assert diagnose(proven).cause == causes.DRIFTING
    # Where recalibrating helps though the gap is small, small errors are no cause.
    helped = replace(proven, family=Family.HELPED)
    assert diagnose(helped).cause == causes.HEALTHY


def test_a_layer_that_never_moved_used_batches_if_the_gap_says_so():
    still = replace(HEALTHY, is_still=True, **STALE)
    assert diagnose(still).cause == causes.NOT_UPDATING
    adapted = replace(still, family=Family.ADAPTED)
    assert diagnose(adapted).cause == causes.INFERENCE_MODE
    # Without losses, the calls that training was seen to make tell.
    seen = replace(HEALTHY, is_still=True, trains=True)
    assert diagnose(seen).cause == causes.NOT_UPDATING


def test_a_model_that_was_never_trained_has_everything_to_learn():
    new = replace(
        HEALTHY, moving=constant(0), batch=constant(3), updates=0, windows=None
    )
    assert diagnose(new).cause == causes.WARMING_UP
    assert "no training step" in diagnose(new).advice
    assert diagnose(new).suggested_momentum is None


def test_batches_of_one_value_are_tiny_whatever_their_size_is_called():
    windows = Statistics(np.zeros((8, CHANNELS)), np.zeros((8, CHANNELS)))
    seen = replace(HEALTHY, windows=windows, batch_size=None)
    assert diagnose(seen).cause == causes.TINY_BATCH
    assert "so few examples" in diagnose(seen).advice


def test_examples_in_an_order_show_in_windows_that_recur():
    seen = replace(HEALTHY, recurrence=1.0)
    assert diagnose(seen).cause == causes.CORRELATED_BATCHES
    assert diagnose(seen).figures.design_effect == pytest.approx(
        31 / window_noise(0.99, 10)
    )


def test_replicas_differ_only_beyond_what_sampling_explains():
    apart = replace(HEALTHY, replicas=[constant(0), constant(0.6)])
    assert diagnose(apart).cause == causes.REPLICAS_DIFFER
    assert diagnose(apart).figures.disagreement == pytest.approx(
        0.3 / math.sqrt(1.09), rel=0.1
    )
    noisy = replace(apart, windows=random_windows(0.9))
    assert measure(noisy).own_noise > measure(noisy).figures.disagreement
    assert diagnose(noisy).cause != causes.REPLICAS_DIFFER
    innocent = replace(apart, family=Family.INNOCENT)
    assert diagnose(innocent).cause == causes.HEALTHY


def test_a_small_last_batch_adds_its_noise():
    seen = replace(HEALTHY, momentum=0.5, windows=random_windows(0.1), window_share=1.0)
    plain = diagnose(seen).figures.noise
    small = diagnose(replace(seen, last_batch_size=1.0))
    stream = observe(seen.windows, seen.epsilon, 1.0, 10)
    expected = stream.noise * average_noise(0.5)
    assert plain == pytest.approx(math.sqrt(expected))
    expected += 0.25 * stream.noise * 32
    expected += (0.5 * min(32 * stream.mean_noise, 1) / 2) ** 2
    assert small.figures.noise == pytest.approx(math.sqrt(expected))
    proven = replace(seen, last_batch_size=1.0, **STALE)
    assert diagnose(proven).cause == causes.NOISY
    assert "drop_remainder" in diagnose(proven).advice


def test_past_statistics_stand_in_for_averages_made_of_the_window_itself():
    seen = replace(HEALTHY, past=constant(2), start=None)
    assert diagnose(seen).figures.lag == pytest.approx(2 / math.sqrt(1.001))
    assert diagnose(seen).cause == causes.STALE


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
    assert figures.figures.design_effect < 2
    text = advise(quiet, figures, causes.CORRELATED_BATCHES, None)
    assert "times as much" not in text
    assert "Batches are no random sample. Shuffle" in text
    proven = replace(quiet, family=Family.BATCHES)
    text = advise(proven, figures, causes.CORRELATED_BATCHES, None)
    assert "no fixed statistics do for all" in text


def test_stale_statistics_that_nothing_explains_are_called_so():
    gap = replace(HEALTHY, inferred=constant(0.04), **STALE)
    far = replace(HEALTHY, inferred=constant(1.0), **STALE)
    frozen = replace(far, trainable=False, is_still=True)
    verdicts = diagnose_model([gap, far, frozen])
    assert [v.cause for v in verdicts] == [causes.HEALTHY, causes.STALE, causes.HEALTHY]
    assert [v.cause for v in diagnose_model([replace(gap, **STALE)])] == [causes.STALE]


def test_what_no_fixed_statistics_can_do_has_a_cause_only_if_it_is_seen():
    gap = replace(HEALTHY, family=Family.BATCHES)
    assert diagnose(gap).figures.design_effect < APART_LIMIT
    assert diagnose(gap).cause == causes.BATCH_DEPENDENT
    assert "nothing shows why" in diagnose(gap).advice
    # Batches that differ more than random ones do, though weights that move might too.
    apart = replace(gap, windows=random_windows(0.11))
    assert APART_LIMIT < diagnose(apart).figures.design_effect < DESIGN_LIMIT
    assert diagnose(apart).cause == causes.CORRELATED_BATCHES
    assert diagnose(replace(apart, family=Family.UNKNOWN)).cause == causes.HEALTHY
    # In a probe they are seen also where the batch size of training is unknown.
    unknown = replace(apart, batch_size=None)
    assert diagnose(unknown).cause == causes.BATCH_DEPENDENT
    probed = replace(unknown, probe_effect=APART_LIMIT + 0.1)
    assert diagnose(probed).cause == causes.CORRELATED_BATCHES
    mixed = replace(gap, has_mixed_calls=True)
    assert [v.cause for v in diagnose_model([mixed])] == [causes.MIXED_CALLS]
    rare = replace(mixed, scatter=Scatter(0.0, 1.0, 2 * DOMINANCE_LIMIT))
    assert diagnose(rare).cause == causes.OUTLIERS


INNOCENT = {"family": Family.INNOCENT}


def test_losses_that_agree_do_not_refute_crippling_batches():
    # They agree since training itself has to do without what differs between batches.
    apart = replace(HEALTHY, windows=random_windows(0.5), **INNOCENT)
    measured = measure(apart)
    assert scatter_of_means(apart, measured.stream) > CRIPPLING
    assert diagnose(apart).cause == causes.CORRELATED_BATCHES
    # Grouped they may be, and not be harmed.
    little = replace(apart, windows=random_windows(0.1), batch_size=128.0)
    assert diagnose(little).figures.design_effect > DESIGN_LIMIT
    assert diagnose(little).cause == causes.HEALTHY
    assert diagnose(replace(little, is_grouped=True)).cause == causes.HEALTHY
    assert diagnose(replace(little, family=Family.UNKNOWN)).cause != causes.HEALTHY


def test_losses_that_agree_do_not_refute_replicas_far_apart():
    far = replace(HEALTHY, replicas=[constant(0), constant(2)], **INNOCENT)
    assert diagnose(far).figures.disagreement > CRIPPLING
    assert diagnose(far).cause == causes.REPLICAS_DIFFER
    near = replace(far, replicas=[constant(0), constant(0.6)])
    assert diagnose(near).cause == causes.HEALTHY


def test_what_a_frozen_layer_has_lost_is_a_fact():
    for meant in ({"trainable": False}, {"is_pinned": True}):
        moved = replace(HEALTHY, is_initial=False, **meant, **INNOCENT)
        assert diagnose(moved).cause == causes.UNEXPECTED_UPDATE
        # A new layer had nothing to lose.
        new = replace(moved, is_initial=True)
        assert diagnose(new).cause == causes.HEALTHY


def test_a_probe_at_rest_tells_weights_that_leap_from_grouped_batches():
    leaps = replace(HEALTHY, windows=random_windows(0.5), probe_effect=1.0, **STALE)
    assert diagnose(leaps).figures.design_effect > DESIGN_LIMIT
    assert diagnose(leaps).cause != causes.CORRELATED_BATCHES
    assert diagnose(replace(leaps, is_grouped=True)).cause != causes.CORRELATED_BATCHES
    # Unless the probe's batches differ too, or no fixed statistics do for them, or
    # each epoch brings the same.
    for proof in (
        {"probe_effect": APART_LIMIT + 0.1},
        {"family": Family.BATCHES},
        {"recurrence": 1.0},
    ):
        seen = replace(leaps, **proof)
        assert diagnose(seen).cause == causes.CORRELATED_BATCHES, proof


def test_few_examples_differ_wildly_though_none_is_an_outlier():
    scales = np.ones((16, CHANNELS))
    scales[::3] = 50.0
    wild = Statistics(np.zeros((16, CHANNELS)), scales)
    seen = replace(HEALTHY, windows=wild)
    assert diagnose(seen).cause == causes.OUTLIERS
    single = replace(seen, batch_size=1.0)
    assert diagnose(single).cause == causes.TINY_BATCH
    quiet = replace(single, scatter=Scatter(0.0, 9.0, 99.0), windows=None)
    assert diagnose(quiet).cause == causes.HEALTHY
    variation = measure(seen).figures.batch_variation
    limit = FEW * (VARIATION_LIMIT / variation) ** 2
    for size, cause in ((limit * 0.9, None), (limit * 1.1, causes.OUTLIERS)):
        few = replace(seen, scatter=Scatter(0.0, variation, 1.0), batch_size=size)
        assert (diagnose(few).cause == causes.OUTLIERS) is (cause is not None)


def test_statistics_that_changed_between_steps_are_stale_and_nothing_else():
    touched = replace(
        PROBLEMS[causes.OUTLIERS],
        moving=constant(50),
        start=None,
        scatter=Scatter(0.0, 9.0, 99.0),
        is_touched=True,
    )
    assert diagnose(touched).cause == causes.STALE
    assert "no training step was made" in diagnose(touched).advice
    assert diagnose(replace(HEALTHY, is_touched=True)).cause == causes.HEALTHY


def test_a_layer_that_does_something_of_its_own_is_not_known_to_be_off():
    still = replace(HEALTHY, is_still=True)
    assert diagnose(still).cause == causes.INFERENCE_MODE
    assert diagnose(replace(still, is_opaque=True)).cause == causes.HEALTHY


def test_no_cause_is_named_outside_the_family_that_the_losses_prove():
    for family, allowed in CAUSES_OF.items():
        if family in (Family.LIKELY, Family.UNCLEAR, Family.SLIGHT):
            continue  # A far lag speaks for itself there.
        for seen in PROBLEMS.values():
            cause = diagnose(replace(seen, family=family)).cause
            assert cause == causes.HEALTHY or cause in allowed, (family, cause)


def test_beside_a_small_sure_gap_a_large_lag_is_a_witness():
    for weight, cause in ((0.3, causes.HEALTHY), (0.7, causes.WARMING_UP)):
        seen = replace(young(weight), family=Family.SLIGHT)
        lag = diagnose(seen).figures.lag
        assert seen.threshold < lag
        assert (lag > LARGE) == (cause == causes.WARMING_UP)
        assert diagnose(seen).cause == cause
        assert diagnose(replace(seen, family=Family.INNOCENT)).cause == causes.HEALTHY


def test_averages_that_follow_calls_which_inference_does_not_make_are_mixed():
    seen = replace(HEALTHY, has_mixed_calls=True, **STALE)
    assert diagnose(replace(seen, inferred=constant(2))).cause == causes.MIXED_CALLS
    # In a short run it is the start, and recalibrating cures it.
    short = replace(young(0.5), has_mixed_calls=True, inferred=constant(2), **STALE)
    assert diagnose(short).cause == causes.WARMING_UP


def test_start_values_explain_only_what_goes_with_them():
    # By its count half the start is left; but the average is right as it is.
    recalibrated = replace(young(0.5), moving=constant(1), start=constant(0))
    assert diagnose(recalibrated).cause == causes.HEALTHY
    assert diagnose(recalibrated).figures.start_weight > 0.5
    # Taking the start out would lead away from the batches.
    away = replace(recalibrated, moving=constant(1.5))
    assert diagnose(away).cause == causes.STALE


def test_a_small_rest_of_a_far_start_is_not_forgotten():
    weight = 0.99**390
    far = replace(
        young(0.1, updates=390),
        total_updates=390,
        start=constant(-126),
        moving=constant(1 - 127 * weight),
    )
    assert weight < 0.02
    assert diagnose(far).figures.lag == pytest.approx(127 * weight, rel=0.01)
    verdict = diagnose(far)
    assert verdict.cause == causes.WARMING_UP
    # The distance counts: it leaves 0.05 of it, and no more.
    left = verdict.suggested_momentum**390 * 127
    assert left <= 0.05 * 1.01


def test_a_negative_variance_proves_the_count_of_updates_wrong():
    # Twice as many updates were made as were counted.
    weight, counted = 0.99**200, 0.99**100
    true = Statistics(np.full(CHANNELS, 1.0), np.full(CHANNELS, 0.01))
    moving = Statistics(
        (1 - weight) * true.mean, weight * 1.0 + (1 - weight) * true.variance
    )
    seen = replace(
        HEALTHY, moving=moving, batch=true, start=constant(0), updates=100, windows=None
    )
    measured = measure(seen)
    assert measured.is_impossible
    assert measured.start_part == 0
    assert is_negative((moving.variance - counted) / (1 - counted), moving.variance)


def test_stored_variances_below_0_are_stale_whatever_else():
    seen = replace(HEALTHY, moving=constant(0, -0.5), batch=None)
    assert diagnose(seen).cause == causes.STALE
    assert "negative variance" in diagnose(seen).advice


def test_noise_has_a_floor_without_windows():
    one = replace(
        HEALTHY,
        moving=constant(0.5),
        batch=constant(0),
        windows=None,
        window_share=None,
        batch_share=1.0,
        start=None,
        batch_size=16.0,
    )
    assert 2 * math.sqrt(1.5 / 16) > 0.5
    assert diagnose(one).cause == causes.HEALTHY
    assert diagnose(replace(one, batch_size=64.0)).cause == causes.STALE


def test_a_start_within_noise_explains_nothing():
    noisy = {"batch_share": 1.0, "batch_size": 32.0}
    floor = math.sqrt(1.5 / 32 * (average_noise(0.99) + 1))
    assert floor < 0.3 < 2 * floor < 0.5
    assert diagnose(replace(young(0.3), **noisy)).cause == causes.HEALTHY
    assert diagnose(replace(young(0.5), **noisy)).cause == causes.WARMING_UP


def test_a_small_error_does_not_explain_a_large_distance():
    # A part of 0.3 is the start's; what it leaves is ten times as far, or twice.
    weight = 0.99**50

    def beside(rest):
        clean = 1 + rest
        return replace(
            young(0.3),
            start=constant(clean + 0.3 / weight),
            moving=constant(clean + 0.3),
        )

    assert measure(beside(3.0)).start_part == pytest.approx(0.3, rel=0.01)
    assert diagnose(beside(3.0)).cause == causes.STALE
    assert diagnose(beside(0.6)).cause == causes.WARMING_UP


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (InputMap(255.0), "by a factor of 255 in every"),
        (InputMap(1 / 255), "by a factor of 1/255 in every"),
        (InputMap(0.5, -1.0), "by a factor of 1/2 and a shift of -1 in every"),
    ],
)
def test_data_that_are_mapped_are_to_be_given_right(known, words):
    far = replace(HEALTHY, windows=None, batch=constant(9, 4.0), start=None)
    verdict = diagnose(replace(far, input_map=known))
    assert verdict.cause == causes.RESCALED_INPUTS
    assert "Do not recalibrate" in verdict.advice
    assert words in verdict.advice
    # What they do not put off is healthy.
    near = replace(far, batch=far.moving, input_map=known)
    assert diagnose(near).cause == causes.HEALTHY


def test_whoever_is_to_recalibrate_stale_statistics_checks_the_data_first():
    verdict = diagnose(replace(HEALTHY, windows=None, batch=constant(9), start=None))
    assert verdict.cause == causes.STALE
    check, _, then = verdict.advice.partition("Then recalibrate")
    assert "preprocessed as in training" in check
    assert then


@pytest.mark.parametrize(
    ("family", "mean", "cause"),
    [
        (Family.LIKELY, 0.5, causes.STALE),
        (Family.LIKELY, 0.1, causes.HEALTHY),
        (Family.UNCLEAR, 1.5, causes.STALE),
        (Family.UNCLEAR, 0.5, causes.HEALTHY),
        (Family.INNOCENT, 1.5, causes.HEALTHY),
    ],
)
def test_the_lag_is_a_witness_where_losses_are_unclear(family, mean, cause):
    seen = replace(HEALTHY, windows=None, start=None, moving=constant(0))
    off = replace(seen, batch=constant(mean), inferred=constant(mean), family=family)
    assert diagnose(off).cause == cause


@pytest.mark.parametrize("family", [Family.LIKELY, Family.UNCLEAR])
@pytest.mark.parametrize(
    ("scatter", "cause"),
    [
        (None, causes.BATCH_DEPENDENT),
        (Scatter(0.12, 0.1, 1.5), causes.CORRELATED_BATCHES),
    ],
)
def test_a_far_lag_beside_a_gap_is_never_healthy(family, scatter, cause):
    # Inference brings the layer what it stores, and still batches are far off.
    seen = replace(HEALTHY, windows=None, start=None, moving=constant(0))
    far = replace(seen, batch=constant(2), inferred=constant(0), scatter=scatter)
    assert diagnose(replace(far, family=family, batch_size=32.0)).cause == cause


def test_weights_that_leap_are_not_batches_that_differ():
    leaping = replace(HEALTHY, windows=random_windows(0.5))
    assert diagnose(leaping).cause == causes.CORRELATED_BATCHES
    alike = replace(leaping, scatter=Scatter(1 / 32, 0.1, 1.5))
    assert diagnose(alike).cause != causes.CORRELATED_BATCHES
    # Windows may correct what few batches have shown, by a factor of 4.
    assert diagnose(alike).figures.design_effect == pytest.approx(4 * 31 / 32)


def test_grouped_batches_once_proven_stay_so():
    seen = replace(HEALTHY, is_grouped=True)
    assert diagnose(seen).cause == causes.CORRELATED_BATCHES
    innocent = replace(seen, family=Family.INNOCENT)
    assert diagnose(innocent).cause == causes.HEALTHY


def test_only_the_largest_error_explains_a_gap():
    large = replace(drifting(), **STALE)
    small = replace(drifting(0.005), **STALE)
    assert [v.cause for v in diagnose_model([large, small])] == [
        causes.DRIFTING,
        causes.HEALTHY,
    ]
    noisy = replace(
        HEALTHY,
        momentum=0.0,
        batch_size=None,
        windows=random_windows(0.08),
        window_share=1.0,
        **STALE,
    )
    assert [v.cause for v in diagnose_model([small, noisy])].count(causes.HEALTHY) == 1


def test_suggestions_move_the_momentum_the_right_way():
    noisy = diagnose(PROBLEMS[causes.NOISY])
    assert 0.5 <= noisy.suggested_momentum <= 0.999
    warming = diagnose(replace(PROBLEMS[causes.WARMING_UP], total_updates=100))
    assert warming.suggested_momentum == pytest.approx(1 - 10 / 100)
    suggested = diagnose(replace(PROBLEMS[causes.DRIFTING], total_updates=None))
    assert 0.5 <= suggested.suggested_momentum < 0.99
    assert "set momentum=" in suggested.advice
    best = replace(
        PROBLEMS[causes.NOISY], momentum=0.9995, threshold=1e-3, start=constant(0)
    )
    assert diagnose(best).suggested_momentum is None


def test_a_short_run_is_advised_what_leaves_5_percent_of_the_start():
    short = replace(young(0.9, updates=6), total_updates=6, start=constant(0))
    short = replace(short, moving=constant(1 - 0.99**6))
    verdict = diagnose(short)
    assert verdict.cause == causes.WARMING_UP
    assert verdict.suggested_momentum == pytest.approx(0.05 ** (1 / 6))
    assert "momentum=0.607" in verdict.advice
    tiny = diagnose(replace(short, total_updates=2))
    assert tiny.suggested_momentum == 0.5


def with_design_effect(effect):
    """Windows whose means differ so many times as much as those of random batches."""
    windows = PROBLEMS[causes.CORRELATED_BATCHES].windows
    found = measure(replace(HEALTHY, windows=windows)).figures.design_effect
    means = windows.mean * math.sqrt(effect / found)
    seen = replace(HEALTHY, windows=windows._replace(mean=means))
    assert measure(seen).figures.design_effect == pytest.approx(effect)
    return seen


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        # Drift has reached 4.6, grouped batches began at 12.
        (with_design_effect(4.6), causes.HEALTHY),
        (with_design_effect(12.0), causes.CORRELATED_BATCHES),
        # Batches without outliers vary by 1.4 at most, those with some by 7.
        (replace(HEALTHY, scatter=Scatter(0.0, 1.4, 1.0)), causes.HEALTHY),
        (replace(HEALTHY, scatter=Scatter(0.0, 7.0, 1.0)), causes.OUTLIERS),
        # Gains that differ by a factor of 10, and a column that is hardly ever not 0.
        (replace(HEALTHY, scatter=Scatter(0.0, 1.0, 3.3)), causes.HEALTHY),
        (replace(HEALTHY, scatter=Scatter(0.0, 1.0, 30.0)), causes.OUTLIERS),
    ],
)
def test_what_was_measured_is_told_apart(seen, cause):
    assert diagnose(seen).cause == cause


def test_a_model_without_layers_has_no_verdicts():
    assert diagnose_model([]) == []


def test_what_is_not_known_of_a_layer_explains_nothing() -> None:
    unknown = replace(HEALTHY, start=None, is_pinned=True)
    assert diagnose_model([unknown])[0].cause == causes.HEALTHY
    assert _distance(unknown) == 0.0
    assert measure(replace(HEALTHY, updates=None)).figures.start_weight is None

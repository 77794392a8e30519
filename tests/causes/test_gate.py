"""A quick case for each cause, and for silence: none can break unseen."""

import keras
import kit
import pytest
from cases import CASES
from kit import Case

from bn_callbacks.statistics.losses import CAUSES_OF, Family

BY_NAME = {case.name: case for case in CASES}

QUICK = {
    "warming_up": "short_regression",
    "drifting": "memory_longer_than_progress",
    "noisy": "last_batch_of_one_example",
    "tiny_batch": "batch_of_one",
    "correlated_batches": "one_session_a_batch",
    "batch_dependent": "places_among_the_documents_of_a_query",
    "mixed_calls": "one_layer_for_three_sensors",
    "weights_replaced": "optimizer_ema_of_a_conv_net",
    "inference_mode": "train_step_without_training",
    "not_updating": "train_step_that_loses_updates",
    "unexpected_update": "frozen_without_compile",
    "low_precision": "bfloat16",
    "outliers": "a_few_wild_rows",
    "non_finite": "an_absurd_value",
    "replicas_differ": "a_sensor_for_each_replica",
}
QUIET = ("short_run_on_standardised_data", "eight_views_are_enough")

ONLY_WITH_A_PROBE = {"batch_dependent", "mixed_calls"}

ONLY_IN_AN_AUDIT = {"stale", "rescaled_inputs"}
"""tests/causes/test_audits.py has these, and two in `fit` are held back."""


def test_every_cause_has_a_quick_case() -> None:
    wanted = {case.expected for case in CASES if case.expected and case.scored}
    assert set(QUICK) == wanted - ONLY_IN_AN_AUDIT
    assert wanted | ONLY_IN_AN_AUDIT == CAUSES_OF[Family.UNKNOWN]
    for cause, name in QUICK.items():
        assert BY_NAME[name].expected == cause


COUNTS_EXAMPLES = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 3)
BY_BATCH_SIZE = {"batch_dependent", "noisy", "correlated_batches"}
"""Proven from the size of batches, or with batches of that size, which Keras before 3.3
does not tell."""


@pytest.mark.parametrize("cause", QUICK)
def test_the_cause_is_named(cause: str) -> None:
    if cause in BY_BATCH_SIZE and not COUNTS_EXAMPLES:
        pytest.skip("the batch size is unknown")
    case: Case = BY_NAME[QUICK[cause]]
    with_probe, without = kit.run_both(case)
    assert with_probe.is_right(case), with_probe.messages
    if cause in ONLY_WITH_A_PROBE:
        assert not without.causes
    else:
        assert without.is_right(case), without.messages


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_said_where_nothing_is_wrong(name: str) -> None:
    case = BY_NAME[name]
    assert case.expected is None
    with_probe, without = kit.run_both(case)
    assert with_probe.messages == without.messages == ()

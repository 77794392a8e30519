"""The advice of each message, taken literally: does the loss fall?

A case is trained as it is, and its message read: every remedy offered is followed in a
training of its own, and has to lower the loss in inference mode on the second half
of the probe. The statistics are recalibrated over the first half.
"""

import re
from collections.abc import Callable

import kit
import pytest
from cases import CASES
from kit import Case, Listening, Run
from remedies import REMEDIES, SPECIAL, as_saved, halves

from bn_callbacks.statistics.losses import CAUSES_OF, Family

pytestmark = pytest.mark.slow

BY_NAME = {case.name: case for case in CASES}

FOLLOWED = [
    "short_regression",
    "two_views_of_raw_rows",
    "like_steps_in_a_short_run",
    "start_far_from_unscaled_inputs",
    "memory_longer_than_progress",
    "short_memory_of_few_pictures",
    "last_batch_of_one_example",
    "one_session_a_batch",
    "two_datasets_in_turn",
    "batch_of_one",
    "optimizer_ema",
    "momentum_one",
    "bfloat16",
    "backbone_frozen_without_compile",
    "an_absurd_value",
    "a_few_wild_rows",
    "one_layer_for_three_sensors",
    "train_step_without_training",
    "a_sensor_for_each_replica",
    "places_among_the_documents_of_a_query",
]

IN_AN_AUDIT = {"stale", "rescaled_inputs"}
"""test_audits.py follows what is said of these."""


def loss(run: Run) -> float:
    """In inference mode, on the half that nothing was measured on; no penalties."""
    _, held_out = halves(run.probe)
    model = as_saved(run.model)
    found = model.evaluate(*held_out, verbose=0, return_dict=True)["loss"]
    return float(found) - float(sum(model.losses))


def offered(message: str, case: Case) -> dict[str, Callable[[], tuple[Run, bool]]]:
    """What the message offers, as trainings; whether each must be strictly better."""
    advice = message.partition("Likely cause: ")[2]
    found = {}
    for name, pattern, follow, is_cure in (*REMEDIES, *SPECIAL.get(case.name, ())):
        said = re.search(pattern, advice)
        if said:
            found[name] = lambda f=follow, s=said, c=is_cure: (f(case, s), c)
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_each_remedy_lowers_the_loss(name: str) -> None:
    case = BY_NAME[name]
    made = kit.build(case)
    monitor = Listening(probe=made.probe)
    made.fit([monitor])
    before = loss(made)
    message = monitor.messages[-1]
    assert f"cause: {case.expected}" in message
    remedies = offered(message, case)
    assert remedies, message
    assert set(remedies) >= {each[0] for each in SPECIAL.get(name, ())}, message
    worse = {}
    for remedy, follow in remedies.items():
        run, is_cure = follow()
        after = loss(run)
        # A loss that is no number is lower than none.
        if after > before or (is_cure and after == before):
            worse[remedy] = after
    assert not worse, (before, worse, message)


def test_every_cause_with_a_remedy_in_training_is_followed() -> None:
    followed = {BY_NAME[name].expected for name in FOLLOWED}
    assert followed == CAUSES_OF[Family.UNKNOWN] - IN_AN_AUDIT

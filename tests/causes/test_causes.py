"""Does `BatchNormMonitor` name the cause of each case, and stay silent otherwise?"""

from typing import Any

import kit
import pytest
from cases import CASES
from kit import Case, Outcome

# Some eight minutes, in which `.ci/run` has another process for test_alarms.py.
pytestmark = pytest.mark.benchmark

SCORED = [case for case in CASES if case.scored]


Outcomes = list[tuple[Case, Outcome]]
PARTS = pytest.mark.parametrize("held_back", [False, True], ids=["tuned", "held back"])
CAUSES = sorted({case.expected for case in SCORED if case.expected})

UNSEEN = {"batch_dependent", "mixed_calls"}
"""Causes that only a probe can show: an average does not tell its calls apart, and
random batches give good averages."""


@pytest.fixture(scope="module")
def both() -> list[tuple[Case, Outcome, Outcome]]:
    return [(case, *kit.run_both(case)) for case in SCORED]


@pytest.fixture(scope="module")
def with_probe(both: Any) -> Outcomes:
    return [(case, outcome) for case, outcome, _ in both]


@pytest.fixture(scope="module")
def without_probe(both: Any) -> Outcomes:
    return [(case, outcome) for case, _, outcome in both]


def wrong(outcomes: Outcomes, held_back: bool) -> tuple[dict[str, Any], int]:
    """What is said of the problems that are not recognised, and how many there are."""
    part = [
        pair for pair in outcomes if pair[0].expected and pair[0].held_back == held_back
    ]
    missed = {case.name: out.causes for case, out in part if not out.is_right(case)}
    return missed, len(part)


def of_cause(outcomes: Outcomes, cause: str) -> dict[str, bool]:
    """Which cases of a cause are recognised."""
    return {
        case.name: out.is_right(case)
        for case, out in outcomes
        if case.expected == cause
    }


def alarms(outcomes: Outcomes) -> dict[str, Any]:
    """What is said where nothing is wrong."""
    return {
        case.name: out.causes
        for case, out in outcomes
        if not case.expected and out.causes
    }


@PARTS
def test_nearly_all_causes_are_named_with_a_probe(
    held_back: bool, with_probe: Outcomes
) -> None:
    missed, count = wrong(with_probe, held_back)
    assert len(missed) <= 0.05 * count, missed


@PARTS
def test_most_causes_are_named_without_a_probe(
    held_back: bool, without_probe: Outcomes
) -> None:
    missed, count = wrong(without_probe, held_back)
    assert len(missed) <= 0.15 * count, missed


@pytest.mark.parametrize("cause", CAUSES)
def test_no_cause_is_forgotten(
    cause: str, with_probe: Outcomes, without_probe: Outcomes
) -> None:
    seen = of_cause(with_probe, cause)
    assert sum(seen.values()) >= 0.75 * len(seen), seen
    if cause not in UNSEEN:
        seen = of_cause(without_probe, cause)
        assert sum(seen.values()) >= 0.75 * len(seen), seen


def test_there_is_no_alarm(with_probe: Outcomes, without_probe: Outcomes) -> None:
    assert not alarms(with_probe)
    # Without losses all that is known is the lag, and one in 50 does no harm.
    quiet = sum(not case.expected for case, _ in without_probe)
    assert len(alarms(without_probe)) <= 0.02 * quiet, alarms(without_probe)


def test_every_cause_has_cases_in_both_parts() -> None:
    causes = {case.expected for case in SCORED}
    assert None in causes
    for cause in causes - {"stale"}:  # its tuned cases are audits
        parts = {case.held_back for case in SCORED if case.expected == cause}
        assert parts == {False, True}, cause

"""Does `BatchNormMonitor` name the cause of each case, and stay silent otherwise?"""

import kit
import pytest
import truth
from cases import CASES
from kit import Case, Outcome

# Some minutes altogether.
pytestmark = pytest.mark.slow

SCORED = [case for case in CASES if case.scored]
PROBLEMS = [case for case in SCORED if case.expected]
SILENT = [case for case in SCORED if not case.expected]


def name(case: Case) -> str:
    return f"{case.expected or 'silent'}-{case.name}"


@pytest.fixture(scope="module")
def without_probe() -> list[tuple[Case, Outcome]]:
    return [(case, kit.run(case, has_probe=False)) for case in SCORED]


@pytest.mark.parametrize("case", PROBLEMS, ids=name)
def test_cause_is_named_with_a_probe(case: Case) -> None:
    outcome = kit.run(case, has_probe=True)
    assert case.expected in outcome.causes, outcome
    assert len(outcome.causes) <= 2, outcome


@pytest.mark.parametrize("case", SILENT, ids=name)
def test_no_alarm_with_a_probe(case: Case) -> None:
    outcome = kit.run(case, has_probe=True)
    assert not outcome.causes, outcome


@pytest.mark.parametrize("held_back", [False, True], ids=["tuned", "held back"])
def test_most_causes_are_named_without_a_probe(
    held_back: bool, without_probe: list[tuple[Case, Outcome]]
) -> None:
    part = [pair for pair in without_probe if pair[0].held_back == held_back]
    problems = [(case, outcome) for case, outcome in part if case.expected]
    wrong = {
        case.name: outcome.causes
        for case, outcome in problems
        if not outcome.is_right(case)
    }
    assert len(wrong) <= 0.3 * len(problems), wrong


def test_one_alarm_at_most_without_a_probe(
    without_probe: list[tuple[Case, Outcome]],
) -> None:
    alarms = {
        case.name: outcome.causes
        for case, outcome in without_probe
        if not case.expected and outcome.causes
    }
    assert len(alarms) <= 1, alarms


def test_every_cause_has_cases_in_both_parts() -> None:
    causes = {case.expected for case in SCORED}
    assert None in causes
    for cause in causes:
        parts = {case.held_back for case in SCORED if case.expected == cause}
        assert parts == {False, True}, cause


@pytest.mark.parametrize("case", SCORED, ids=name)
def test_case_is_what_it_says(case: Case) -> None:
    found = truth.examine(case)
    assert found.is_as(case), found

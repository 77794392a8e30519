"""Has each case the trouble that it claims, apart from any diagnosis?"""

import pytest
import truth
from cases import CASES
from fresh_kit import PROOFS
from kit import Case

# Some eight minutes. Not in `.ci/run`, for it can only change with the cases.
pytestmark = pytest.mark.benchmark


def name(case: Case) -> str:
    return f"{case.expected or 'silent'}-{case.name}"


PROVEN = {id(proof.case) for proof in PROOFS}
"""Those that test_causes.py has a proof of."""

CLAIMED = [case for case in CASES if case.scored and id(case) not in PROVEN]


@pytest.mark.parametrize("case", CLAIMED, ids=name)
def test_case_is_what_it_says(case: Case) -> None:
    found = truth.examine(case)
    assert found.is_as(case), found

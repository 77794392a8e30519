"""Has each case the trouble that it claims, apart from any diagnosis?"""

import fresh_kit
import pytest
import truth
from cases import CASES
from fresh_kit import PROOFS, Proof
from kit import Case

# Some eight minutes. Not in `.ci/run`, for it can only change with the cases.
pytestmark = pytest.mark.benchmark


def name(case: Case) -> str:
    return f"{case.expected or 'silent'}-{case.name}"


PROVEN = {id(proof.case) for proof in PROOFS}
"""Those that have a proof of their own."""

CLAIMED = [case for case in CASES if case.scored and id(case) not in PROVEN]


@pytest.mark.parametrize("case", CLAIMED, ids=name)
def test_case_is_what_it_says(case: Case) -> None:
    found = truth.examine(case)
    assert found.is_as(case), found


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.case.name)
def test_fresh_case_is_cured_by_what_it_says(proof: Proof) -> None:
    is_so, figures = fresh_kit.prove(proof)
    assert is_so, figures

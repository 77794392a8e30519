"""Has each case the trouble that it claims, apart from any diagnosis?"""

import pytest
import truth
from cases import CASES
from kit import Case

# As long as those of test_causes.py, beside which another process runs them.
pytestmark = pytest.mark.benchmark


def name(case: Case) -> str:
    return f"{case.expected or 'silent'}-{case.name}"


@pytest.mark.parametrize("case", [c for c in CASES if c.scored], ids=name)
def test_case_is_what_it_says(case: Case) -> None:
    found = truth.examine(case)
    assert found.is_as(case), found

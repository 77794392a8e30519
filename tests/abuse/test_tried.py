"""Each kind of docs/tried.md, a few times."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tried

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "tried.md"


@pytest.mark.parametrize("kind", tried.KINDS)
def test_everything_holds(kind: str) -> None:
    attempt, factor = tried.KINDS[kind]
    result = attempt(max(1, round(factor)), random.Random(1))
    assert result.held == result.tries > 0


def test_the_page_has_a_row_for_each_kind() -> None:
    page = PAGE.read_text("utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if "|" in line]
    assert [row for row in rows if row in tried.KINDS] == list(tried.KINDS)

"""The benchmarks run, and write their sections into one page."""

import re
import subprocess
import sys
from pathlib import Path

import handful
import pytest
from page import HEAD, PATH, SECTIONS, replaced

from bn_callbacks.layers import facts
from bn_callbacks.measuring import probe
from bn_callbacks.statistics import affine, diagnosis, evidence, losses
from bn_callbacks.watching import warning_filter

HERE = Path(__file__).parent


def titles(page: str) -> list[str]:
    return re.findall(r"^<!-- section (\w+) -->$", page, re.MULTILINE)


def test_a_section_is_put_where_it_belongs() -> None:
    page = replaced("", "causes", "last\n")
    page = replaced(page, "overhead", "first\n")
    assert titles(page) == ["overhead", "causes"]
    assert page.startswith(HEAD)


def test_a_section_is_exchanged_and_the_others_stay() -> None:
    page = replaced(replaced("", "causes", "old\n"), "growth", "stays\n")
    page = replaced(page, "causes", "new\n")
    assert "old" not in page
    assert page.count("stays") == page.count("new") == 1
    assert replaced(page, "causes", "new\n") == page


def test_rows_of_networks_that_are_not_measured_stay() -> None:
    found = handful.kept(PATH, ["residual"])
    assert len(found["dense"]) == len(found["convolutional"]) == 9
    assert not found["residual"]
    assert f"| {' | '.join(found['dense'][0])} |" in PATH.read_text("utf-8")
    assert not any(handful.kept(None, []).values())


def test_the_page_in_the_docs_is_one_of_ours() -> None:
    page = PATH.read_text("utf-8")
    assert page.startswith(HEAD)
    assert set(titles(page)) <= set(SECTIONS)


def test_limits_on_the_page_are_those_of_the_code_and_lie_between():
    page = PATH.read_text("utf-8")
    (section,) = re.findall(r"<!-- section limits -->(.*?)<!-- end -->", page, re.S)
    rows = re.findall(r"^\| `(\w+)`( ✗)? \| ([\d.e-]+) \|", section, re.MULTILINE)
    modules = affine, diagnosis, evidence, facts, losses, probe, warning_filter
    assert len(rows) >= 16
    for name, mark, value in rows:
        (declared,) = (vars(m)[name] for m in modules if name in vars(m))
        assert not mark, name
        assert float(value) == declared, name


@pytest.mark.slow
def test_all_of_it_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--quick", "--markdown", str(page)],
        check=True,
        capture_output=True,
        timeout=900,
    )
    assert titles(page.read_text("utf-8")) == list(SECTIONS)

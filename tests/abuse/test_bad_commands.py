"""Random bad words on the command line: one line that says what is wrong, status 2."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bn_callbacks.cli import main

WORDS = st.one_of(
    st.sampled_from(
        [
            *("demo", "inspect", "recalibrate", "export", "--log-dir", "--model"),
            *("--epochs", "--seed", "--data", "--steps", "--batch-size", "--output"),
            *("--layers", "--json", "--tolerance", "--refine", "--in-place", "--", "-"),
            *("0", "-1", "1e3", "nan", "²", "", " ", "logs", "model.keras", "x.npz"),
        ]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=10),
    st.integers(-(10**12), 10**12).map(str),
)
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


def run(words: list[str]) -> tuple[int, str, str]:
    """Status, output and errors of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def check(words: list[str]) -> None:
    # What asks for help is right, and a bare `demo` would train.
    if {"-h", "--help", "--version"} & set(words) or is_demo(words):
        return
    status, out, err = run(words)
    assert status == 2, words
    assert out == ""
    assert err.startswith("bn-callbacks"), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) < 1500


def is_demo(words: list[str]) -> bool:
    """Whether the demo might be started, which takes its time."""
    return bool(words) and words[0] == "demo" and "²" not in words


@settings(max_examples=100, **SETTINGS)
@given(st.lists(WORDS, max_size=5))
def test_commands(words: list[str]) -> None:
    check(words)


@pytest.mark.slow
@settings(max_examples=1000, **SETTINGS)
@given(st.lists(WORDS, max_size=5))
def test_1000_commands(words: list[str]) -> None:
    check(words)


@pytest.mark.slow
@settings(max_examples=1000, **SETTINGS)
@given(
    st.sampled_from(["--epochs", "--seed", "--model"]),
    st.text(st.characters(exclude_characters="\0"), max_size=10),
)
def test_1000_values_of_the_demo(option: str, value: str) -> None:
    is_number = value.isdecimal()
    if value.startswith("-") or is_number or value.endswith(".keras"):
        return
    status, out, err = run(["demo", option, value])
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_nothing_is_made_by_a_bad_command(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "--log-dir", "logs", "--epochs", "none"])[0] == 2
    assert list(tmp_path.iterdir()) == []

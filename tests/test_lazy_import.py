"""`import bn_callbacks` and `--help` cost next to nothing."""

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bn_callbacks

INIT = Path(bn_callbacks.__file__)


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_the_import_loads_no_framework():
    loaded = python("import sys, bn_callbacks; print(*sys.modules)").split()
    assert not {"keras", "tensorflow", "numpy"} & set(loaded)


def test_dir_lists_the_public_names_and_no_other_loaded_or_not():
    shown = "import bn_callbacks as b; print(*dir(b)); b.audit; print(*dir(b))"
    before, after = python(shown).splitlines()
    assert before == after
    assert before.split() == sorted([*bn_callbacks.__all__, "__version__"])


@pytest.mark.parametrize("name", bn_callbacks.__all__)
def test_a_public_name_is_the_object_at_its_home(name):
    home = importlib.import_module(f"bn_callbacks.{bn_callbacks._HOMES[name]}")
    assert getattr(bn_callbacks, name) is getattr(home, name)
    # The second time, without a detour.
    assert name in vars(bn_callbacks)


def test_a_star_import_gives_all_public_names():
    namespace = {}
    exec("from bn_callbacks import *", namespace)
    assert set(bn_callbacks.__all__) <= set(namespace)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(bn_callbacks, "recalibrat")
    with pytest.raises(AttributeError, match="'bn_callbacks' has no attribute 'nope'"):
        bn_callbacks.nope  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nope'"):
        from bn_callbacks import nope  # noqa: F401


def test_type_checkers_see_the_same_names_from_the_same_homes():
    tree = ast.parse(INIT.read_text("utf-8"))
    shown, hidden = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(shown.test) == "TYPE_CHECKING"
    # A module with `__getattr__` would have every name, for a type checker.
    assert ast.unparse(hidden.test) == "not TYPE_CHECKING"
    assert [node.name for node in hidden.body] == ["__getattr__"]
    seen = {
        alias.name: node.module.removeprefix("bn_callbacks.")
        for node in shown.body
        for alias in node.names
    }
    assert seen == bn_callbacks._HOMES
    assert sorted(seen) == sorted(bn_callbacks.__all__)


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"]])
def test_help_is_there_at_once(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "bn_callbacks", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2  # 0.15 s on a machine with nothing to do.
    assert done.stdout.startswith("usage: bn-callbacks")
    assert not {"keras", "tensorflow", "numpy"} & {
        line.split("|")[-1].strip() for line in done.stderr.splitlines()
    }


def test_a_wrong_path_is_told_before_tensorflow_is_imported():
    command = [sys.executable, "-X", "importtime", "-m", "bn_callbacks"]
    done = subprocess.run(
        [*command, "inspect", "nowhere.keras"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "import time:" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("bn-callbacks: There is no file nowhere.keras.")
    assert "tensorflow" not in done.stderr

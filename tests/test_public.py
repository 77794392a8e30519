"""What a user's editor and type checker see of the public names."""

import inspect
import json
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

import bn_callbacks
from bn_callbacks import recalibrate, recalibrated

SCRIPT = Path(__file__).parent / "typing_script.py"

CALLED = [
    name
    for name in bn_callbacks.__all__
    # Reports, what they consist of, and warnings are made by others.
    if not name.endswith(("Report", "Warning", "Episode"))
]


def callables():
    """Public functions, classes and methods, by the name that a user writes."""
    for name in CALLED:
        thing = getattr(bn_callbacks, name)
        yield name, thing, inspect.getdoc(thing)
        for method, function in vars(thing).items():
            is_own = isinstance(function, types.FunctionType) and "Args:" in (
                function.__doc__ or ""
            )
            if is_own and not method.startswith(("_", "on_")):
                yield f"{name}.{method}", function, inspect.getdoc(function)


def arguments():
    """Name, default and description of each public argument that has a default."""
    for name, thing, doc in callables():
        entries = described(doc)
        for argument in inspect.signature(thing).parameters.values():
            if argument.default is not argument.empty:
                label = f"{name}({argument.name})"
                yield pytest.param(
                    argument.default, entries.get(argument.name, ""), id=label
                )


def described(doc):
    """What the `Args:` of a docstring say of each argument, in one line."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    parts = re.split(r"^    (\w+): ", section.group(1), flags=re.MULTILINE)[1:]
    return {
        name: " ".join(text.split())
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def says_default(default, text):
    """Whether a description says what an argument is by default."""
    value = json.dumps(default) if isinstance(default, str) else str(default)
    if default is None or default == ():  # The words say what that means.
        return "default" in text or "without it" in text
    return "default" in text and re.search(rf"(?<![\w.]){re.escape(value)}", text)


@pytest.mark.parametrize(("default", "text"), list(arguments()))
def test_the_default_of_an_argument_is_in_its_docstring(default, text):
    assert says_default(default, text), text or "Not described"


@pytest.mark.parametrize(
    ("default", "text"),
    [(12, "At most."), (12, "At most, 120.2."), ("auto", "auto"), (None, "Where.")],
)
def test_a_docstring_without_the_default_is_found(default, text):
    assert not says_default(default, text)


def test_there_are_arguments_to_look_at():
    assert len(list(arguments())) > 40


def test_the_block_takes_what_the_function_takes():
    assert (
        inspect.signature(recalibrated).parameters
        == inspect.signature(recalibrate).parameters
    )


def test_arguments_that_take_words_name_them():
    for _, thing, _ in callables():
        target = thing.__init__ if inspect.isclass(thing) else thing
        hints = typing.get_type_hints(inspect.unwrap(target))
        for argument in inspect.signature(thing).parameters.values():
            if isinstance(argument.default, str) and argument.default:
                words = [
                    word
                    for hint in (
                        hints[argument.name],
                        *typing.get_args(hints[argument.name]),
                    )
                    if typing.get_origin(hint) is typing.Literal
                    for word in typing.get_args(hint)
                ]
                assert argument.default in words, (thing, argument)
                assert str not in typing.get_args(hints[argument.name])


def complaints(path):
    """Lines of a script that pyright finds fault with, and the rules."""
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable, path],
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {
        (each["range"]["start"]["line"] + 1, each.get("rule", each["message"]))
        for each in found
    }


@pytest.mark.slow
def test_a_type_checker_finds_the_mistakes_of_a_user_and_nothing_else():
    if "BN_CALLBACKS_CI" not in os.environ:
        pytest.importorskip("pyright", reason='needs pip install -e ".[dev]"')
    wanted = {
        (number, match.group(1))
        for number, line in enumerate(SCRIPT.read_text("utf-8").splitlines(), start=1)
        if (match := re.search(r"# wrong: (\w+)$", line))
    }
    assert len(wanted) > 5
    assert complaints(SCRIPT) == wanted

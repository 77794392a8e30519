"""The command line: options, help, examples, errors, and a run as a user starts it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bn_callbacks
from bn_callbacks import cli, demo
from bn_callbacks.cli.options import parse

ROOT = Path(__file__).parents[2]
FLAGS = re.DOTALL | re.MULTILINE
COMMANDS = (
    *("demo", "inspect", "recalibrate", "export"),
    *("measure", "merge", "apply"),
)


def examples(arguments, capsys):
    """The commands that a help text gives as examples."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    assert max(map(len, help_text.splitlines())) <= 90
    found = re.findall(r"^  bn-callbacks (.*)$", help_text, re.MULTILINE)
    assert found, "There is no example"
    return [shlex.split(line) for line in found]


@pytest.fixture
def received(monkeypatch):
    """What the demo is called with; it does not run."""
    calls = []
    monkeypatch.setattr(
        demo, "run", lambda *args, **options: calls.append((*args, options))
    )
    return calls


@pytest.mark.slow
def test_the_demo_runs_as_a_module_with_its_defaults(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bn_callbacks", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nrecalibrated ") == 1
    assert done.stdout.endswith("tensorboard --logdir logs/demo\n")
    assert "Warning" not in done.stderr
    written = {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*.*")}
    assert written == {
        ("logs", "demo", "as_trained"),
        ("logs", "demo", "debiased"),
        ("logs", "demo", "model.keras"),
    }


def test_defaults(received):
    assert cli.main(["demo"]) == 0
    assert received == [("logs/demo", None, {"epochs": demo.EPOCHS, "seed": 0})]


def test_options(received):
    options = [
        "--log-dir",
        "here",
        "--model",
        "m.keras",
        "--epochs",
        "3",
        "--seed",
        "7",
    ]
    assert cli.main(["demo", *options]) == 0
    assert received == [("here", "m.keras", {"epochs": 3, "seed": 7})]


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"bn-callbacks {bn_callbacks.__version__}\n"


def test_commands_in_the_documentation_are_understood():
    found = []
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(
            r"^```bash\n(.*?)^```$", document.read_text("utf-8"), FLAGS
        ):
            found += re.findall(r"(?:^|&& )bn-callbacks (.*)$", block, re.MULTILINE)
    for line in found:
        assert parse(shlex.split(line)).command in COMMANDS
    assert {line.split()[0] for line in found} == set(COMMANDS)


def test_help_shows_each_command_in_use(capsys):
    assert [example[0] for example in examples(["--help"], capsys)] == list(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_of_a_command_work(command, here, received, capsys):
    if command in ("merge", "apply"):  # They begin with what others write.
        for name in ("part-1.npz", "part-2.npz", "all.npz"):
            arguments = ["model.keras", "--data", "train.npz", "--output", name]
            assert cli.main(["measure", *arguments]) == 0
    for example in examples([command, "--help"], capsys):
        assert example[0] == command
        # The model has trained for too few steps, which data show.
        found = command == "inspect" and "--data" in example
        assert cli.main(example) == found, capsys.readouterr()
    written = {path.name for path in here.iterdir()}
    written -= {"model.keras", "train.npz", "val.npz"}
    parts = {"part-1.npz", "part-2.npz"}
    wanted = {
        "recalibrate": {"new.keras"},
        "export": {"serving"},
        "measure": {"1.npz", "2.npz"},
        "merge": {*parts, "all.npz"},
        "apply": {*parts, "all.npz", "new.keras"},
    }
    assert written == wanted.get(command, set())
    assert len(received) == (command == "demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bn-callbacks: the following arguments are required: COMMAND"),
        (["dome"], "invalid choice: 'dome'"),
        (["demo", "--epochs", "0"], "at least 1. Received: 0"),
        (["demo", "--epochs", "many"], "whole number of at least 1. Received: many"),
        (["demo", "--seed", "-1"], "at least 0. Received: -1"),
        (["demo", "--seed", str(2**32)], "Received: 4294967296"),
        (["demo", "--model", "model.h5"], "must end in .keras. Received: model.h5"),
        (["demo", "--steps", "9"], "unrecognized arguments: --steps 9"),
        (["inspect"], "arguments are required: MODEL.keras"),
        (["inspect", "m.keras", "--steps", "0"], "at least 1. Received: 0"),
        (["recalibrate", "m.keras", "--output", "o.keras"], "required: --data"),
        (["recalibrate", "m.keras", "--data", "d"], "--output --in-place is required"),
        (
            ["recalibrate", "m.keras", "--data", "d", "--output", "o", "--in-place"],
            "--in-place: not allowed with argument --output",
        ),
        (["export", "m.keras", "--data", "d"], "required: --output"),
        (["export", "m", "--tolerance", "0"], "a positive number. Received: 0"),
        (["export", "m", "--tolerance", "few"], "a positive number. Received: few"),
        (["export", "m", "--tolerance", "inf"], "a positive number. Received: inf"),
        (["export", "m", "--refine", "-1"], "at least 0. Received: -1"),
        (["export", "m", "--refine", "much"], "at least 0. Received: much"),
    ],
)
def test_a_wrong_argument_is_one_line_on_stderr(arguments, message, received, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert err.endswith("--help.\n")
    assert not received


def test_the_options_of_a_recalibration_reach_it():
    given = "--steps 3 --batch-size 8 --tolerance 0.01 --refine 0 --dropout --layers a "
    given += "--layers b --prior stored --validation v --features f "
    given += "--json --debug --unsafe"
    options = parse(["export", "m", "--data", "d", "--output", "o", *given.split()])
    assert vars(options) == {
        "command": "export",
        "model": "m",
        "data": "d",
        "output": "o",
        "steps": 3,
        "batch_size": 8,
        "tolerance": 0.01,
        "refine": 0,
        "dropout": True,
        "layers": ["a", "b"],
        "prior": "stored",
        "validation": "v",
        "features": "f",
        "custom_objects": None,
        "json": True,
        "debug": True,
        "unsafe": True,
    }


def test_refining_is_automatic_unless_a_number_is_given():
    given = ["export", "m", "--data", "d", "--output", "o"]
    assert parse(given).refine == "auto"
    assert parse([*given, "--refine", "auto"]).refine == "auto"


def test_missing_scikit_learn_is_one_line_on_stderr(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--log-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "bn-callbacks: The demo needs scikit-learn, which is not installed. Install it "
        'with: python -m pip install "bn-callbacks[demo]"\n'
    )


def test_a_log_dir_that_is_a_file_is_one_line_on_stderr(tmp_path, capsys):
    (tmp_path / "logs").touch()
    assert cli.main(["demo", "--log-dir", str(tmp_path / "logs")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{tmp_path / 'logs'} is no directory. Name one for" in err

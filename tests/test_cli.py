"""The command line: options, help, errors, and one run as a user starts it."""

import subprocess
import sys

import pytest

from bn_callbacks import cli, demo


@pytest.fixture
def received(monkeypatch):
    """What the demo is called with; it does not run."""
    calls = []
    monkeypatch.setattr(
        demo, "run", lambda *args, **options: calls.append((*args, options))
    )
    return calls


def test_the_demo_runs_as_a_module_with_its_defaults(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bn_callbacks", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.count("recalibrated")) == (0, 1), done.stderr
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


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_has_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    assert (
        "example:\n  bn-callbacks demo --log-dir logs/demo" in capsys.readouterr().out
    )


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
    assert f"File exists: '{tmp_path / 'logs'}'" in err

"""Small saved models and data, made once; each test gets copies of its own."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest

from bn_callbacks import cli

# What the tests of this directory share, for `import cli_kit`.
sys.path.insert(0, str(Path(__file__).parent))

from cli_kit import make_model


@dataclass(frozen=True)
class Ran:
    """What a command has returned and printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Runs a command in this process."""

    def run_command(*arguments):
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    return run_command


@pytest.fixture
def fails(run):
    """Runs a command that fails. Returns the one line that it says."""

    def run_failing(*arguments, status=2):
        ran = run(*arguments)
        assert ran.status == status, ran
        assert ran.err.count("\n") == 1
        assert ran.err.startswith("bn-callbacks: ")
        assert "Traceback" not in ran.err
        return ran.err

    return run_failing


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(3, 2, (256, 4)).astype("float32")
    y = np.abs(x[:, :1] - 3) + x[:, 1:2]
    model = make_model()
    model.fit(x, y, epochs=6, batch_size=32, verbose=0)
    model.save(directory / "model.keras")
    np.savez(directory / "train.npz", x=x[:192], y=y[:192])
    np.savez(directory / "val.npz", x=x[192:], y=y[192:])
    return directory


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The working directory, with `model.keras`, `train.npz` and `val.npz`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # Commands put the working directory there, for modules of the user's own.
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def untouched(here):
    """Asserts that a test leaves the directory as it was."""
    before = _content(here)
    yield here
    assert _content(here) == before


def _content(directory):
    return {
        path: None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
        if path.name != "__pycache__" and path.suffix != ".pyc"
    }

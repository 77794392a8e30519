"""Models, data and directories of strangers: nothing of theirs runs or misleads."""

import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

from bn_callbacks import audit
from bn_callbacks.cli import archives, modules, serving
from bn_callbacks.names import printable

FORGED = "bn\n\x1b[2Kall layers are healthy\u202e"


def test_names_are_printed_in_one_line_and_without_controls():
    shown = printable(FORGED)
    assert shown == "bn\\n\\x1b[2Kall layers are healthy\\u202e"
    assert printable("schön / naïve 層") == "schön / naïve 層"
    assert printable("\udcff\x9b\u2028\u200b\u00ad").isprintable()


def forged_model(path):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(name=FORGED),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(path)
    return model


def assert_clean(text):
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\nall layers are healthy" not in text


def test_names_of_layers_do_not_reach_the_terminal_raw(run, here):
    model = forged_model("model.keras")
    report = audit(model)
    for text in (str(report), report._repr_html_(), report.layers[0].path):
        assert_clean(text)
    for arguments in (
        ("inspect", "model.keras"),
        ("inspect", "model.keras", "--data", "train.npz", "--json"),
        ("inspect", "model.keras", "--layers", "nothing"),
        ("recalibrate", "model.keras", "--data", "train.npz", "--output", "n.keras"),
    ):
        ran = run(*arguments)
        assert_clean(ran.out + ran.err)
    # As it is shown it can be named.
    (layer,) = json.loads(run("inspect", "model.keras", "--json").out)["layers"]
    ran = run("inspect", "model.keras", "--layers", layer["path"])
    assert ran.status == 1


def test_names_of_files_and_data_do_not_reach_the_terminal_raw(run, here):
    name = "\x1b[31m\nm\u202e"
    os.rename("model.keras", f"{name}.keras")
    np.savez(f"{name}.npz", **{"x": np.ones((8, 4)), "\x1b[2K": np.ones(8)})
    for arguments in (
        ("inspect", f"{name}.keras", "--data", f"{name}.npz"),
        ("inspect", f"no{name}.keras"),
        ("inspect", f"{name}.keras", "--data", f"no{name}"),
        ("recalibrate", f"{name}.keras", "--data", f"{name}.npz",
         "--output", f"new{name}.keras"),
    ):  # fmt: skip
        ran = run(*arguments)
        assert_clean(ran.out + ran.err)
        assert ran.status in (0, 1) or ran.err.count("\n") == 1


# --- Archives


def pack(path, sizes, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, size in sizes.items():
            with archive.open(name, "w") as member:
                for start in range(0, size, 2**20):
                    member.write(b" " * min(2**20, size - start))


@pytest.mark.parametrize(
    ("member", "size"),
    [("config.json", 300), ("model.weights.h5", 300), ("assets/x", 300)],
)
def test_a_file_that_unpacks_to_the_absurd_is_not_opened(
    fails, here, monkeypatch, member, size
):
    pack("bomb.keras", {"config.json": 10, member: size * 2**20})
    assert os.path.getsize("bomb.keras") < 2**20
    line = fails("inspect", "bomb.keras")
    assert "is no ordinary model, and was not opened" in line
    assert "unpack to 31" in line


def test_members_that_are_there_twice_are_refused(fails, here):
    with (
        zipfile.ZipFile("model.keras", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("config.json", "{}")
    assert "holds 'config.json' more than once" in fails("inspect", "model.keras")


def test_large_models_are_no_bombs(here):
    """Weights do not compress; and a small file may be mostly zeros."""
    pack("zeros.keras", {"config.json": 10, "model.weights.h5": 60 * 2**20})
    archives.check_archive(here / "zeros.keras")
    pack(
        "big.keras",
        {"config.json": 10, "model.weights.h5": 200 * 2**20},
        zipfile.ZIP_STORED,
    )
    archives.check_archive(here / "big.keras")


@pytest.mark.parametrize(
    ("text", "says", "not_said"),
    [
        (
            "Requested the deserialization of a `TFSMLayer`, which loads an external "
            "SavedModel. … passing `safe_mode=False` to the loading function",
            "holds a TFSMLayer",
            "--unsafe",
        ),
        (
            "Requested the loading of a vocabulary file outside of the model archive. "
            "… `keras.config.enable_unsafe_deserialization(). Vocabulary file: 'x'",
            "wants to read a vocabulary file",
            "--unsafe",
        ),
        (
            "Something new is unsafe. If you trust the source of the artifact, you can "
            "override this error by passing `safe_mode=False`",
            "Keras says: Something new is unsafe.",
            "safe_mode=False",
        ),
        (
            "The `function` of this `Lambda` layer is a Python lambda. safe_mode=False",
            "--custom-objects",
            "vocabulary",
        ),
    ],
)
def test_what_safe_mode_refuses_is_called_by_its_name(
    fails, here, monkeypatch, text, says, not_said
):
    def load(*_, **__):
        raise ValueError(text)

    monkeypatch.setattr(keras.saving, "load_model", load)
    line = fails("inspect", "model.keras")
    assert says in line
    assert not_said not in line


# --- What lies in the working directory

TRAPS = ("json", "random", "tensorflow", "numpy", "keras", "zipfile", "argparse")


def lay_traps(directory):
    for name in TRAPS:
        (directory / f"{name}.py").write_text("open('sprung', 'a').write(__name__)\n")


def test_the_process_that_serves_is_isolated(run, here):
    lay_traps(here)
    ran = run("export", "model.keras", "--data", "train.npz", "--output", "serving/1")
    assert (ran.status, ran.err) == (0, "")
    assert not (here / "sprung").exists()


def test_the_process_that_serves_has_our_own_packages():
    homes = serving._homes()
    assert all(os.path.isabs(home) for home in homes)
    assert any(os.path.isdir(os.path.join(home, "bn_callbacks")) for home in homes)
    assert any(os.path.isdir(os.path.join(home, "tensorflow")) for home in homes)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-m", "script"])
def test_no_command_imports_what_lies_where_it_runs(here, program):
    lay_traps(here)
    (here / "own_data.py").write_text(
        "import numpy as np\n"
        "from helper import SIZE\n"
        "def make():\n"
        "    return np.ones((SIZE, 4), 'float32')\n"
    )
    (here / "helper.py").write_text("SIZE = 64\n")
    start = [sys.executable, "-m", "bn_callbacks"]
    if program == "script":
        start = [os.path.join(os.path.dirname(sys.executable), "bn-callbacks")]
        if not os.path.exists(start[0]):
            pytest.skip("the command is not installed")
    for arguments in (
        ("export", "model.keras", "--data", "train.npz", "--output", "serving/1"),
        ("inspect", "model.keras", "--data", "own_data:make"),
    ):
        done = subprocess.run(
            [*start, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 1), done.stderr
        assert not (here / "sprung").exists()


def test_a_module_of_ones_own_comes_before_installed_ones_and_after_pythons(
    here, monkeypatch
):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(here)])
    (here / "sklearn.py").write_text("MINE = True\n")
    (here / "json.py").write_text("MINE = True\n")
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    assert modules.import_module("sklearn").MINE
    monkeypatch.delitem(sys.modules, "sklearn")
    assert not hasattr(modules.import_module("json"), "MINE")
    assert sys.path[-1] == str(here)

"""`bn-callbacks recalibrate`: what it writes, and what it leaves alone."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from bn_callbacks import cli
from bn_callbacks.auditing import audit
from bn_callbacks.cli import writing
from bn_callbacks.cli.errors import CommandError
from bn_callbacks.cli.patching import SavedStatistics

RECALIBRATE = ("recalibrate", "model.keras", "--data", "train.npz")


def stored(path):
    """Every variable of a saved model, its optimizer's too, by path."""
    model = keras.models.load_model(path)
    variables = [*model.variables, *model.optimizer.variables]
    return {f"{i} {v.path}": np.array(v.value) for i, v in enumerate(variables)}


@pytest.fixture(scope="module")
def done(made, tmp_path_factory):
    """One run, with what it has printed; `made` is the directory from before."""
    directory = tmp_path_factory.mktemp("done")
    shutil.copytree(made, directory, dirs_exist_ok=True)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([*RECALIBRATE, "--output", "a/b/new.keras"])
    return SimpleNamespace(
        directory=directory, status=status, out=out.getvalue(), err=err.getvalue()
    )


def test_the_output_is_made_with_its_directories(done, made):
    assert (done.status, done.err) == (0, "")
    written = {path.name for path in done.directory.rglob("*")}
    assert written == {"a", "b", "new.keras", *(path.name for path in made.iterdir())}


def test_nothing_but_the_moving_statistics_changes(done, made):
    before = stored(made / "model.keras")
    after = stored(done.directory / "a/b/new.keras")
    assert list(after) == list(before)
    changed = [key for key in after if not np.array_equal(after[key], before[key])]
    assert [key.split("/")[-1] for key in changed] == ["moving_mean", "moving_variance"]
    one, other = (path / "model.keras" for path in (done.directory, made))
    assert one.read_bytes() == other.read_bytes()


def test_the_statistics_are_those_of_the_data(done):
    model = keras.models.load_model(done.directory / "a/b/new.keras")
    x = np.load(done.directory / "train.npz")["x"].astype(float)
    kernel, bias = map(np.float64, model.layers[0].get_weights())
    inputs = x @ kernel + bias
    bn = model.get_layer("bn")
    np.testing.assert_allclose(bn.moving_mean, inputs.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bn.moving_variance, inputs.var(0), rtol=1e-5)


def test_before_and_after_are_printed_in_plain_lines(done):
    out = done.out
    assert out.startswith("Recalibrating model.keras with train.npz\n\nBefore:\n\n")
    assert "\nRecalibrated 1 BatchNormalization layer over 192 samples (6 b" in out
    assert out.endswith("Saved a/b/new.keras.\n")
    assert "\b" not in out
    assert "\r" not in out


def test_a_terminal_shows_a_progress_bar_and_the_same(run, here, monkeypatch, capsys):
    # capsys has replaced it by a file that is no terminal.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = run(*RECALIBRATE, "--output", "new.keras").out
    assert "6/6" in out
    assert out.count("Recalibrated 1 BatchNormalization layer") == 1
    assert "Before:\n\n1 of 1 BatchNormalization layers" in out
    assert out.endswith("Saved new.keras.\n")


def test_json_is_all_that_stdout_gets(run, here):
    ran = run(*RECALIBRATE, "--output", "new.keras", "--json", "--steps", "3")
    content = json.loads(ran.out)
    assert (ran.status, ran.err) == (0, "")
    assert (content["model"], content["output"]) == ("model.keras", "new.keras")
    assert (content["committed"], content["batches"], content["samples"]) == (
        True,
        3,
        96,
    )
    assert content["before"]["layers"][0]["path"] == "bn"
    assert content["residual"] < 1e-3
    assert not any(key.startswith("_") for key in content)


def test_in_place_replaces_the_model_and_keeps_its_mode(run, here):
    os.chmod("model.keras", 0o640)
    assert run(*RECALIBRATE, "--in-place").status == 0
    assert stat.S_IMODE(os.stat("model.keras").st_mode) == 0o640
    x = np.load("train.npz")["x"]
    assert audit(keras.models.load_model("model.keras"), x).max_lag < 1e-3
    assert {path.name for path in here.iterdir()} == {
        "model.keras",
        "train.npz",
        "val.npz",
    }


def test_a_link_in_place_still_leads_to_the_model(run, here):
    (here / "link.keras").symlink_to("model.keras")
    before = (here / "model.keras").read_bytes()
    ran = run("recalibrate", "link.keras", "--data", "train.npz", "--in-place")
    assert ran.status == 0
    assert (here / "link.keras").is_symlink()
    assert (here / "model.keras").read_bytes() != before


def test_an_output_of_another_run_is_replaced(run, here):
    (here / "new.keras").write_text("old")
    ran = run(*RECALIBRATE, "--validation", "val.npz", "--output", "new.keras")
    assert ran.status == 0
    assert "; validation loss " in ran.out
    assert keras.models.load_model("new.keras").get_layer("bn")


@pytest.mark.parametrize("link", [False, True])
def test_the_model_is_not_overwritten_without_being_asked(fails, untouched, link):
    output = "model.keras"
    if link:
        output = "link.keras"
        (untouched / output).hardlink_to(untouched / "model.keras")
    line = fails(*RECALIBRATE, "--output", output)
    assert "is the model itself" in line
    assert "--in-place" in line
    if link:
        (untouched / output).unlink()


def test_what_would_raise_the_validation_loss_is_not_written(run, untouched):
    # Of the inverse of what the model has learnt, its batch statistics know nothing.
    model = keras.models.load_model("model.keras")
    x = np.load("val.npz")["x"]
    np.savez("own.npz", x=x, y=model.predict(x, verbose=0))
    ran = run(*RECALIBRATE, "--validation", "own.npz", "--output", "new.keras")
    assert ran.status == 1
    assert "Kept the old statistics of 1 BatchNormalization layer" in ran.out
    assert ran.out.endswith("recalibration would raise the validation loss.\n")
    ran = run(*RECALIBRATE, "--validation", "own.npz", "--in-place", "--json")
    content = json.loads(ran.out)
    assert (ran.status, content["committed"], content["output"]) == (1, False, None)
    assert content["loss_after"] > content["loss_before"] == pytest.approx(0, abs=1e-9)
    (untouched / "own.npz").unlink()


def test_validation_needs_targets(fails, untouched):
    np.save("x.npy", np.load("val.npz")["x"])
    line = fails(*RECALIBRATE, "--validation", "x.npy", "--output", "new.keras")
    assert "targets=False" in line
    (untouched / "x.npy").unlink()


def test_a_model_without_batch_normalization_is_an_error(fails, here):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]).save("plain.keras")
    line = fails(
        "recalibrate", "plain.keras", "--data", "train.npz", "--output", "o.keras"
    )
    assert "no BatchNormalization layer to recalibrate" in line


def test_ctrl_c_while_reading_leaves_nothing(untouched, capsys, run, monkeypatch):
    (untouched / "slow_data.py").write_text(
        "import numpy as np\n"
        "def make():\n"
        "    yield np.ones((8, 4), 'float32')\n"
        "    raise KeyboardInterrupt\n"
    )
    ran = run(
        "recalibrate",
        "model.keras",
        "--data",
        "slow_data:make",
        "--output",
        "new.keras",
    )
    assert (ran.status, ran.err.count("\n")) == (130, 1)
    assert ran.err == "bn-callbacks: interrupted, no output was written\n"
    (untouched / "slow_data.py").unlink()


@pytest.mark.parametrize(
    ("target", "error", "status", "says"),
    [
        (("--output", "new.keras"), KeyboardInterrupt(), 130, "interrupted"),
        (("--in-place",), OSError(28, "Disk full"), 2, "Disk full. Nothing was"),
    ],
)
def test_what_ends_the_saving_leaves_nothing(
    run, untouched, monkeypatch, error, status, says, target
):
    def write(self, path):
        path.write_text("half a model")
        raise error

    monkeypatch.setattr(SavedStatistics, "write", write)
    ran = run(*RECALIBRATE, *target)
    assert (ran.status, ran.err.count("\n")) == (status, 1)
    assert says in ran.err


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("name", ["new.keras", "a/b/new.keras", "model.keras", "d/e"])
def test_what_ends_the_writing_leaves_nothing(untouched, error, name):
    def write():
        with writing.replacing(untouched / name) as new:
            if new.suffix:
                new.write_text("half")
            else:
                (new / "deep").mkdir(parents=True)
                (new / "deep" / "file").write_text("half")
            raise error("early")

    with pytest.raises(CommandError if error is OSError else error):
        write()


def test_a_directory_made_for_an_output_stays_if_others_use_it(here):
    def write():
        with writing.replacing(here / "a" / "b" / "new.keras"):
            (here / "a" / "theirs").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in (here / "a").iterdir()] == ["theirs"]


def test_a_full_disk_leaves_nothing(fails, untouched):
    # A limit on the size of files: writing fails half-way, as on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        line = fails(*RECALIBRATE, "--in-place")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.endswith(
        "Cannot write model.keras: File too large. Nothing was left behind. Make room, "
        "or write to another place.\n"
    )


def test_a_read_only_directory_is_an_error(fails, untouched):
    closed = untouched / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    # For root nothing is read-only, but /proc.
    is_root = os.access(closed, os.W_OK)
    output = "/proc/new.keras" if is_root else closed / "new.keras"
    line = fails(*RECALIBRATE, "--output", output)
    assert "read-only" in line or f"Cannot write {output}" in line
    closed.chmod(0o755)
    closed.rmdir()


def test_a_directory_that_denies_writing_is_told_before_any_work(
    fails, untouched, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    line = fails(*RECALIBRATE, "--output", "new.keras")
    assert f"The directory {untouched} is read-only." in line


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("new.h5", "must end in .keras. Received: new.h5"),
        ("train.npz/new.keras", "train.npz is a file, not a directory"),
        ("folder.keras", "folder.keras is a directory. Name a file."),
    ],
)
def test_an_output_that_cannot_be(fails, here, output, says):
    (here / "folder.keras").mkdir()
    assert says in fails(*RECALIBRATE, "--output", output)


def test_the_file_is_on_the_disk_before_it_takes_its_place(here, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda f: done.append(os.fstat(f).st_ino) or fsync(f)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("put") or replace(a, b))
    with writing.replacing(here / "new.keras") as new:
        assert new.parent == here
        assert new.suffix == ".keras"
        new.write_text("content")
        inode = new.stat().st_ino
    assert done == [inode, "put", here.stat().st_ino]
    assert (here / "new.keras").read_text() == "content"


def test_a_directory_takes_its_place_with_all_that_is_in_it(here):
    with writing.replacing(here / "new") as new:
        (new / "deep").mkdir(parents=True)
        (new / "deep" / "file").write_text("content")
    assert (here / "new" / "deep" / "file").read_text() == "content"
    again = writing.replacing(here / "new")
    with pytest.raises(CommandError, match="not empty"), again as new:
        new.mkdir()
    assert [path.name for path in here.iterdir() if path.is_dir()] == ["new"]


def heed_ctrl_c() -> None:
    """A process that runs in the background, as tests may, ignores Ctrl-C otherwise."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGINT of this kind")
def test_a_real_ctrl_c_leaves_nothing(untouched):
    (untouched / "endless.py").write_text(
        "import time, numpy as np\n"
        "def make():\n"
        "    while True:\n"
        "        open('started', 'w').close()\n"
        "        time.sleep(0.05)\n"
        "        yield np.ones((8, 4), 'float32')\n"
    )
    command = ["recalibrate", "model.keras", "--data", "endless:make"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bn_callbacks", *command, "--output", "new.keras"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509 (no threads are involved)
    )
    deadline = time.monotonic() + 120
    while not (untouched / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "bn-callbacks: interrupted, no output was written\n"
    for name in ("endless.py", "started"):
        (untouched / name).unlink()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGINT of this kind")
def test_a_real_ctrl_c_while_an_export_is_verified_leaves_nothing(untouched):
    command = ["export", "model.keras", "--data", "train.npz", "--output", "a/1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bn_callbacks", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509 (no threads are involved)
    )
    deadline = time.monotonic() + 120
    while not list(untouched.glob("a/.*/*.pb")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    # As a terminal does: to the process that serves, too.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "bn-callbacks: interrupted, no output was written\n"


@pytest.mark.slow
def test_stderr_of_a_process_holds_the_error_alone(untouched):
    (untouched / "torn.keras").write_bytes(
        (untouched / "model.keras").read_bytes()[:-2000] + b"\0" * 2000
    )
    environment = {k: v for k, v in os.environ.items() if k[:3] not in ("TF_", "CUD")}
    for arguments in (
        ["inspect", "torn.keras"],
        ["inspect", "model.keras", "--data", "nothing:here"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "bn_callbacks", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1, done.stderr
    (untouched / "torn.keras").unlink()


def test_prior_is_for_a_handful_of_examples(here, capsys):
    few = ["--prior", "stored", "--steps", "1", "--batch-size", "8"]
    status = cli.main([*RECALIBRATE, *few, "--output", "few.keras"])
    printed = capsys.readouterr().out
    assert status == 0
    assert "of the way to the sample" in printed
    status = cli.main([*RECALIBRATE, *few, "--json", "--output", "few.keras"])
    (layer,) = json.loads(capsys.readouterr().out)["shrinkage"]
    assert (status, layer["path"]) == (0, "bn")
    assert layer["error"] > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--prior", "stored", "--refine", "1"],
            "--prior cannot be combined with --refine or --tolerance: the examples "
            "decide how far to correct the statistics. Received: --prior stored with "
            "--refine 1. Leave out --prior, or all others.",
        ),
        (["--prior", "stored", "--steps", "1", "--batch-size", "2"], "at least 3"),
    ],
)
def test_prior_says_what_it_needs(here, capsys, options, message):
    assert cli.main([*RECALIBRATE, *options, "--output", "few.keras"]) == 2
    assert message in capsys.readouterr().err

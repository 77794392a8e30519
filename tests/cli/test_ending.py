"""How commands end: status and message follow the disk, and nothing is left behind."""

import io
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import keras
import pytest

from bn_callbacks import cli
from bn_callbacks.cli import ending, export, paths, writing
from bn_callbacks.cli import recalibrate as command
from bn_callbacks.cli.errors import CommandError

RECALIBRATE = ("recalibrate", "model.keras", "--data", "train.npz")
SAVING = (*RECALIBRATE, "--output", "new.keras")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Signals and modes of POSIX")


@pytest.fixture(autouse=True)
def _usual_mask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def raising(error):
    def act(*_, **__):
        raise error

    return act


# --- Status and message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "interrupted, but new.keras was written before"),
        (ending.Terminated(signal.SIGTERM), "terminated by SIGTERM, but new.keras was"),
        (OSError(5, "Input/output error"), "new.keras was written. After that: "),
    ],
    ids=repr,
)
def test_what_comes_after_the_renaming_does_not_undo_it(
    run, here, monkeypatch, error, says
):
    monkeypatch.setattr(command, "say_result", raising(error))
    ran = run(*SAVING)
    assert (ran.status, ran.err.count("\n")) == (0, 1)
    assert says in ran.err
    assert "no output" not in ran.err
    assert keras.models.load_model("new.keras").get_layer("bn")


@pytest.mark.parametrize("is_after", [False, True])
def test_ctrl_c_in_the_renaming_itself(run, here, monkeypatch, is_after):
    own = os.replace

    def replace(one, other):
        if is_after:
            own(one, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    ran = run(*SAVING)
    assert (ran.status == 0) == (here / "new.keras").exists() == is_after
    assert ("new.keras was written" in ran.err) == is_after
    assert not list(here.glob(".bn-callbacks*"))


def test_a_name_that_stdout_cannot_encode(here, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main([*RECALIBRATE, "--output", "né.keras"]) == 0
    assert out.buffer.getvalue().endswith(b"Saved n\\xe9.keras.\n")
    assert (here / "né.keras").exists()


class Deaf(io.StringIO):
    """Nobody reads it, or its disk is full, from some line on."""

    def __init__(self, error, lines):
        super().__init__()
        self.error, self.left = error, lines

    def write(self, text):
        self.left -= text.count("\n")
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("lines", [0, 1, 4])
def test_a_reader_that_goes_away_does_not_end_the_work(
    here, monkeypatch, capsys, lines
):
    monkeypatch.setattr(sys, "stdout", Deaf(BrokenPipeError(32, "Broken pipe"), lines))
    assert cli.main(list(SAVING)) == 0
    assert (here / "new.keras").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "status"), [(SAVING, 0), (("inspect", "model.keras"), 2)]
)
def test_a_full_disk_under_stdout_is_told(here, monkeypatch, capsys, arguments, status):
    monkeypatch.setattr(sys, "stdout", Deaf(OSError(28, "No space left"), 1))
    assert cli.main(list(arguments)) == status
    assert "cannot write to stdout: No space left" in capsys.readouterr().err


def wait_for(number):
    os.kill(os.getpid(), number)
    time.sleep(5)


def test_no_signal_is_touched_that_somebody_ignores():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending.heeding_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(ending.Terminated, match="terminated by SIGTERM"):
                wait_for(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_is_cleaned_up_after_and_gives_143(run, untouched, monkeypatch):
    def verify(*_):
        assert list(untouched.glob("a/.bn-callbacks-*"))
        wait_for(signal.SIGTERM)

    monkeypatch.setattr(export, "verify", verify)
    ran = run("export", "model.keras", "--data", "train.npz", "--output", "a/1")
    assert ran.status == 143
    assert ran.err == "bn-callbacks: terminated by SIGTERM, no output was written\n"


# --- Modes and owners


def test_nobody_else_can_read_what_is_not_done(here):
    seen = []
    with writing.replacing(here / "new") as new:
        (new / "deep").mkdir(parents=True)
        (new / "deep" / "file").write_text("secret")
        seen += [stat.S_IMODE(path.stat().st_mode) for path in (new, new / "deep")]
        seen.append(stat.S_IMODE((new / "deep" / "file").stat().st_mode))
    assert seen == [0o700, 0o700, 0o600]
    modes = [here / "new", here / "new/deep", here / "new/deep/file"]
    assert [stat.S_IMODE(p.stat().st_mode) for p in modes] == [0o755, 0o755, 0o644]


def test_a_new_file_gets_the_mode_that_any_file_gets(run, here):
    os.umask(0o027)
    assert run(*SAVING).status == 0
    assert stat.S_IMODE(os.stat("new.keras").st_mode) == 0o640


def test_owner_and_attributes_are_kept_where_that_is_permitted(here):
    path = here / "model.keras"
    os.chmod(path, 0o604)
    expected = {}
    try:
        os.setxattr(path, "user.origin", b"here")
        expected["user.origin"] = b"here"
    except OSError:  # Not on every file system.
        pass
    if os.geteuid() == 0:
        os.chown(path, 12345, 23456)
    before = path.stat()
    with writing.replacing(path) as new:
        new.write_text("other")
    after = path.stat()
    assert path.read_text() == "other"
    for name in ("st_uid", "st_gid", "st_mode"):
        assert getattr(after, name) == getattr(before, name)
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == expected


def test_a_group_that_cannot_be_kept_gives_its_rights_to_no_other(here, monkeypatch):
    path = here / "model.keras"
    os.chmod(path, 0o664)
    if os.geteuid() != 0:
        pytest.skip("only root can give a file another group")
    os.chown(path, -1, 23456)
    monkeypatch.setattr(os, "chown", raising(PermissionError(1, "no")))
    with writing.replacing(path) as new:
        new.write_text("other")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


# --- What others have left


def dead_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_what_dead_processes_left_is_swept(here):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = writing._host()
    left = [
        here / f".bn-callbacks-{host}-{dead_process()}-00.keras",
        here / f".bn-callbacks-{host}-{os.getpid()}-01",
    ]
    kept = [
        here / f".bn-callbacks-{host}-{living.pid}-02.keras",
        here / f".bn-callbacks-00000000-{dead_process()}-03.keras",
        here / ".bn-callbacks-mine.keras",
    ]
    for path in (left[0], *kept):
        path.touch()
    (left[1] / "deep").mkdir(parents=True)
    with writing.replacing(here / "new.keras") as new:
        new.write_text("content")
        with writing.replacing(here / "other.keras") as other:
            other.write_text("content")
    living.communicate(b"\n")
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
    assert (here / "new.keras").read_text() == "content"


def test_a_temporary_folder_is_private_and_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.tempfile, "gettempdir", lambda: str(tmp_path))
    left = tmp_path / f"bn-callbacks-{writing._host()}-{dead_process()}-00"
    left.mkdir()

    def work():
        with writing.temporary_folder() as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "samples.npz").write_text("theirs")
            raise ending.Terminated(signal.SIGTERM)

    with pytest.raises(ending.Terminated):
        work()
    assert list(tmp_path.iterdir()) == []


# --- Outputs that cannot be


def test_a_pipe_a_socket_and_a_device_are_refused(fails, here, monkeypatch):
    os.mkfifo("pipe.keras")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.keras")
    listener.close()
    os.symlink(os.devnull, "null.keras")
    monkeypatch.setattr(cli, "_import_tensorflow", raising(AssertionError("too late")))
    for name in ("pipe.keras", "socket.keras"):
        assert "is no file, but a pipe" in fails(*RECALIBRATE, "--output", name)
    line = fails(*RECALIBRATE, "--output", "null.keras")
    assert f"null.keras is a link to {os.devnull}, whose name does not end" in line
    assert stat.S_ISFIFO(os.stat("pipe.keras").st_mode)


def test_links_to_other_names_are_refused(fails, here):
    (here / "blob").write_bytes((here / "model.keras").read_bytes())
    os.symlink("blob", "link.keras")
    os.symlink("nowhere.bin", "dangling.keras")
    for arguments in (
        ("recalibrate", "link.keras", "--data", "train.npz", "--in-place"),
        (*RECALIBRATE, "--output", "dangling.keras"),
    ):
        assert "whose name does not end in .keras" in fails(*arguments)


@pytest.mark.parametrize("name", [".", "..", "/", "sub/.."])
def test_where_the_command_runs_is_no_output(fails, tmp_path, made, monkeypatch, name):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty")
    (tmp_path / "empty" / "sub").rmdir()
    if name == "sub/..":
        name = str(tmp_path / "empty")
    model = made / "model.keras"
    line = fails("export", model, "--data", "train.npz", "--output", name)
    assert "is where this command runs" in line or "is not empty" in line


@pytest.mark.parametrize(
    "arguments",
    [
        (*RECALIBRATE, "--output", "new.keras"),
        ("export", "model.keras", "--data", "train.npz", "--output", "new.keras"),
    ],
)
def test_a_mount_point_is_refused(fails, here, monkeypatch, arguments):
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "new.keras")
    assert "new.keras is a mount point, and cannot be" in fails(*arguments)


def test_a_file_that_is_mounted_is_seen(monkeypatch, tmp_path):
    target = tmp_path / "with space.keras"
    target.touch()
    text = f"36 35 98:0 / {str(target).replace(' ', chr(92) + '040')} rw - ext4 dev rw"
    monkeypatch.setattr(paths.Path, "read_text", lambda *_: text)
    with pytest.raises(CommandError, match="is a mount point"):
        paths._check_mount(target)


def test_a_folder_in_place_of_the_demos_model_is_refused(fails, here):
    (here / "m.keras").mkdir()
    line = fails("demo", "--log-dir", "logs", "--model", "m.keras")
    assert "m.keras is a directory. Name a file." in line
    assert not (here / "logs").exists()


def test_a_name_that_is_too_long_is_refused_before_the_work(fails, untouched):
    line = fails(*RECALIBRATE, "--output", f"{'x' * 300}.keras")
    assert "name too long" in line.lower()


# --- Real processes


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "bn_callbacks", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_a_real_sigterm_leaves_nothing(untouched, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("tmp")
    environment = {**os.environ, "TMPDIR": str(temporary)}
    arguments = ("export", "model.keras", "--data", "train.npz", "--output", "a/1")
    process = start(*arguments, env=environment)
    deadline = time.monotonic() + 120
    while not list(temporary.glob("*/given.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err == "bn-callbacks: terminated by SIGTERM, no output was written\n"
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_real_pipe_that_is_closed_early(here):
    process = start(*SAVING)
    assert process.stdout.readline().startswith("Recalibrating")
    process.stdout.close()
    with process.stderr as err:
        assert err.read() == ""
    assert process.wait() == 0
    assert (here / "new.keras").exists()


@pytest.mark.slow
def test_a_real_full_disk_under_stdout(here):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bn_callbacks", "inspect", "model.keras", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert (
        done.stderr == "bn-callbacks: cannot write to stdout: No space left on device\n"
    )

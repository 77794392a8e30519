"""Counts what was tried against the library and what held, for docs/tried.md.

python tests/abuse/tried.py [TRIES]
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import numpy as np
import tensorflow as tf

import bn_callbacks as bn
from bn_callbacks import cli

X = np.random.default_rng(0).normal(3, 2, (256, 4)).astype("float32")
Y = X.sum(1, keepdims=True)
TRAPS = ("json", "random", "tensorflow", "numpy", "keras", "zipfile", "argparse")


class Tried(NamedTuple):
    """How often something was tried, and how often all was as promised."""

    tries: int
    held: int


def make_model(optimizer: Any = "adam") -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.BatchNormalization(momentum=0.9),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse")
    return model


@contextlib.contextmanager
def workplace(policy: str = "float32") -> Iterator[Path]:
    """A directory with a trained model and data, in which commands run."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        keras.mixed_precision.set_dtype_policy(policy)
        model = make_model()
        model.fit(X, Y, epochs=2, batch_size=32, verbose=0)
        keras.mixed_precision.set_dtype_policy("float32")
        model.save(Path(name, "model.keras"))
        np.savez(Path(name, "train.npz"), x=X, y=Y)
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(here)


def run(*arguments: str) -> tuple[int, str]:
    """Status of a command in this process, and all that it has printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.main(list(arguments))
    return status, out.getvalue()


def is_whole(path: Path) -> bool:
    try:
        return bool(keras.saving.load_model(path).built)
    except Exception:
        return False


def signalled(number: int, command: str, tries: int, draw: random.Random) -> Tried:
    """A command gets a signal at a random time.

    What is at the output's place is old or new and whole; the status says which; and
    nothing else is left, after SIGKILL by the next run at the latest.
    """
    held = 0
    for _ in range(tries):
        with workplace() as here:
            temporary = here / "tmp"
            temporary.mkdir()
            output = here / ("new.keras" if command == "recalibrate" else "served")
            arguments = [command, "model.keras", "--data", "train.npz"]
            arguments += ["--output", output.name]
            process = subprocess.Popen(
                [sys.executable, "-m", "bn_callbacks", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TMPDIR": str(temporary)},
            )
            time.sleep(draw.uniform(1, 12))
            process.send_signal(number)
            _, said = process.communicate(timeout=120)
            is_new = output.exists()
            if number == signal.SIGKILL:
                subprocess.run(
                    [sys.executable, "-c", _SWEEP, str(here), str(temporary)],
                    check=True,
                )
                is_told = process.returncode in (0, -signal.SIGKILL)
            else:
                ended = {128 + number, -number}  # The latter before Python has begun.
                is_told = (process.returncode == 0) == is_new
                is_told &= process.returncode == 0 or process.returncode in ended
                is_told &= "no output" not in said or not is_new
            names = {path.name for path in here.iterdir()} - {"tmp"}
            is_clean = names <= {"model.keras", "train.npz", output.name}
            # Where TensorFlow is killed, it leaves files of its own.
            left = [path.name for path in temporary.iterdir()]
            is_clean &= all(name.startswith("__autograph") for name in left)
            is_right = not is_new or output.is_dir() or is_whole(output)
            if is_told and is_clean and is_right:
                held += 1
            else:
                what = f"status {process.returncode}, new {is_new}, whole {is_right}"
                print(what, sorted(names), left, said, file=sys.stderr)
    return Tried(tries, held)


_SWEEP = """
import sys
from pathlib import Path
from bn_callbacks.cli.writing import sweep
for name in sys.argv[1:]:
    sweep(Path(name))
"""


def interrupted_fits(tries: int, draw: random.Random) -> Tried:
    """Ctrl-C at a random time of a `fit` that recalibrates for each validation.

    The averages are bit for bit those of some step of the same training without us.
    """

    class States(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[bytes] = set()

        def note(self, *_: Any) -> None:
            self.seen.add(averages(self.model))

        def on_train_begin(self, logs: Any = None) -> None:
            self.note()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.note()

    def fit(*callbacks: keras.callbacks.Callback) -> None:
        model.fit(
            X, Y, epochs=3, batch_size=64, shuffle=False, verbose=0,
            validation_data=(X, Y), callbacks=list(callbacks),
        )  # fmt: skip

    model = make_model("sgd")
    start = model.get_weights()
    states = States()
    fit(states)
    callback = bn.RecalibrateBatchNorm(X, when="validation")
    length = 0.0
    for _ in range(2):
        model.set_weights(start)
        begin = time.perf_counter()
        fit(callback)
        length = time.perf_counter() - begin
    # At the very end they are recalibrated for good.
    states.seen.add(averages(model))
    made = held = 0
    with interrupting():
        while made < tries:
            model.set_weights(start)
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.01, length))
                    fit(callback)
                    continue
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            made += 1
            held += averages(model) in states.seen
    return Tried(made, held)


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Makes SIGALRM a Ctrl-C, and says nothing of one that Python drops.

    It drops what is raised in a finaliser, and goes on.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def complain(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            hook(dropped)

    handler, hook = signal.signal(signal.SIGALRM, interrupt), sys.unraisablehook
    sys.unraisablehook = complain
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGALRM, handler)


def averages(model: keras.Model) -> bytes:
    norms = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    parts = [v for n in norms for v in (n.moving_mean, n.moving_variance)]
    return b"".join(part.value.numpy().tobytes() for part in parts)


def saved_models(*_: Any) -> Tried:
    """Models are recalibrated in place: nothing else in the file changes."""
    optimizers: list[Callable[[], Any]] = [
        lambda: keras.optimizers.Adam(0.01),
        lambda: keras.optimizers.SGD(0.01, momentum=0.9, use_ema=True),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
        lambda: keras.optimizers.Lion(0.001),
    ]
    tries = held = 0
    for policy in ("float32", "float64", "mixed_float16", "mixed_bfloat16", "bfloat16"):
        for optimizer in optimizers:
            with workplace() as here:
                keras.mixed_precision.set_dtype_policy(policy)
                model = make_model(optimizer())
                keras.mixed_precision.set_dtype_policy("float32")
                model.fit(X, Y, batch_size=32, verbose=0)
                model.save("model.keras")
                before = members(here / "model.keras")
                command = ("recalibrate", "model.keras", "--data", "train.npz")
                status, _ = run(*command, "--in-place")
                after = members(here / "model.keras")
                changed = [name for name in before if before[name] != after[name]]
                is_same = list(before) == list(after) and len(changed) == 4
                tries += 1
                held += status == 0 and is_same
    return Tried(tries, held)


def members(path: Path) -> dict[str, bytes]:
    """Members of an archive, and each array of the weights, as bytes."""
    import h5py

    found: dict[str, bytes] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[...].tobytes()

    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name != "model.weights.h5":
                found[name] = archive.read(name)
        weights = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(weights) as file:
        file.visititems(note)
    return found


def full_disks(tries: int, draw: random.Random) -> Tried:
    """The disk is full after a random number of bytes of TensorBoard's files."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    held = 0
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monitor = bn.BatchNormMonitor(name, "batch", on_lag="ignore")
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (draw.randrange(1, 20000), limits[1])
            )
            try:
                history = make_model().fit(
                    X, Y, epochs=2, verbose=0, callbacks=[monitor]
                )
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            own = keras.callbacks.TensorBoard(Path(name, "keras"))
            make_model().fit(X, Y, verbose=0, callbacks=[own])
            held += len(history.history["bn_lag"]) == 2
    return Tried(tries, held)


def traps(tries: int, _: Any) -> Tried:
    """Files that are called like modules lie where a command runs."""
    held = 0
    for name in (*TRAPS, *TRAPS)[:tries]:
        with workplace() as here:
            text = "open('sprung', 'w').close()\nraise SystemExit(9)\n"
            (here / f"{name}.py").write_text(text)
            command = ["export", "model.keras", "--data", "train.npz"]
            done = subprocess.run(
                [sys.executable, "-m", "bn_callbacks", *command, "--output", "served"],
                capture_output=True,
                check=False,
            )
            held += done.returncode == 0 and not (here / "sprung").exists()
    return Tried(min(tries, 2 * len(TRAPS)), held)


def hostile_names(tries: int, draw: random.Random) -> Tried:
    """Names of files, arrays and layers made of control characters and marks."""
    alphabet = "\n\r\t\x1b\x07\x7f\x9b\u202e\u2066\u200b\u2028\ufeffaé層"
    held = 0
    with workplace() as here:
        for _ in range(tries):
            name = "".join(draw.choices(alphabet, k=12))
            shutil.copy("model.keras", f"{name}.keras")
            np.savez(f"{name}.npz", **{"x": X, name: Y})
            _, said = run("inspect", f"{name}.keras", "--data", f"{name}.npz")
            raw = [c for c in said if not c.isprintable() and c != "\n"]
            forged = name.replace("\n", "") != name and name in said
            held += not raw and not forged
            for path in (here / f"{name}.keras", here / f"{name}.npz"):
                path.unlink()
    return Tried(tries, held)


def archive_bombs(*_: Any) -> Tried:
    """Members that unpack to the absurd are refused before they are unpacked."""
    tries = held = 0
    with workplace() as here:
        for name in ("config.json", "metadata.json", "model.weights.h5", "assets/x"):
            for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
                path = here / "bomb.keras"
                with zipfile.ZipFile(path, "w", kind) as archive:
                    if name != "config.json":
                        archive.writestr("config.json", "{}")
                    with archive.open(name, "w") as member:
                        for _ in range(300):
                            member.write(b" " * 2**20)
                status, said = run("inspect", "bomb.keras")
                tries += 1
                held += status == 2 and "was not opened" in said
    return Tried(tries, held)


def damaged_records(tries: int, draw: random.Random) -> Tried:
    """One bit of a TFRecord file is flipped: the record is named, and no crash."""
    spec = {"inputs": {"x": {"shape": [4], "dtype": "float32"}}}
    held = 0
    with workplace() as here:
        (here / "spec.json").write_text(json.dumps(spec))
        path = here / "data.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for row in X[:64]:
                values = tf.train.FloatList(value=row)
                feature = {"x": tf.train.Feature(float_list=values)}
                message = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(message.SerializeToString())
        content = path.read_bytes()
        for _ in range(tries):
            damaged = bytearray(content)
            place = draw.randrange(len(damaged))
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            record = place // (len(content) // 64)
            command = ("inspect", "model.keras", "--data", "data.tfrecord")
            status, said = run(*command, "--features", "spec.json")
            held += status == 2 and f"record {record} of " in said.lower()
    return Tried(tries, held)


KINDS: dict[str, tuple[Callable[..., Tried], float]] = {
    "SIGTERM during `recalibrate`": (
        lambda n, d: signalled(signal.SIGTERM, "recalibrate", n, d), 1
    ),
    "SIGTERM during `export`": (
        lambda n, d: signalled(signal.SIGTERM, "export", n, d), 1
    ),
    "SIGKILL during `export`, then the sweep of the next run": (
        lambda n, d: signalled(signal.SIGKILL, "export", n, d), 1
    ),
    "Ctrl-C in `fit` with `RecalibrateBatchNorm(when=\"validation\")`": (
        interrupted_fits, 10
    ),
    "`recalibrate --in-place`, dtype policies by optimizers": (saved_models, 1),
    "a disk that is full while TensorBoard's files are written": (full_disks, 2),
    "`export` beside files that are called like modules": (traps, 1),
    "names of control characters and marks": (hostile_names, 5),
    "archives that unpack to the absurd": (archive_bombs, 1),
    "a flipped bit in a TFRecord file": (damaged_records, 5),
}  # fmt: skip
"""What is tried, and how many times as often as what takes a process."""


def main(tries: int = 12) -> None:
    """Prints the table of docs/tried.md."""
    print("| tried | times | held |\n|---|---|---|")
    for name, (attempt, factor) in KINDS.items():
        result = attempt(round(tries * factor), random.Random(0))
        print(f"| {name} | {result.tries} | {result.held} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

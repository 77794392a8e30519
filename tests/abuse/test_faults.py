"""A fault at every batch of every pass leaves the model as it was, to the last bit."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import compiled, grouped, layers, normal, scatter, state, unchanged

from bn_callbacks import RecalibrateBatchNorm, audit, recalibrate, recalibrated

BATCHES, SIZE, FEATURES = 4, 8, 5
X = grouped(BATCHES, SIZE, FEATURES)


def net() -> keras.Model:
    """Has all that may change: weights, seeds, metrics, an optimizer."""
    keras.utils.set_random_seed(0)
    stack: list[Any] = [keras.Input((FEATURES,))]
    stack += [layers.Dense(6), layers.BatchNormalization(), layers.Dropout(0.3)]
    stack += [Meter(), layers.BatchNormalization()]
    stack += [layers.Dense(1), layers.BatchNormalization(trainable=False)]
    model = compiled(scatter(keras.Sequential(stack)))
    model.train_on_batch(X[:SIZE], X[:SIZE, :1])
    return model


class Meter(layers.Layer):
    """Calls `Meter.on_batch`, if there is one, whenever it computes something."""

    on_batch: Callable[[], None] | None = None

    def call(self, x: Any) -> Any:
        def compute(value: Any) -> Any:
            if Meter.on_batch is not None:
                Meter.on_batch()
            return np.float32(0)

        return x + tf.reshape(tf.numpy_function(compute, [x], tf.float32), [])


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """Shared: what these tests are about is that nothing changes in it."""
    return net()


class Data(keras.utils.PyDataset):
    """Batches for many passes; `act` gives or raises what read number `at` gets."""

    def __init__(self, at: int = -1, act: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.at, self.act, self.reads = at, act, 0

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        read, self.reads = self.reads, self.reads + 1
        return self.act() if read == self.at else X[SIZE * index :][:SIZE]


def count_reads(act: Callable[[keras.utils.PyDataset], Any]) -> int:
    """How often a batch is read in all passes together."""
    data = Data()
    act(data)
    return data.reads


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


def nan_batch() -> Any:
    bad = X[:SIZE].copy()
    bad[1, 2] = np.nan
    return bad


def every_read(model: keras.Model, refine: Any = 2) -> range:
    """Each batch of each pass: also of the look at the data before the first."""
    with recalibrated(model, data := Data(), refine=refine, verbose=0):
        reads = data.reads
    assert reads >= BATCHES * 3
    return range(reads)


ERRORS = [
    OSError("the disk is gone"),
    KeyboardInterrupt(),
    SystemExit(1),
    GeneratorExit(),
    MemoryError("no memory left"),
    tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
]


@pytest.mark.slow
def test_an_exception_in_each_pass(model: keras.Model) -> None:
    for at, error in zip((0, 1, 4, 6, 10, 12), ERRORS, strict=True):
        with unchanged(model), pytest.raises(type(error)) as caught:
            recalibrate(model, Data(at, raising(error)), refine=2, verbose=0)
        assert caught.value is error


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_exception_at_any_batch(model: keras.Model, error: BaseException) -> None:
    for at in every_read(model):
        with unchanged(model), pytest.raises(type(error)) as caught:
            recalibrate(model, Data(at, raising(error)), refine=2, verbose=0)
        assert caught.value is error


@pytest.mark.slow
def test_a_batch_of_nan_at_any_batch(model: keras.Model) -> None:
    # Of the first read no more than the shapes are looked at.
    for at in every_read(model)[1:]:
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"^The input of \S+ is not finite"),
        ):
            recalibrate(model, Data(at, nan_batch), refine=2, verbose=0)


KINDS = {
    MemoryError: tf.errors.ResourceExhaustedError,
    KeyboardInterrupt: tf.errors.UnknownError,
    OSError: tf.errors.UnknownError,
}
"""What becomes of a Python error inside a compiled function."""


@pytest.mark.slow
@pytest.mark.parametrize("raised", KINDS)
def test_a_fault_inside_the_model_at_any_batch(
    model: keras.Model, raised: type[BaseException]
) -> None:
    """Memory that runs out where tensors are computed, for one."""
    calls = at = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    def fail() -> None:
        count()
        if calls == at:
            raise raised

    Meter.on_batch = count
    try:
        with recalibrated(model, X, batch_size=SIZE, refine=2, verbose=0):
            total = calls
        assert total >= BATCHES * 4
        for failing in range(1, total + 1):
            at, calls = failing, 0
            Meter.on_batch = fail
            with unchanged(model), pytest.raises(KINDS[raised]):
                recalibrate(model, X, batch_size=SIZE, refine=2, verbose=0)
    finally:
        Meter.on_batch = None


@pytest.mark.slow
def test_a_fault_at_any_batch_of_an_audit(model: keras.Model) -> None:
    reads = count_reads(lambda data: audit(model, data))
    for at in range(reads):
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            audit(model, Data(at, raising(KeyboardInterrupt())))


@pytest.mark.slow
def test_a_fault_at_any_batch_of_validation_data(model: keras.Model) -> None:
    class Labelled(Data):
        def __getitem__(self, index: int) -> Any:
            x = super().__getitem__(index)
            return x, x[:, :1]

    validation = Labelled()
    recalibrate(model, X, validation_data=validation, verbose=0).undo()
    for at in range(validation.reads):
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            recalibrate(
                model,
                X,
                validation_data=Labelled(at, raising(KeyboardInterrupt())),
                verbose=0,
            )


@pytest.mark.slow
def test_a_fault_while_any_of_the_statistics_is_written(
    model: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four variables are written; whichever fails, all have their old values."""
    (bn, *_) = [v for v in model.layers if isinstance(v, layers.BatchNormalization)]
    kind = type(bn.moving_mean)
    own, writes, at = kind.assign, 0, -1

    def assign(variable: Any, value: Any) -> Any:
        nonlocal writes
        # Keras itself assigns, of no effect, while a model is traced.
        if isinstance(value, np.ndarray):
            writes += 1
            if writes == at:
                raise KeyboardInterrupt
        return own(variable, value)

    monkeypatch.setattr(kind, "assign", assign)
    report = recalibrate(model, X, verbose=0)
    assert writes == 4
    report.undo()
    for failing in range(1, 5):
        at, writes = failing, 0
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            recalibrate(model, X, verbose=0)


@pytest.mark.slow
def test_a_model_goes_on_as_if_nothing_had_been() -> None:
    """After faults a recalibration gives what it gives a model without them."""
    one, other = net(), net()
    for at in range(3):
        with pytest.raises(KeyboardInterrupt):
            recalibrate(one, Data(at, raising(KeyboardInterrupt())), verbose=0)
    for model in (one, other):
        recalibrate(model, X, verbose=0)
    assert list(state(one).values()) == list(state(other).values())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["validation", "epoch_end", "train_end"])
def test_fit_survives_a_fault_in_the_callback(when: Any) -> None:
    """Training weights and optimizer are those of training; the next `fit` works."""
    one, other = net(), net()
    x, y = normal(32, FEATURES), normal(32, 1)
    shared = {"batch_size": 8, "shuffle": False, "verbose": 0}
    callback = RecalibrateBatchNorm(Data(2, raising(OSError("gone"))), when=when)
    with pytest.raises(OSError, match="gone"):
        one.fit(x, y, validation_data=(x, y), callbacks=[callback], **shared)
    other.fit(x, y, **shared)
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    one.fit(x, y, callbacks=[RecalibrateBatchNorm(X, when=when)], **shared)


KILLED = """
import os, signal, sys
import numpy as np
import keras
import test_faults as t
from models import state
from bn_callbacks import recalibrate

keras.utils.set_random_seed(0)
model = t.net()
model_before = state(model)

def stop(*_):
    raise SystemExit("asked to stop")

how, at = sys.argv[1], int(sys.argv[2])
if how == "handled":
    signal.signal(signal.SIGTERM, stop)
model.save(sys.argv[3])
print("saved", flush=True)

def kill():
    os.kill(os.getpid(), signal.SIGTERM)
    return t.X[: t.SIZE]

data = t.Data(at, kill)
try:
    recalibrate(model, data, refine=2, verbose=0)
finally:
    print("reads", data.reads, "same", state(model) == model_before, flush=True)
"""


def killed(how: str, at: int, path: Path) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1])]
    return subprocess.run(
        [sys.executable, "-c", KILLED, how, str(at), str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("at", [0, 1, 6, 11])
def test_a_process_that_is_asked_to_stop(at: int, tmp_path: Path) -> None:
    """SIGTERM with a handler: whoever saves the model on the way out saves it whole."""
    done = killed("handled", at, tmp_path / "model.keras")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == ["saved", f"reads {at + 1} same True"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """SIGTERM without a handler: the file of before is all there is, and is whole."""
    path = tmp_path / "model.keras"
    done = killed("killed", 6, path)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.splitlines() == ["saved"]
    keras.utils.set_random_seed(0)
    saved = keras.models.load_model(path, custom_objects={"Meter": Meter})
    for a, b in zip(saved.get_weights(), net().get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.slow
def test_a_fault_in_a_generator_that_is_read_once(model: keras.Model) -> None:
    def stream(at: int) -> Iterator[Any]:
        for index in range(BATCHES):
            if index == at:
                raise OSError("gone")
            yield X[SIZE * index :][:SIZE]

    for at in range(BATCHES):
        with unchanged(model), pytest.raises(OSError, match="gone"):
            recalibrate(model, stream(at), verbose=0)

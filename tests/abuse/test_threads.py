"""Two models in two threads know nothing of each other; nothing global is patched."""

import threading
import traceback
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import compiled, dense, grouped, layers, scatter, state

import bn_callbacks.layers
from bn_callbacks import (
    BatchNormMonitor,
    DebiasBatchNorm,
    RecalibrateBatchNorm,
    audit,
    recalibrate,
)

X = grouped(8, 16, 6)
Y = X[:, :1]


def together(*acts: Callable[[], Any]) -> list[Any]:
    """Results of acts that all run at once."""
    results: list[Any] = [None] * len(acts)
    errors: list[str] = []
    gate = threading.Barrier(len(acts))

    def run(index: int, act: Callable[[], Any]) -> None:
        try:
            gate.wait(60)
            results[index] = act()
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors[0]
    return results


def net(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = scatter(dense(2), seed)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    return model


def train(model: keras.Model, tmp_path: Any, callbacks: bool = True) -> Any:
    """A watched, recalibrated `fit`: reports, logs, and the state it leaves."""
    monitor = BatchNormMonitor(tmp_path, probe=(X, Y), on_lag="ignore")
    others = [RecalibrateBatchNorm(X, when="validation"), DebiasBatchNorm()]
    history = model.fit(
        X,
        Y,
        batch_size=16,
        epochs=3,
        shuffle=False,
        validation_data=(X, Y),
        verbose=0,
        callbacks=[monitor, *others] if callbacks else [],
    )
    return monitor.report, history.history, list(state(model).values())


def unnamed(report: Any) -> list[dict[str, Any]]:
    """The figures of a report; Keras gives each model's layers other names."""
    return [{**vars(layer), "path": "", "advice": ""} for layer in report.layers]


@pytest.mark.slow
def test_two_models_are_watched_and_recalibrated_at_once(tmp_path: Any) -> None:
    alone = [train(net(seed), tmp_path / f"alone {seed}") for seed in (1, 2)]
    models = [net(seed) for seed in (1, 2)]
    at_once = together(
        *(
            lambda model=model, index=index: train(model, tmp_path / f"both {index}")
            for index, model in enumerate(models)
        )
    )
    for (report, logs, after), (report_0, logs_0, after_0) in zip(
        at_once, alone, strict=True
    ):
        assert unnamed(report) == unnamed(report_0)
        assert logs == logs_0
        assert after == after_0


@pytest.mark.slow
def test_two_models_are_recalibrated_at_once_many_times() -> None:
    expected = [recalibrate(net(seed), X, verbose=0).residual for seed in (1, 2)]

    def often(model: keras.Model) -> list[float | None]:
        residuals = []
        for _ in range(4):
            report = recalibrate(model, X, verbose=0)
            residuals.append(report.residual)
            report.undo()
        return residuals

    models = [net(seed) for seed in (1, 2)]
    first, second = together(*(lambda m=m: often(m) for m in models))
    assert first == [expected[0]] * 4
    assert second == [expected[1]] * 4


@pytest.mark.slow
def test_one_model_is_audited_in_three_threads_at_once() -> None:
    model = net(1)
    expected, before = audit(model, (X, Y)), state(model)
    for report in together(*[lambda: audit(model, (X, Y))] * 3):
        assert report == expected
    assert state(model) == before


class Gate(layers.Layer):
    """Opens in the middle of a recalibration: while its layers are being replaced."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__()
        self.act = act

    def call(self, x: Any) -> Any:
        self.act()
        return x


def fingerprint_of_keras() -> dict[str, Any]:
    """What belongs to all models: classes, modules, defaults of Keras."""
    owners = {
        "BatchNormalization": layers.BatchNormalization,
        "Layer": keras.layers.Layer,
        "Model": keras.Model,
        "Variable": keras.Variable,
        "ops": keras.ops,
        "backend": keras.backend,
        "tf.nn": tf.nn,
        "tf.compat.v1.nn": tf.compat.v1.nn,
    }
    return {
        f"{name}.{key}": id(value)
        for name, owner in owners.items()
        for key, value in vars(owner).items()
        if not key.startswith("_abc_")
    } | {"floatx": keras.backend.floatx(), "epsilon": keras.backend.epsilon()}


@pytest.mark.slow
def test_another_model_trains_as_ever_while_one_is_recalibrated() -> None:
    """At each moment at which the library runs or traces the model, and in a thread."""
    undisturbed = net(2)
    undisturbed.fit(X, Y, epochs=2, shuffle=False, verbose=0)
    expected = list(state(undisturbed).values())
    recalibrated = net(2)
    recalibrate(recalibrated, X, verbose=0)
    others = [net(2) for _ in range(12)]
    found: list[str] = []
    ordinary: dict[str, Any] = {}
    main = threading.get_ident()

    def look() -> None:
        if not ordinary or not others or threading.get_ident() != main:
            return
        if fingerprint_of_keras() != ordinary:
            found.append("Keras is patched")
        other = others.pop()

        def elsewhere() -> None:
            # A new thread has no graph and no scope of the one that recalibrates.
            other.fit(X, Y, epochs=2, shuffle=False, verbose=0)
            if list(state(other).values()) != expected:
                found.append("another model trains in another way")

        together(elsewhere)

    inner = dense(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            Gate(look),
            layers.BatchNormalization(),
            Gate(look),
            inner,
            layers.BatchNormalization(),
            Gate(look),
        ]
    )
    compiled(model)
    left = len(others)
    ordinary = fingerprint_of_keras()
    recalibrate(model, X, verbose=0)
    assert fingerprint_of_keras() == ordinary
    ordinary = {}
    assert found == []
    assert left - len(others) >= 3, "the gates were not passed while tracing"


def test_a_model_predicts_as_ever_while_it_is_recalibrated() -> None:
    """In threads that serve it: nothing of its replaced layers is seen there."""
    served: list[Any] = []
    asks, answers = threading.Semaphore(0), threading.Semaphore(0)
    has_ended = False

    def serve() -> None:
        while asks.acquire(timeout=60) and not has_ended:
            served.append(np.asarray(model(X, training=False)))
            served.append(model.predict(X, verbose=0, batch_size=len(X)))
            answers.release()

    def look() -> None:
        if server.is_alive() and threading.get_ident() == main:
            asks.release()
            answers.acquire(timeout=60)

    main = threading.get_ident()
    server = threading.Thread(target=serve)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.BatchNormalization(),
            Gate(look),
            layers.Dense(3),
            layers.BatchNormalization(),
            Gate(look),
        ]
    )
    compiled(scatter(model))
    expected = np.asarray(model(X, training=False))
    before = state(model)
    server.start()
    try:
        audit(model, (X, X[:, :3]))
    finally:
        has_ended = True
        asks.release()
        server.join(60)
    assert len(served) >= 8
    for outputs in served:
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert state(model) == before


def test_the_search_for_patches_finds_one() -> None:
    ordinary = fingerprint_of_keras()
    own = layers.BatchNormalization.call
    try:
        layers.BatchNormalization.call = lambda *_: None
        assert fingerprint_of_keras() != ordinary
    finally:
        layers.BatchNormalization.call = own
    assert fingerprint_of_keras() == ordinary


@pytest.mark.slow
def test_a_model_trains_in_a_thread_while_another_is_recalibrated_again_and_again() -> (
    None
):
    alone, model, other = net(3), net(3), net(4)
    alone.fit(X, Y, epochs=30, shuffle=False, verbose=0)
    has_ended = threading.Event()

    def fit() -> None:
        try:
            model.fit(X, Y, epochs=30, shuffle=False, verbose=0)
        finally:
            has_ended.set()

    def repair() -> int:
        count = 0
        while not has_ended.is_set() or count == 0:
            recalibrate(other, X, verbose=0).undo()
            count += 1
        return count

    _, count = together(fit, repair)
    assert count >= 1
    assert list(state(model).values()) == list(state(alone).values())


def test_two_threads_number_their_writes_apart() -> None:
    """What tells the monitor of foreign writes is shared by all threads."""
    models = [net(seed) for seed in range(4)]

    def write(model: keras.Model) -> list[int]:
        found = bn_callbacks.layers.find(model)
        seen = []
        for _ in range(50):
            values = bn_callbacks.layers.read(found)
            bn_callbacks.layers.assign(found, values)
            seen += bn_callbacks.layers.versions(found)
        return seen

    seen = together(*(lambda m=m: write(m) for m in models))
    flat = [version for versions in seen for version in versions]
    assert len(set(flat)) == len(flat)


def test_a_thread_of_its_own_can_recalibrate() -> None:
    """Nothing hangs on the main thread: neither signals nor its graph or scope."""
    model, twin = net(5), net(5)
    recalibrate(model, X, verbose=0)
    together(lambda: recalibrate(twin, X, verbose=0))
    assert list(state(model).values()) == list(state(twin).values())

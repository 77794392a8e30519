"""One worker of several, which `test_workers.py` starts; prints what happened as JSON.

TF_CONFIG=… python workers.py SCENARIO
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(0, str(Path(__file__).parent))

import keras
import numpy as np
import tensorflow as tf
from models import batch_norms, dense, normal, scatter, state, stored

import bn_callbacks as bn
import bn_callbacks.distribution

TASK = json.loads(os.environ["TF_CONFIG"])
INDEX = int(TASK["task"]["index"])
WORKERS = len(TASK["cluster"]["worker"])
X, Y = normal(203, 6), normal(203, 1)


def build() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = scatter(dense(3))
    for layer in batch_norms(model):
        layer.momentum = 0.9
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    return model


def distance(one: keras.Model, other: keras.Model) -> float:
    pairs = zip(stored(one), stored(other), strict=True)
    return max(
        float(
            np.max(np.abs(ours[i] - theirs[i]) / np.sqrt(theirs[1] + 1e-3) ** (i + 1))
        )
        for ours, theirs in pairs
        for i in (0, 1)
    )


def statistics(model: keras.Model) -> list[list[bytes]]:
    return [[part.tobytes() for part in pair] for pair in stored(model)]


def failure(run: Callable[[], Any]) -> str:
    try:
        run()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def same_data(model: keras.Model) -> dict[str, Any]:
    """All workers are given the same data, and share the work."""
    reference, seen = build(), {}
    for name, arguments in {"auto": {}, "one pass": {"refine": 0}}.items():
        ours = bn.recalibrate(model, X, batch_size=16, verbose=0, **arguments)
        theirs = bn.recalibrate(reference, X, batch_size=16, verbose=0, **arguments)
        seen[name] = [distance(model, reference), ours.samples, ours.batches]
        seen[name] += [theirs.samples, theirs.batches]
    ours, theirs = bn.audit(model, (X, Y)), bn.audit(reference, (X, Y))
    seen["losses"] = [ours.loss_batch, theirs.loss_batch]
    seen["losses"] += [ours.loss_inference, theirs.loss_inference]
    return seen


def own_data(model: keras.Model) -> dict[str, Any]:
    """Each is given a share; the last runs out of data first."""
    reference = build()
    cuts = [*(0, 90, 150)[:WORKERS], 203]
    mine = X[cuts[INDEX] : cuts[INDEX + 1]]
    report = bn.recalibrate(model, mine, batch_size=8, verbose=0, refine=6)
    bn.recalibrate(reference, X, batch_size=203, verbose=0, refine=6)
    apart = distance(model, reference)
    stopped = bn.recalibrate(model, X[:64], batch_size=1, tolerance=0.5, verbose=0)
    return {
        "distance": apart,
        "own": len(mine),
        "samples": report.samples,
        "stopped": stopped.batches,
    }


def failing_data(model: keras.Model) -> dict[str, Any]:
    """One worker's data fail, in several ways; nobody's model changes."""

    def broken() -> Iterator[Any]:
        for index in range(40):
            if index == 25 and INDEX == 1:
                raise OSError("the disk is gone")
            yield X[:16] + INDEX

    bad = X.copy()
    bad[16 * 5] = np.nan
    before = state(model)
    begin = time.time()
    said = {
        "broken": failure(lambda: bn.recalibrate(model, broken(), verbose=0)),
        "empty": failure(
            lambda: bn.recalibrate(model, X[: 203 * (1 - INDEX)], verbose=0)
        ),
        "shape": failure(
            lambda: bn.recalibrate(model, X[:, : 6 - (INDEX == 1)], verbose=0)
        ),
        "not finite": failure(
            lambda: bn.recalibrate(model, bad, batch_size=16, verbose=0)
        ),
        "option": failure(lambda: bn.recalibrate(model, X, refine=-1)),
    }
    took = time.time() - begin
    is_intact = state(model) == before
    bn.recalibrate(model, X, verbose=0).undo()
    with bn.recalibrated(model, X, verbose=0):
        pass
    return {
        **said,
        "intact": is_intact,
        "took": took,
        "undone": state(model) == before,
    }


def training_loop(model: keras.Model) -> dict[str, Any]:
    """A loop of one's own with all callbacks; each worker has other data."""
    strategy = model.distribute_strategy

    @tf.function
    def step(x: Any, y: Any) -> Any:
        def on_replica(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply(gradients, model.trainable_variables)
            return loss

        return strategy.reduce("MEAN", strategy.run(on_replica, (x, y)), axis=None)

    logs = f"{sys.argv[2]}/{INDEX}"
    x = X + 4 * INDEX
    monitor = bn.BatchNormMonitor(log_dir=logs)
    probing = bn.BatchNormMonitor(probe=(x[:48], Y[:48]), on_lag="ignore")
    recalibrate = bn.RecalibrateBatchNorm(x, when="validation", batch_size=16)
    callbacks = keras.callbacks.CallbackList(
        [monitor, probing, recalibrate], model=model, epochs=2, steps=30
    )
    resumed = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks.on_train_begin()
        for epoch in range(2):
            callbacks.on_epoch_begin(epoch)
            resumed.append(stored(model)[0][0].tolist())
            for index in range(30):
                callbacks.on_train_batch_begin(index)
                rows = np.random.default_rng([epoch, index]).integers(0, 203, 16)
                loss = step(tf.constant(x[rows]), tf.constant(Y[rows]))
                callbacks.on_train_batch_end(index, {"loss": float(loss)})
            callbacks.on_test_begin()
            callbacks.on_test_end()
            callbacks.on_epoch_end(epoch, {})
        callbacks.on_train_end()
    debias = bn.DebiasBatchNorm()
    debias.set_model(model)
    debias.set_params({"epochs": 1, "steps": 3})
    debias.on_train_begin()
    debias.on_epoch_begin(0)
    for index in range(3):
        debias.on_train_batch_begin(index)
        step(tf.constant(x[:16]), tf.constant(Y[:16]))
    debias.on_epoch_end(0)
    debiased = stored(model)[0][0].tolist()
    debias.on_train_end()
    return {
        "cause": monitor.report.worst.cause,
        "disagreement": monitor.report.worst.disagreement,
        "lag": monitor.report.max_lag,
        "gap": probing.report.loss_gap,
        "warnings": len([w for w in caught if "replicas_differ" in str(w.message)]),
        "files": os.path.isdir(logs),
        "statistics": recalibrate.report.residual,
        "resumed": resumed,
        "debiased": [debiased, stored(model)[0][0].tolist()],
    }


def differing(model: keras.Model) -> dict[str, Any]:
    """Workers are told different things; all end with an error, and are as before."""
    mine = INDEX == 1
    logs = f"{sys.argv[2]}/differing"

    def fit(*callbacks: keras.callbacks.Callback) -> str:
        listed = keras.callbacks.CallbackList(
            list(callbacks), model=model, epochs=1, steps=3
        )
        return failure(listed.on_train_begin)

    before, begin = state(model), time.time()
    recalibrate, monitor = bn.RecalibrateBatchNorm, bn.BatchNormMonitor
    said = {
        "refine": failure(lambda: bn.recalibrate(model, X, refine=2 * mine)),
        "validation": failure(
            lambda: bn.recalibrate(model, X, validation_data=(X, Y) if mine else None)
        ),
        "when": fit(recalibrate(X, when="validation" if mine else "epoch_end")),
        "log_dir": fit(monitor(logs if mine else None)),
        "update_freq": fit(monitor(logs, update_freq=7 if mine else "auto")),
        "one more": fit(monitor(), *([bn.DebiasBatchNorm()] if mine else [])),
        "order": fit(*[monitor(), bn.DebiasBatchNorm()][:: -1 if mine else 1]),
    }
    took = time.time() - begin
    verbose = fit(monitor(f"{logs}/{INDEX}", verbose=INDEX), recalibrate(X + INDEX))
    return {
        "said": said,
        "took": took,
        "same": verbose,
        "intact": state(model) == before,
        "files": os.path.isdir(logs),
    }


def on_the_chief_only(model: keras.Model) -> dict[str, Any]:
    """Only the chief has a callback; all of them end, and say why."""
    bn_callbacks.distribution.PATIENCE = 5
    strategy, begin = model.distribute_strategy, time.time()

    def train() -> None:
        if INDEX == 0:
            callbacks = [bn.BatchNormMonitor()]
            keras.callbacks.CallbackList(callbacks, model=model).on_train_begin()
        ones = strategy.run(lambda: tf.ones(3))
        strategy.reduce("SUM", ones, axis=None)

    return {"said": failure(train), "took": time.time() - begin}


def dying(model: keras.Model) -> dict[str, Any]:
    """A worker dies in the middle of a pass."""

    def deadly() -> Iterator[Any]:
        for index in range(60):
            if index == 25 and INDEX == WORKERS - 1:
                os._exit(9)
            yield X[:16] + INDEX

    before, begin = statistics(model), time.time()
    said = failure(lambda: bn.recalibrate(model, deadly(), verbose=0))
    return {
        "said": said,
        "took": time.time() - begin,
        "intact": statistics(model) == before,
    }


if __name__ == "__main__":
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    results = {}
    for name in sys.argv[1].split(","):
        with strategy.scope():
            made = build()
        results[name] = globals()[name](made)
        if name != "on_the_chief_only":
            results[name]["stored"] = [part.tolist() for part in stored(made)[-1]]
    print("RESULT " + json.dumps(results), flush=True)
    # TensorFlow waits for the other workers, and one of them may be dead.
    os._exit(0)

"""Two machines, each with data of its own: recalibrate on both, save on one, check.

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/multi_worker.py

Starts itself twice, as two workers on this machine. On real machines each has its own
TF_CONFIG, and runs what is below `train`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

WORKERS, EPOCHS, STEPS, BATCH = 2, 3, 20, 32


def say(text):
    """Prints a line at once, which that of another worker cannot cut in two."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def start_workers():
    """Runs this script once for each worker; what they print is printed."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(WORKERS)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    with tempfile.TemporaryDirectory() as directory:
        workers = []
        for index in range(WORKERS):
            config = {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
            environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
            command = [sys.executable, __file__, directory]
            workers.append(subprocess.Popen(command, env=environment))
        sys.exit(max(worker.wait(timeout=180) for worker in workers))


def train(directory):
    """What each worker does."""
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    import bn_callbacks as bn

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = strategy.cluster_resolver.task_id
    is_chief = worker == 0

    x, y = load_digits(return_X_y=True)
    x_val, y_val = (x[1280:] / 16).astype("float32"), y[1280:]
    # The scanner of the second machine makes brighter pictures.
    x_own = (x[worker:1280:WORKERS] / 16).astype("float32") + 0.5 * worker
    y_own = y[worker:1280:WORKERS]
    data = tf.data.Dataset.from_tensor_slices((x_own, y_own))
    data = data.shuffle(len(x_own), seed=0).batch(BATCH, drop_remainder=True)

    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((64,)),
                # First of all, so that the scanner shows: synchronized=False.
                keras.layers.BatchNormalization(momentum=0.9, name="bn"),
                keras.layers.Dense(64, "relu"),
                keras.layers.Dense(10),
            ],
            name="digits",
        )
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss_of, metrics=["accuracy"])

    @tf.function
    def step(x, y):
        def on_replica(x, y):
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
                loss = tf.reduce_mean(losses)
            variables = model.trainable_variables
            gradients = tape.gradient(loss, variables)
            model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return loss

        losses = strategy.run(on_replica, args=(x, y))
        return strategy.reduce("MEAN", losses, axis=None)

    monitor = bn.BatchNormMonitor()
    callbacks = keras.callbacks.CallbackList(
        [monitor], model=model, epochs=EPOCHS, steps=STEPS
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bn.BatchNormWarning)
        callbacks.on_train_begin()
        for epoch in range(EPOCHS):
            callbacks.on_epoch_begin(epoch)
            for index, (x, y) in enumerate(data.take(STEPS)):
                callbacks.on_train_batch_begin(index)
                loss = step(x, y)
                callbacks.on_train_batch_end(index, {"loss": float(loss)})
            callbacks.on_epoch_end(epoch, {})
        callbacks.on_train_end()
    # The chief alone warns.
    for warning in caught:
        if issubclass(warning.category, bn.BatchNormWarning):
            say(f"worker {worker}: {warning.message}")

    def accuracy(model):
        shifted = (x_val + shift for shift in (0, 0.5))
        logits = [model(pictures, training=False) for pictures in shifted]
        right = [float((tf.argmax(each, 1) == y_val).numpy().mean()) for each in logits]
        return f"{right[0]:.1%} of the first scanner's, {right[1]:.1%} of the second's"

    if is_chief:
        say(f"as trained: {accuracy(model)}")
    # All workers make the same calls; each reads its own data.
    report = bn.recalibrate(model, x_own, batch_size=BATCH, verbose=0)
    after = bn.audit(model, x_own, batch_size=BATCH)
    first = model.get_layer("bn")
    say(
        f"worker {worker}: recalibrated over {report.samples} samples of both workers; "
        f"moving mean {float(first.moving_mean.numpy().mean()):.4f}, "
        f"disagreement {after.worst.disagreement:.1g}"
    )
    if is_chief:
        path = Path(directory) / "digits.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        say(f"saved and loaded again: {accuracy(loaded)}")


if __name__ == "__main__":
    if "TF_CONFIG" in os.environ:
        train(sys.argv[1])
    else:
        start_workers()

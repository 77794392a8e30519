"""BatchNormMonitor in real `fit`s of small models."""

import contextlib
import csv
import itertools
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_callbacks import (
    BatchNormLagWarning,
    BatchNormMonitor,
    DebiasBatchNorm,
    RecalibrateBatchNorm,
)
from bn_callbacks.watching.watch import reading_interval

EXACT_EXECUTIONS = hasattr(keras.Model(), "unrolled_steps_per_execution")
BATCH = 16
CHANNELS = 4


def data(steps, seed=0, spread=0.3, mean=3.0):
    """Batches that differ, and their number of targets."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(mean, spread, (steps, 1, CHANNELS))
    x = shift + rng.normal(0, 2, (steps, BATCH, CHANNELS))
    x = x.reshape(-1, CHANNELS).astype("float32")
    return x, x.sum(1, keepdims=True)


def make_model(momentum=0.99, compiled=True, **compile_arguments):
    model = keras.Sequential(
        [
            keras.Input((CHANNELS,)),
            keras.layers.BatchNormalization(momentum=momentum),
            keras.layers.Dense(1),
        ]
    )
    if compiled:
        compile_arguments = {"optimizer": keras.optimizers.SGD(1e-3), "loss": "mse"} | (
            compile_arguments
        )
        model.compile(**compile_arguments)
    return model


def moments(batches):
    """Mean and variance of each batch, `(steps, 2, channels)`."""
    batches = np.asarray(batches, np.float64)
    return np.stack([batches.mean(1), batches.var(1)], axis=1)


def batches_of(x):
    return moments(x.reshape(-1, BATCH, CHANNELS))


def recovered(monitor, index=0):
    """What the monitor made of its readings: steps and statistics per window."""
    windows = monitor._watch._windows
    return [
        (kept.steps, np.array(windows._batch(kept.old, kept.new, kept.steps, index)))
        for kept in windows._kept
        if kept.is_valid[index]
    ]


def weighted(batches, momentum):
    """`Σ (1−m)·m^(N−1−i)·b_i / (1−m^N)`."""
    n = len(batches)
    weights = (1 - momentum) * momentum ** np.arange(n - 1, -1, -1) / (1 - momentum**n)
    return np.tensordot(weights, batches, 1)


def recovery_error(monitor, batches, momentum, index=0, calls=1):
    """Largest error of all windows, relative to the size of the statistic.

    Fails unless the windows cover all the batches, one after the other.
    """
    errors, begin = [], 0
    for steps, statistics in recovered(monitor, index):
        true = weighted(batches[begin : begin + steps * calls], momentum)
        size = np.sqrt(np.mean(np.square(true), axis=1, keepdims=True))
        errors.append(np.max(np.abs(statistics - true) / size))
        begin += steps * calls
    assert begin == len(batches), f"windows cover {begin} of {len(batches)} updates"
    return max(errors)


def watch(model, x, y=None, **fit_arguments):
    monitor = BatchNormMonitor(on_lag="ignore")
    callbacks = [monitor, *fit_arguments.pop("callbacks", [])]
    fit_arguments = {"batch_size": BATCH, "shuffle": False} | fit_arguments
    if y is None:
        del fit_arguments["batch_size"], fit_arguments["shuffle"]
    history = model.fit(x, y, verbose=0, callbacks=callbacks, **fit_arguments)
    monitor.history = history.history
    return monitor


# --- The batch statistics, recovered


@pytest.mark.parametrize(
    ("momentum", "steps", "bound"),
    [
        # One window is a tenth of the run: N = 1, 4, 10, 20 updates.
        (0.99, 10, 2e-5),
        (0.99, 40, 1e-5),
        (0.99, 100, 1e-5),
        (0.999, 200, 5e-5),
        (0.9, 100, 4e-6),
        (0.0, 40, 1e-6),
    ],
)
def test_recovers_the_batch_statistics(momentum, steps, bound, record_property):
    x, y = data(steps)
    monitor = watch(make_model(momentum), x, y)
    error = recovery_error(monitor, batches_of(x), momentum)
    record_property("relative_error", float(error))
    assert error < bound


class CountsWithAnother(keras.Sequential):
    """A custom step, whose compiled optimizer never steps."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        variables = self.trainable_variables
        self.other.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


@pytest.mark.parametrize(
    ("compile_arguments", "windows"),
    [
        ({"run_eagerly": True}, [1] * 10),
        ({"jit_compile": True}, [1] * 10),
        ({"steps_per_execution": 5}, [5, 5]),
        # 4 does not divide 10, which Keras calls 3, 7, 11.
        ({"steps_per_execution": 4}, [4, 4, 2]),
        ({"steps_per_execution": 20}, [10]),
    ],
    ids=str,
)
def test_recovers_them_however_keras_runs(compile_arguments, windows):
    x, y = data(10)
    monitor = watch(make_model(**compile_arguments), x, y)
    assert [steps for steps, _ in recovered(monitor)] == windows
    assert recovery_error(monitor, batches_of(x), 0.99) < 1e-4


def test_recovers_them_over_several_epochs():
    x, y = data(10)
    model = make_model(steps_per_execution=4)
    monitor = watch(model, x, y, epochs=3)
    batches = np.concatenate([batches_of(x)] * 3)
    # A window of a tenth of the run is 3 steps long, that is one execution.
    assert [steps for steps, _ in recovered(monitor)] == [4, 4, 2] * 3
    assert recovery_error(monitor, batches, 0.99) < 1e-4


def test_recovers_them_with_gradient_accumulation():
    x, y = data(10)
    optimizer = keras.optimizers.SGD(1e-3, gradient_accumulation_steps=3)
    model = make_model(optimizer=optimizer, steps_per_execution=4)
    monitor = watch(model, x, y)
    assert recovery_error(monitor, batches_of(x), 0.99) < 1e-4


@pytest.mark.parametrize("per_execution", [1, 4])
def test_recovers_them_where_loss_scaling_leaves_out_steps(per_execution):
    x, y = data(30)
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1e-6), initial_scale=2.0**20
    )
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model(optimizer=optimizer, steps_per_execution=per_execution)
    finally:
        keras.config.set_dtype_policy("float32")
    monitor = watch(model, x, y)
    assert 0 < optimizer.inner_optimizer.iterations.numpy() < 30
    batches = batches_of(x.astype("float16"))
    # Keras 3.0 rounds the averages to float16 in each step of this policy.
    bound = 1e-4 if EXACT_EXECUTIONS else 0.03
    assert recovery_error(monitor, batches, 0.99) < bound


def test_recovers_them_in_a_custom_step_of_known_length():
    x, y = data(10)
    model = CountsWithAnother(
        [keras.Input((CHANNELS,)), *make_model(compiled=False).layers]
    )
    model.other = keras.optimizers.SGD(1e-3)
    model.compile("sgd", "mse")
    model.other.build(model.trainable_variables)
    monitor = watch(model, x, y, epochs=2)
    batches = np.concatenate([batches_of(x)] * 2)
    assert recovery_error(monitor, batches, 0.99) < 1e-4


def test_recovers_them_from_a_layer_called_twice():
    left, right = keras.Input((CHANNELS,)), keras.Input((CHANNELS,))
    shared = keras.layers.BatchNormalization()
    output = keras.layers.Add()([shared(left), shared(right)])
    model = keras.Model([left, right], keras.layers.Dense(1)(output))
    model.compile("sgd", "mse")
    (a, y), (b, _) = data(20), data(20, seed=1, mean=-2)
    monitor = watch(model, [a, b], y)
    assert monitor.report.worst.updates == 40
    both = np.stack([batches_of(a), batches_of(b)], axis=1).reshape(40, 2, CHANNELS)
    assert recovery_error(monitor, both, 0.99, calls=2) < 4e-5


def test_recovers_them_from_deep_layers_whose_input_drifts():
    seen = []

    class Recorded(keras.layers.BatchNormalization):
        def _moments(self, inputs, mask):
            values = super()._moments(inputs, mask)
            seen.append(np.array([np.asarray(value) for value in values], float))
            return values

    deep = Recorded(momentum=0.9)
    model = keras.Sequential(
        [
            keras.Input((CHANNELS,)),
            keras.layers.Dense(3, "relu"),
            deep,
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
    x, y = data(20)
    monitor = watch(model, x, y)
    assert len(seen) == 20
    assert np.std([batch[0] for batch in seen], axis=0).max() > 0.1, "it drifts"
    assert recovery_error(monitor, np.array(seen), 0.9) < 1e-5


def unsized(x, y):
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    return dataset.filter(lambda *_: True)


def endless(x, y):
    parts = [part.reshape(-1, BATCH, part.shape[1]) for part in (x, y)]
    yield from itertools.cycle(list(zip(*parts, strict=True)))


def ending(x, y, batches):
    yield from itertools.islice(endless(x, y), batches)


@pytest.mark.parametrize("per_execution", [1, 4])
def test_recovers_them_from_data_of_unknown_length(per_execution):
    if per_execution > 1 and not EXACT_EXECUTIONS:
        pytest.skip(f"Keras {keras.__version__} counts on without data")
    x, y = data(25)
    assert unsized(x, y).cardinality() == tf.data.UNKNOWN_CARDINALITY
    model = make_model(steps_per_execution=per_execution)
    monitor = watch(model, unsized(x, y), epochs=2)
    batches = np.concatenate([batches_of(x)] * 2)
    assert recovery_error(monitor, batches, 0.99) < 1e-4


def test_recovers_them_from_a_generator():
    x, y = data(10)
    monitor = watch(make_model(), endless(x, y), steps_per_epoch=10)
    assert recovery_error(monitor, batches_of(x), 0.99) < 1e-4


@pytest.mark.parametrize(("per_execution", "made"), [(1, 6), (4, 8)])
def test_recovers_them_where_an_epoch_is_a_part_of_the_data(per_execution, made):
    """Of endless data, Keras' last execution takes more than `steps_per_epoch`."""
    if per_execution > 1 and not EXACT_EXECUTIONS:
        pytest.skip(f"Keras {keras.__version__} counts on without data")
    x, y = data(2 * made)
    model = make_model(steps_per_execution=per_execution)
    monitor = watch(model, endless(x, y), steps_per_epoch=6, epochs=2)
    assert recovery_error(monitor, batches_of(x), 0.99) < 1e-4


@pytest.mark.parametrize("per_execution", [1, 4])
@pytest.mark.parametrize("made", [6, 7, 9])
def test_recovers_them_where_data_run_out_early(made, per_execution):
    if per_execution > 1 and not EXACT_EXECUTIONS:
        pytest.skip(f"Keras {keras.__version__} counts on without data")
    x, y = data(made)
    model = make_model(steps_per_execution=per_execution)
    monitor = watch(model, ending(x, y, made), steps_per_epoch=10)
    assert recovery_error(monitor, batches_of(x), 0.99) < 1e-4


@pytest.mark.parametrize("per_execution", [1, 4])
def test_recovers_them_where_training_is_stopped_within_an_epoch(per_execution):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.stop_training = batch >= 4

    x, y = data(20)
    model = make_model(steps_per_execution=per_execution)
    monitor = watch(model, x, y, callbacks=[Stop()], epochs=2)
    made = {1: 5, 4: 8}[per_execution]
    assert recovery_error(monitor, batches_of(x)[:made], 0.99) < 1e-4


def test_a_model_that_its_first_step_builds_is_watched_from_the_second():
    layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    x, y = data(10)
    monitor = watch(model, unsized(x, y))
    assert monitor.report.worst.updates == 9
    assert recovery_error(monitor, batches_of(x)[1:], 0.99) < 1e-4


# --- What others write


class AtEpochEnd(keras.callbacks.Callback):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def on_epoch_end(self, epoch, logs=None):
        self.act(self.model, epoch)


def assign(model, epoch):
    model.layers[0].moving_mean.assign([40.0 + epoch] * CHANNELS)


def load(path):
    def act(model, epoch):
        if epoch == 0:
            model.load_weights(path)

    return act


@pytest.mark.parametrize("how", ["assign", "load_weights"])
def test_statistics_replaced_between_epochs_are_not_misread(how, tmp_path):
    x, y = data(10)
    model = make_model()
    path = tmp_path / "start.weights.h5"
    model.save_weights(path)
    act = assign if how == "assign" else load(path)
    monitor = watch(model, x, y, epochs=2, callbacks=[AtEpochEnd(act)])
    batches = np.concatenate([batches_of(x)] * 2)
    # 40 is far from the batches, and rounding is relative to it.
    assert recovery_error(monitor, batches, 0.99) < 1e-3
    # What was put in after the last step has had no update, and the report is of it.
    updates = 0 if how == "assign" else 10
    assert monitor.report.worst.updates == updates
    assert monitor.report.worst.start_weight == pytest.approx(0.99**updates)
    assert (monitor.report.worst.cause == "stale") is (how == "assign")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["validation", "epoch_end"])
@pytest.mark.parametrize("is_first", [False, True])
def test_our_own_recalibration_is_not_misread(when, is_first):
    x, y = data(10)
    monitor = BatchNormMonitor(on_lag="ignore")
    callbacks = [monitor, RecalibrateBatchNorm(x, when=when)]
    make_model().fit(
        x, y, batch_size=BATCH, shuffle=False, epochs=3, verbose=0,
        validation_data=(x, y), callbacks=callbacks[::-1] if is_first else callbacks,
    )  # fmt: skip
    found = recovered(monitor)
    batches = batches_of(x)
    assert len(found) >= 6
    for _, statistics in found:
        # Each is an average of successive batches, whichever they are.
        low, high = batches.min(0), batches.max(0)
        assert (statistics > low - 1e-3).all()
        assert (statistics < high + 1e-3).all()


def test_what_a_backup_restores_at_the_start_is_not_misread(tmp_path):
    class StoppedError(Exception):
        pass

    def interrupt(model, epoch):
        if epoch == 1:
            raise StoppedError

    x, y = data(10)
    backup = str(tmp_path / "backup")
    model = make_model()
    start = model.get_weights()
    with contextlib.suppress(StoppedError):
        stop = AtEpochEnd(interrupt)
        watch(model, x, y, epochs=3,
              callbacks=[keras.callbacks.BackupAndRestore(backup), stop])  # fmt: skip
    model.set_weights(start)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: seen.append(model.layers[0].moving_mean.numpy())
    )
    restore = keras.callbacks.BackupAndRestore(backup)
    monitor = watch(model, x, y, epochs=3, callbacks=[restore, look])
    assert np.abs(seen[0]).max() > 0, "restored"
    epochs = len(seen)
    assert monitor.report.worst.updates == 10 * epochs
    batches = np.concatenate([batches_of(x)] * epochs)
    assert recovery_error(monitor, batches, 0.99) < 1e-4


def test_restored_best_weights_do_not_disturb_the_next_fit():
    x, y = data(10)
    model = make_model()
    early = keras.callbacks.EarlyStopping("loss", mode="max", patience=1,
                                          restore_best_weights=True)  # fmt: skip
    monitor = watch(model, x, y, epochs=5, callbacks=[early])
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[monitor])
    assert monitor.report.worst.updates == 10
    assert recovery_error(monitor, batches_of(x), 0.99) < 1e-4


# --- Training is what it is without the monitor


def deep_model():
    model = keras.Sequential(
        [
            keras.Input((CHANNELS,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return model


def test_training_is_bit_identical_with_it(tmp_path):
    x, y = data(12)

    def run(callbacks):
        keras.utils.set_random_seed(1)
        model = deep_model()
        history = model.fit(x, y, epochs=2, batch_size=BATCH, verbose=0,
                            validation_split=0.2, callbacks=callbacks)  # fmt: skip
        optimizer = [variable.numpy() for variable in model.optimizer.variables]
        return model.get_weights() + optimizer, history.history

    plain, history = run([])
    monitor = BatchNormMonitor(tmp_path, "batch", probe=(x, y), on_lag="ignore")
    watched, watched_history = run([monitor])
    for one, other in zip(plain, watched, strict=True):
        np.testing.assert_array_equal(one, other)
    for name, values in history.items():
        assert watched_history[name] == values
    touched, _ = run(
        [AtEpochEnd(lambda model, _: model.layers[0].bias.assign_add([1e-6] * 8))]
    )
    assert not np.array_equal(touched[0], plain[0]), "this test can fail"


def test_keeps_keras_asynchronous(monkeypatch):
    if not hasattr(keras.callbacks.CallbackList(), "_async_train"):
        pytest.skip(f"Keras {keras.__version__} dispatches no callback asynchronously")
    # Keras 3.15 does so on other backends only.
    monkeypatch.setattr("keras.src.backend.IS_THREAD_SAFE", True)

    class Synchronous(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            pass

    for callback in (BatchNormMonitor(), DebiasBatchNorm(), RecalibrateBatchNorm([])):
        assert keras.callbacks.CallbackList([callback])._async_train
    assert not keras.callbacks.CallbackList([Synchronous()])._async_train


# --- Reports and logs


def test_lag_is_the_error_of_the_normalised_output():
    x, y = data(1)
    steps = 20
    model = make_model()
    monitor = watch(model, x, y, epochs=steps)
    layer = model.layers[0]
    mean, variance = batches_of(x)[0]
    sigma, moving_sigma = (
        np.sqrt(np.asarray(value) + layer.epsilon)
        for value in (variance, layer.moving_variance)
    )
    shift = (mean - np.asarray(layer.moving_mean)) / moving_sigma
    scale = sigma / moving_sigma
    report = monitor.report.worst
    assert report.lag == pytest.approx(
        np.sqrt(np.mean(shift**2 + (scale - 1) ** 2)), 1e-3
    )
    assert report.mean_shift == pytest.approx(np.sqrt(np.mean(shift**2)), 1e-3)
    assert report.scale_ratio == pytest.approx(np.exp(np.log(scale).mean()), 1e-3)
    assert report.start_weight == pytest.approx(0.99**steps)
    assert report.updates == steps
    assert report.momentum == 0.99
    assert monitor.history["bn_lag"][-1] == report.lag == monitor.report.max_lag


def test_report_is_none_before_the_first_epoch_has_ended():
    x, y = data(5)
    monitor = BatchNormMonitor(on_lag="ignore")
    seen = [monitor.report]
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: seen.append(monitor.report),
        on_epoch_end=lambda *_: seen.append(monitor.report),
    )
    make_model().fit(x, y, verbose=0, callbacks=[monitor, look])
    assert seen[:2] == [None, None]
    assert len(seen[2].layers) == 1


def test_logs_reach_history_csv_and_early_stopping(tmp_path):
    x, y = data(10)
    path = tmp_path / "log.csv"
    early = keras.callbacks.EarlyStopping("bn_lag", mode="max", patience=2)
    monitor = BatchNormMonitor(on_lag="ignore", probe=(x, y))
    history = make_model(0.9).fit(
        x, y, epochs=9, verbose=0,
        callbacks=[monitor, keras.callbacks.CSVLogger(path), early],
    ).history  # fmt: skip
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("bn_lag", "bn_loss_gap"):
        assert [float(row[name]) for row in rows] == pytest.approx(history[name])
    assert len(rows) < 9, "the lag falls, so that waiting for more of it ends the fit"


def test_loss_gap_is_the_loss_in_inference_mode_over_that_with_batch_statistics():
    x, y = data(2)
    weight = np.linspace(0, 1, len(x)).astype("float32")
    model = make_model()
    monitor = BatchNormMonitor(on_lag="ignore", probe=(x[:24], y[:24], weight[:24]))
    history = model.fit(x, y, verbose=0, callbacks=[monitor]).history
    inference = model.evaluate(x[:24], y[:24], sample_weight=weight[:24], verbose=0)
    assert monitor.report.loss_inference == pytest.approx(inference, rel=1e-5)
    prediction = np.asarray(model(x[:24], training=True))
    batch = np.mean(weight[:24] * np.square(prediction - y[:24])[:, 0])
    assert monitor.report.loss_batch == pytest.approx(batch, rel=1e-4)
    assert history["bn_loss_gap"] == [monitor.report.loss_gap]
    assert monitor.report.loss_gap == pytest.approx(inference / batch, rel=1e-4)


def test_a_second_fit_starts_afresh():
    x, y = data(10)
    model = make_model()
    monitor = watch(model, x, y)
    first = monitor.report
    model.fit(x[: 4 * BATCH], y[: 4 * BATCH], batch_size=BATCH, shuffle=False,
              verbose=0, callbacks=[monitor])  # fmt: skip
    assert monitor.report is not first
    assert monitor.report.worst.updates == 4
    assert recovery_error(monitor, batches_of(x)[:4], 0.99) < 1e-4
    other = make_model(0.9)
    other.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[monitor])
    assert monitor.report.worst.momentum == 0.9
    assert recovery_error(monitor, batches_of(x), 0.9) < 1e-4


def test_layers_chooses_what_is_watched():
    model = deep_model()
    x, y = data(5)
    name = model.layers[5].name
    monitor = BatchNormMonitor(on_lag="ignore", layers=name)
    model.fit(x, y, verbose=0, callbacks=[monitor])
    (report,) = monitor.report.layers
    assert report.path.endswith(name)


def test_verbose_prints_the_report(capsys):
    x, y = data(5)
    quiet, loud = (BatchNormMonitor(on_lag="ignore", verbose=v) for v in (0, 1))
    model = make_model()
    model.fit(x, y, verbose=0, callbacks=[quiet])
    assert capsys.readouterr().out == ""
    model.fit(x, y, epochs=2, verbose=0, callbacks=[loud])
    out = capsys.readouterr().out
    assert out.startswith("Epoch 1: 1 of 1 BatchNormalization layers ")
    assert out.endswith(f"Epoch 2: {loud.report}\n")


def test_evaluate_and_predict_outside_fit_do_nothing(tmp_path):
    x, y = data(5)
    monitor = BatchNormMonitor(tmp_path / "logs")
    model = make_model()
    model.evaluate(x, y, verbose=0, callbacks=[monitor])
    model.predict(x, verbose=0, callbacks=[monitor])
    assert monitor.report is None
    with pytest.warns(BatchNormLagWarning):
        model.fit(x, y, verbose=0, callbacks=[monitor])
    before = monitor.report
    files = sorted(os.listdir(tmp_path / "logs/batch_norm"))
    model.evaluate(x, y, verbose=0, callbacks=[monitor])
    assert monitor.report is before
    assert sorted(os.listdir(tmp_path / "logs/batch_norm")) == files


def test_nothing_is_written_without_log_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = data(5)
    watch(make_model(), x, y)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("announced", [True, False])
def test_a_hand_written_loop_drives_it(announced):
    x, y = data(40)
    model = make_model(0.9, compiled=False)
    optimizer = keras.optimizers.SGD(1e-3)
    monitor = BatchNormMonitor(on_lag="ignore")
    params = {"steps": 40, "epochs": 1} if announced else {}
    callbacks = keras.callbacks.CallbackList([monitor], model=model, **params)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    pairs = itertools.islice(endless(x, y), 40)
    for batch, (inputs, targets) in enumerate(pairs):
        callbacks.on_train_batch_begin(batch)
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = tf.reduce_mean(tf.square(outputs - targets))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        callbacks.on_train_batch_end(batch)
    logs = {}
    callbacks.on_epoch_end(0, logs)
    callbacks.on_train_end()
    # How many steps the last window has, only an announcement could tell.
    seen = batches_of(x)[: None if announced else 30]
    assert recovery_error(monitor, seen, 0.9) < 1e-5
    assert monitor.report.worst.lag is not None


# --- Findings


def fit_with(monitor, model, x, y, others=(), **fit_arguments):
    fit_arguments = {"batch_size": BATCH, "verbose": 0} | fit_arguments
    return model.fit(x, y, callbacks=[monitor, *others], **fit_arguments)


def lag_warnings(warned):
    return [
        str(item.message)
        for item in warned
        if issubclass(item.category, BatchNormLagWarning)
    ]


def test_warns_of_warming_up_once_with_layer_figure_cause_and_remedy():
    x, y = data(20, spread=0)
    model = make_model()
    monitor = BatchNormMonitor()
    worsts = []
    look = AtEpochEnd(lambda *_: worsts.append(monitor.report.worst))
    with pytest.warns(BatchNormLagWarning) as warned:
        fit_with(monitor, model, x, y, [look], epochs=3)
    (message,) = lag_warnings(warned)
    # The second look confirms the first.
    worst = worsts[1]
    assert worst.cause == "warming_up"
    assert worst.path in message
    assert f"{worst.lag:.2f} standard deviations" in message
    assert "warming_up" in message
    assert "RecalibrateBatchNorm" in message
    assert "DebiasBatchNorm" in message
    assert f"momentum={worst.suggested_momentum:.3g}" in message


def test_a_run_that_will_have_warmed_up_at_its_end_is_let_run():
    x, y = data(5, spread=0)
    monitor = BatchNormMonitor()
    history = fit_with(monitor, make_model(0.8), x, y, epochs=6).history
    assert history["bn_lag"][0] > 0.2 > history["bn_lag"][-1]


def test_knows_how_long_a_resumed_fit_is():
    x, y = data(20, spread=0)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append(monitor._watch.steps_left)
    )
    monitor = BatchNormMonitor(on_lag="ignore")
    fit_with(monitor, make_model(), x, y, [look], initial_epoch=5, epochs=7)
    assert seen == [20, 0]


def test_warns_of_drift():
    class Drift(keras.callbacks.Callback):
        """Stands for weights that move fast: the layer before shifts each step."""

        def on_train_batch_begin(self, batch, logs=None):
            self.model.layers[0].bias.assign_add([0.1] * CHANNELS)

    model = keras.Sequential(
        [
            keras.Input((CHANNELS,)),
            keras.layers.Dense(CHANNELS),
            keras.layers.BatchNormalization(momentum=0.95),
            keras.layers.Dense(1),
        ]
    )
    model.layers[0].set_weights([np.eye(CHANNELS), np.zeros(CHANNELS)])
    model.layers[0].trainable = False
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    x, y = data(200, spread=0)
    monitor = BatchNormMonitor()
    with pytest.warns(BatchNormLagWarning, match="drifting") as warned:
        fit_with(monitor, model, x, y, [Drift()], epochs=2)
    assert len(lag_warnings(warned)) == 1
    assert monitor.report.worst.cause == "drifting"
    # The average trails a ramp of 0.1 a step by m/(1−m) steps, σ is 2.
    expected = 0.1 * 0.95 / 0.05 / 2
    assert monitor.report.worst.mean_shift == pytest.approx(expected, rel=0.35)


def test_warns_of_too_short_a_memory():
    x, y = data(100, spread=0)
    monitor = BatchNormMonitor()
    with pytest.warns(BatchNormLagWarning, match="noisy"):
        fit_with(monitor, make_model(0.0), x, y)
    worst = monitor.report.worst
    assert worst.noise > 0.2
    assert worst.suggested_momentum > 0


def test_warns_of_statistics_that_never_move():
    x, y = data(10)
    with pytest.warns(BatchNormLagWarning, match="not_updating"):
        fit_with(BatchNormMonitor(), make_model(1.0), x, y)


class ForgetsTraining(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = keras.layers.BatchNormalization()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(self.norm(inputs, training=False))


@pytest.mark.parametrize("is_corrected", [False, True])
def test_warns_of_inference_mode_whatever_would_correct_it(is_corrected):
    x, y = data(10)
    model = ForgetsTraining()
    model.compile("sgd", "mse")
    others = [DebiasBatchNorm()] if is_corrected else []
    with pytest.warns(BatchNormLagWarning, match=r"inference_mode.*not recalibrate"):
        fit_with(BatchNormMonitor(), model, x, y, others)


def test_warns_of_nan():
    x, y = data(10)
    x[100] = np.nan
    monitor = BatchNormMonitor()
    with pytest.warns(BatchNormLagWarning, match="non_finite"):
        history = fit_with(monitor, make_model(), x, y, epochs=2).history
    assert history["bn_lag"] == [np.inf] * 2


def test_on_lag_raise_raises(tmp_path):
    x, y = data(10)
    monitor = BatchNormMonitor(tmp_path, on_lag="raise")
    with pytest.raises(BatchNormLagWarning, match="warming_up"):
        fit_with(monitor, make_model(), x, y, epochs=3)
    assert monitor.report.worst.cause == "warming_up"
    assert not any(file.is_open for file in monitor._writer._files.values())


def test_on_lag_ignore_says_nothing():
    x, y = data(10)
    fit_with(BatchNormMonitor(on_lag="ignore"), make_model(), x, y)


def test_a_threshold_above_the_lag_says_nothing():
    x, y = data(10)
    fit_with(BatchNormMonitor(threshold=100.0), make_model(), x, y)


def test_is_silent_in_a_long_healthy_run():
    x, y = data(200, spread=0)
    monitor = BatchNormMonitor(probe=(x[:256], y[:256]))
    fit_with(monitor, make_model(0.9), x, y, epochs=3)
    assert monitor.report.lagging == ()


def test_is_silent_for_frozen_layers():
    x, y = data(20)
    model = make_model(compiled=False)
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    monitor = BatchNormMonitor()
    fit_with(monitor, model, x, y, epochs=2)
    assert monitor.report.worst.cause == "healthy"


def test_a_model_without_such_layers_gets_one_quiet_note(capsys):
    layers = [keras.layers.LayerNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((CHANNELS,)), *layers])
    model.compile("sgd", "mse")
    x, y = data(5)
    monitor = BatchNormMonitor(verbose=0)
    history = fit_with(monitor, model, x, y, epochs=2).history
    out = capsys.readouterr().out
    assert out.count("no BatchNormalization layer") == len(out.splitlines()) == 1
    assert history["bn_lag"] == [0.0, 0.0]
    assert monitor.report.layers == ()


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("other", ["debias", "train_end", "validation", "epoch_end"])
def test_is_silent_where_another_callback_will_cure_it(other, is_first):
    x, y = data(20, spread=0)
    cure = (
        DebiasBatchNorm() if other == "debias" else RecalibrateBatchNorm(x, when=other)
    )
    monitor = BatchNormMonitor()
    callbacks = [cure, monitor] if is_first else [monitor, cure]
    make_model().fit(x, y, batch_size=BATCH, verbose=0, callbacks=callbacks)
    model = make_model()
    with pytest.warns(BatchNormLagWarning, match="warming_up"):
        fit_with(monitor, model, x, y)


def test_a_cure_in_an_aborted_fit_does_not_silence_the_next():
    class Abort(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            raise KeyboardInterrupt

    x, y = data(20, spread=0)
    model = make_model()
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[RecalibrateBatchNorm(x), Abort()])
    with pytest.warns(BatchNormLagWarning, match="warming_up"):
        fit_with(BatchNormMonitor(), model, x, y)


@pytest.mark.parametrize("is_first", [False, True])
def test_debiasing_silences_no_other_cause(is_first):
    x, y = data(10)
    callbacks = [BatchNormMonitor(), DebiasBatchNorm()]
    with pytest.warns(BatchNormLagWarning, match="not_updating"):
        make_model(1.0).fit(
            x, y, verbose=0, callbacks=callbacks[::-1] if is_first else callbacks
        )


# --- Arguments


@pytest.mark.parametrize(
    ("arguments", "what", "received"),
    [
        ({"update_freq": 0}, "positive number of batches", "update_freq=0"),
        ({"update_freq": "epoch"}, "'auto', 'batch' or", "update_freq='epoch'"),
        ({"on_lag": "print"}, "'warn', 'raise' or 'ignore'", "on_lag='print'"),
        ({"threshold": 0}, "positive number", "threshold=0"),
        ({"threshold": None}, "positive number", "threshold=None"),
        ({"probe": [1, 2]}, r"a tuple \(x, y\)", "probe of type list"),
        ({"probe": (1,)}, r"a tuple \(x, y\)", "probe of type tuple"),
    ],
)
def test_bad_arguments_are_named_at_once(arguments, what, received):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`.*{what}.*Received: {received}"):
        BatchNormMonitor(**arguments)


def test_a_probe_without_targets_is_refused_before_training():
    x, y = data(2)
    monitor = BatchNormMonitor(probe=(x, None))
    with pytest.raises(ValueError, match="targets=False"):
        fit_with(monitor, make_model(), x, y)
    assert monitor.report is None


def test_layers_that_do_not_exist_are_refused_before_training():
    x, y = data(2)
    with pytest.raises(ValueError, match=r"`layers` selects no .* Received: 'bn7'"):
        fit_with(BatchNormMonitor(layers="bn7"), make_model(), x, y)


@pytest.mark.parametrize(
    ("momenta", "total", "epoch", "expected"),
    [
        ([0.99], None, None, 50),  # half the memory of 100
        ([0.999], None, None, 100),
        ([0.0, 0.5], None, None, 10),
        ([0.99], 100, None, 10),  # ten windows at least
        ([0.99], 5, None, 1),
        ([1.0], None, None, 100),
        ([0.99], None, 100, 20),  # five windows an epoch
        ([0.99], None, 20, 10),  # but not at any cost
        ([0.99], None, 1000, 50),
        ([0.99], 60, 100, 6),
    ],
)
def test_reads_as_often_as_the_longest_memory_makes_sensible(
    momenta, total, epoch, expected
):
    assert reading_interval(momenta, total, epoch) == expected


def test_a_dataset_is_a_probe_too():
    x, y = data(20)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    monitor = BatchNormMonitor(on_lag="ignore", probe=batches)
    same = BatchNormMonitor(on_lag="ignore", probe=(x, y))
    endless_one = BatchNormMonitor(on_lag="ignore", probe=batches.repeat())
    make_model().fit(batches, verbose=0, callbacks=[monitor, same, endless_one])
    assert monitor.report.loss_batch == pytest.approx(same.report.loss_batch, rel=1e-3)
    assert endless_one.report.loss_recalibrated > 0

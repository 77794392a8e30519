"""DebiasBatchNorm against the closed form over all batches of a real `fit`."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_callbacks import (
    BatchNormWarning,
    DebiasBatchNorm,
    RecalibrateBatchNorm,
    recalibrate,
)

BATCH = 16
CHANNELS = 3
STEPS = 5
HAS_RENORM = "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters


def data(seed=0, steps=STEPS):
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal(4, 1, (steps, 1, 1)), 2, (steps, BATCH, CHANNELS))
    x = x.reshape(-1, CHANNELS).astype("float32")
    return x, x.sum(1, keepdims=True)


EPOCHS = 3
# Of each epoch, other batches: repeated ones would hide a wrong number of steps.
ALL_X, ALL_Y = data(steps=EPOCHS * STEPS)
X, Y = ALL_X[: STEPS * BATCH], ALL_Y[: STEPS * BATCH]


def make_model(*momenta, first=keras.layers.BatchNormalization, **compile_arguments):
    """BN layers side by side, so that all of them see the data themselves."""
    inputs = keras.Input((CHANNELS,))
    outputs = [first(momentum=momentum)(inputs) for momentum in momenta or (0.99,)]
    merged = keras.layers.Concatenate()(outputs) if len(outputs) > 1 else outputs[0]
    model = keras.Model(inputs, keras.layers.Dense(1)(merged))
    model.compile(keras.optimizers.SGD(1e-3), "mse", **compile_arguments)
    return model


def norms(model):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def statistics(layer):
    return np.array([layer.moving_mean, layer.moving_variance], np.float64)


def moments(x):
    batches = np.asarray(x, np.float64).reshape(-1, BATCH, CHANNELS)
    return np.stack([batches.mean(1), batches.var(1)], 1)


def seen_in(epochs):
    """The batches of so many epochs."""
    return moments(ALL_X)[: epochs * STEPS]


def closed_form(batches, momentum):
    """`Σ (1−m)·m^(t−1−i)·b_i / (1−m^t)`."""
    t = len(batches)
    weights = (1 - momentum) * momentum ** np.arange(t - 1, -1, -1) / (1 - momentum**t)
    return np.tensordot(weights, batches, 1)


def raw_average(batches, momentum):
    """The moving average as Keras has it, from 0 and 1."""
    value = np.array([np.zeros(CHANNELS), np.ones(CHANNELS)])
    for batch in batches:
        value = momentum * value + (1 - momentum) * batch
    return value


class AtValidation(keras.callbacks.Callback):
    """Notes what each validation works with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_test_begin(self, logs=None):
        self.seen.append([statistics(layer) for layer in norms(self.model)])


def fit(model, *callbacks, epochs=1, begin=0, **arguments):
    """Trains on the batches of some epochs, from number `begin` on."""
    part = slice(begin * STEPS * BATCH, (begin + epochs) * STEPS * BATCH)
    dataset = tf.data.Dataset.from_tensor_slices((ALL_X[part], ALL_Y[part]))
    own = {"steps_per_epoch": STEPS, "validation_batch_size": BATCH, "verbose": 0}
    arguments = own | arguments
    return model.fit(
        dataset.batch(BATCH), epochs=epochs, callbacks=list(callbacks), **arguments
    )


def fit_again(model, *callbacks, x=X, y=Y, epochs=1, **arguments):
    """Trains on the same arrays in each epoch."""
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | arguments
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **arguments)


# --- The closed form


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_ends_with_the_closed_form_over_all_batches(momentum):
    model = make_model(momentum)
    fit(model, DebiasBatchNorm(), epochs=2)
    expected = closed_form(seen_in(2), momentum)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


def test_each_validation_works_with_the_closed_form_of_its_time():
    momenta = (0.9, 0.99, 0.0)
    model = make_model(*momenta)
    look = AtValidation()
    fit(model, DebiasBatchNorm(), look, epochs=3, validation_data=(X, Y))
    assert len(look.seen) == 3
    for epoch, seen in enumerate(look.seen, 1):
        for momentum, values in zip(momenta, seen, strict=True):
            expected = closed_form(seen_in(epoch), momentum)
            np.testing.assert_allclose(values, expected, rtol=1e-4)
    # What is in the model at the end is what the last validation saw.
    for layer, values in zip(norms(model), look.seen[-1], strict=True):
        np.testing.assert_array_equal(statistics(layer), values)


def test_validation_need_not_be_every_epoch():
    model = make_model()
    look = AtValidation()
    fit(model, DebiasBatchNorm(), look, epochs=3, validation_data=(X, Y),
        validation_freq=2)  # fmt: skip
    (seen,) = look.seen
    np.testing.assert_allclose(seen[0], closed_form(seen_in(2), 0.99), rtol=1e-4)
    expected = closed_form(seen_in(3), 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


def test_validation_losses_are_those_of_the_debiased_model():
    model = make_model()
    history = fit(model, DebiasBatchNorm(), epochs=2, validation_data=(X, Y)).history
    loss = model.evaluate(X, Y, batch_size=BATCH, verbose=0)
    assert history["val_loss"][-1] == pytest.approx(loss)
    plain = fit(make_model(), epochs=2, validation_data=(X, Y)).history
    assert history["val_loss"][-1] < plain["val_loss"][-1] / 2


def test_momentum_one_has_nothing_to_debias():
    model = make_model(1.0, 0.9)
    fit(model, DebiasBatchNorm(), validation_data=(X, Y))
    still, moving = map(statistics, norms(model))
    np.testing.assert_array_equal(still, [[0] * CHANNELS, [1] * CHANNELS])
    np.testing.assert_allclose(moving, closed_form(seen_in(1), 0.9), rtol=1e-4)


def test_the_start_may_be_any_value():
    model = make_model(0.9)
    norms(model)[0].set_weights(
        [np.ones(3), np.zeros(3), np.full(3, -50.0), np.full(3, 70.0)]
    )
    fit(model, DebiasBatchNorm(), epochs=2)
    expected = closed_form(seen_in(2), 0.9)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


@pytest.mark.parametrize("per_execution", [2, 5])
def test_holds_with_steps_per_execution(per_execution):
    model = make_model(steps_per_execution=per_execution)
    fit_again(model, DebiasBatchNorm(), epochs=2, validation_data=(X, Y))
    expected = closed_form(np.concatenate([moments(X)] * 2), 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


def test_holds_for_data_of_unknown_length():
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    model = make_model()
    dataset = dataset.filter(lambda *_: True)
    model.fit(dataset, epochs=2, verbose=0, callbacks=[DebiasBatchNorm()])
    expected = closed_form(np.concatenate([moments(X)] * 2), 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


def test_holds_for_a_layer_called_twice():
    inputs = [keras.Input((CHANNELS,)) for _ in range(2)]
    shared = keras.layers.BatchNormalization()
    merged = keras.layers.Add()([shared(x) for x in inputs])
    model = keras.Model(inputs, keras.layers.Dense(1)(merged))
    model.compile("sgd", "mse")
    other, _ = data(1)
    model.fit([X, other], Y, batch_size=BATCH, shuffle=False, verbose=0,
              callbacks=[DebiasBatchNorm()])  # fmt: skip
    both = np.stack([moments(X), moments(other)], 1).reshape(-1, 2, CHANNELS)
    np.testing.assert_allclose(statistics(shared), closed_form(both, 0.99), rtol=1e-4)


def test_holds_for_a_model_that_its_first_step_builds():
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([norm, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, DebiasBatchNorm(), epochs=2)
    expected = closed_form(seen_in(2), 0.99)
    np.testing.assert_allclose(statistics(norm), expected, rtol=1e-4)


@pytest.mark.skipif(not HAS_RENORM, reason="this Keras has no renormalisation")
def test_holds_for_renormalisation_which_averages_the_standard_deviation():
    def renorm(**arguments):
        # Corrections clipped away: batches enter as they are.
        clipping = {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}
        return keras.layers.BatchNormalization(
            renorm=True, renorm_clipping=clipping, **arguments
        )

    model = make_model(0.9, first=renorm)
    (layer,) = norms(model)
    fit(model, DebiasBatchNorm(), epochs=2, validation_data=(X, Y))
    batches = seen_in(2)
    batches[:, 1] = np.sqrt(batches[:, 1] + layer.epsilon)
    mean, stddev = closed_form(batches, 0.9)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-4)
    np.testing.assert_allclose(layer.moving_stddev, stddev, rtol=1e-4)
    np.testing.assert_allclose(
        layer.moving_variance, stddev**2 - layer.epsilon, rtol=1e-4
    )


# --- What it leaves alone


def test_training_is_bit_identical_with_it():
    def run(*callbacks):
        keras.utils.set_random_seed(1)
        model = make_model(0.9, 0.99)
        history = fit(model, *callbacks, epochs=3, validation_data=(X, Y)).history
        return model, history["loss"]

    (plain, loss), (debiased, other_loss) = run(), run(DebiasBatchNorm())
    assert loss == other_loss
    for one, other in zip(
        plain.trainable_weights + plain.optimizer.variables,
        debiased.trainable_weights + debiased.optimizer.variables,
        strict=True,
    ):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_the_raw_average_goes_on_right():
    """Had the debiased part weighed 1 − m^t, all would be as without us."""
    model = make_model()
    look = AtValidation()
    fit(model, DebiasBatchNorm(), look, epochs=3, validation_data=(X, Y))
    t = 3 * STEPS
    start = raw_average([], 0.99)
    raw = (1 - 0.99**t) * statistics(norms(model)[0]) + 0.99**t * start
    np.testing.assert_allclose(raw, raw_average(seen_in(3), 0.99), rtol=1e-4)


def test_frozen_layers_stay_as_they_are():
    model = make_model(0.9, 0.9)
    norms(model)[0].trainable = False
    model.compile("sgd", "mse")
    before = statistics(norms(model)[0])
    fit(model, DebiasBatchNorm())
    np.testing.assert_array_equal(statistics(norms(model)[0]), before)
    expected = closed_form(seen_in(1), 0.9)
    np.testing.assert_allclose(statistics(norms(model)[1]), expected, rtol=1e-4)


def test_nan_is_left_for_others_to_report():
    x = X.copy()
    x[3] = np.nan
    model = make_model()
    fit_again(model, DebiasBatchNorm(), x=x, validation_data=(X, Y))
    assert np.isnan(statistics(norms(model)[0])).all()


def test_a_model_without_such_layers_is_trained_as_ever():
    model = keras.Sequential([keras.Input((CHANNELS,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, DebiasBatchNorm(), validation_data=(X, Y))


def test_evaluating_outside_fit_changes_nothing():
    model = make_model()
    callback = DebiasBatchNorm()
    fit(model)
    before = statistics(norms(model)[0])
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(statistics(norms(model)[0]), before)
    fit(model, callback)
    before = statistics(norms(model)[0])
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(statistics(norms(model)[0]), before)


# --- A second fit, and what others write


def test_a_second_fit_goes_on_from_the_first():
    model = make_model()
    callback = DebiasBatchNorm()
    fit(model, callback)
    fit(model, callback, begin=1, epochs=2)
    expected = closed_form(seen_in(3), 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


def test_a_fit_of_another_model_begins_anew():
    callback = DebiasBatchNorm()
    fit(make_model(), callback)
    model = make_model()
    fit(model, callback)
    expected = closed_form(seen_in(1), 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


def test_what_was_written_between_two_fits_is_the_new_start():
    model = make_model()
    callback = DebiasBatchNorm()
    fit(model, callback)
    recalibrate(model, X + 100, verbose=0)
    fit(model, callback)
    expected = closed_form(seen_in(1), 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-3)


class AtEpochEnd(keras.callbacks.Callback):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def on_epoch_end(self, epoch, logs=None):
        self.act(self.model, epoch)


def after_writing(written, batches, momentum):
    """A moving average that goes on from what was written."""
    for batch in batches:
        written = momentum * written + (1 - momentum) * batch
    return written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "is_first", "is_validated"),
    [
        ("assign", False, False),
        ("assign", False, True),
        # Listed before us and without validation, it looks like training.
        ("assign", True, True),
        ("recalibrate", False, True),
        ("recalibrate", True, False),
    ],
)
def test_what_others_write_within_a_fit_is_no_start_value(how, is_first, is_validated):
    """It is not taken out: the average goes on from it as Keras has it."""
    far = [np.full(CHANNELS, 30.0), np.full(CHANNELS, 9.0)]

    def write(model, epoch):
        if epoch == 0 and how == "assign":
            (layer,) = norms(model)
            layer.moving_mean.assign(far[0])
            layer.moving_variance.assign(far[1])
        elif epoch == 0:
            report = recalibrate(model, X, verbose=0)
            assert report.committed

    model = make_model(0.9)
    callbacks = [DebiasBatchNorm(), AtEpochEnd(write)]
    validation = {"validation_data": (X, Y)} if is_validated else {}
    fit(model, *(callbacks[::-1] if is_first else callbacks), epochs=3, **validation)
    pooled = np.stack([X.mean(0, dtype=float), X.var(0, dtype=float)])
    written = np.stack(far) if how == "assign" else pooled
    expected = after_writing(written, seen_in(3)[STEPS:], 0.9)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


def test_recalibration_for_validation_only_does_not_disturb_it():
    model = make_model()
    other = RecalibrateBatchNorm(X, when="validation")
    other.on_train_end = lambda logs=None: None
    fit(model, DebiasBatchNorm(), other, epochs=3, validation_data=(X, Y))
    expected = closed_form(seen_in(3), 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)


@pytest.mark.parametrize("is_first", [False, True])
def test_restored_best_weights_are_not_debiased_again(is_first):
    model = make_model()
    saved = []
    look = AtEpochEnd(lambda model, _: saved.append(statistics(norms(model)[0])))
    early = keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=1, restore_best_weights=True
    )
    callbacks = [early, DebiasBatchNorm()]
    fit(model, *(callbacks if is_first else callbacks[::-1]), look, epochs=3)
    assert early.stopped_epoch == 1
    np.testing.assert_array_equal(statistics(norms(model)[0]), saved[early.best_epoch])


def test_says_so_where_the_number_of_steps_cannot_be_known():
    model = make_model()
    model.optimizer = None
    callbacks = keras.callbacks.CallbackList([DebiasBatchNorm()], model=model)

    def run():
        callbacks.on_train_begin()
        for epoch in range(2):
            callbacks.on_epoch_begin(epoch)
            for batch in range(STEPS):
                callbacks.on_train_batch_begin(batch)
                model(X[:BATCH], training=True)
            callbacks.on_epoch_end(epoch)
        callbacks.on_train_end()

    with pytest.warns(
        BatchNormWarning, match="Received: an unknown number of steps or of updates"
    ) as warned:
        run()
    assert len(warned) == 1
    expected = raw_average([moments(X)[0]] * 2 * STEPS, 0.99)
    np.testing.assert_allclose(statistics(norms(model)[0]), expected, rtol=1e-4)

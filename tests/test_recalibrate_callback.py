"""RecalibrateBatchNorm in real `fit`s."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_callbacks import RecalibrateBatchNorm, recalibrate
from bn_callbacks.layers import lending

BATCH = 16
CHANNELS = 3
STEPS = 5


def data(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal(4, 1, (STEPS, 1, 1)), 2, (STEPS, BATCH, CHANNELS))
    x = x.reshape(-1, CHANNELS).astype("float32")
    return x, x.sum(1, keepdims=True)


X, Y = data()
VALIDATION = data(1)


def make_model(optimizer=None, momentum=0.99):
    """A BN layer that sees the data, and one behind weights that move."""
    model = keras.Sequential(
        [
            keras.Input((CHANNELS,)),
            keras.layers.BatchNormalization(momentum=momentum),
            keras.layers.Dense(6),
            keras.layers.BatchNormalization(momentum=momentum),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer or keras.optimizers.SGD(0.02), "mse")
    return model


def norms(model):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def statistics(model):
    return [
        np.array([layer.moving_mean, layer.moving_variance]) for layer in norms(model)
    ]


def population(model, x=X):
    """Moments of what each BN layer is given in inference mode, over all data."""
    values, moments = np.asarray(x), []
    for layer in model.layers:
        if layer in norms(model):
            values = np.asarray(values, np.float64)
            moments.append(np.stack([values.mean(0), values.var(0)]))
        values = np.asarray(layer(values.astype("float32"), training=False))
    return moments


def assert_recalibrated(model, x=X, rtol=5e-3):
    for stored, seen in zip(statistics(model), population(model, x), strict=True):
        np.testing.assert_allclose(stored, seen, rtol=rtol, atol=rtol)


def assert_not_recalibrated(model):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_recalibrated(model)


class Look(keras.callbacks.Callback):
    """Notes the statistics at the hooks named."""

    def __init__(self, *hooks):
        super().__init__()
        self.seen = []
        for hook in hooks:
            setattr(self, hook, self.note)

    def note(self, *_, **__):
        self.seen.append(statistics(self.model))


def fit(model, *callbacks, **arguments):
    arguments = {"batch_size": BATCH, "epochs": 2, "verbose": 0} | arguments
    return model.fit(X, Y, callbacks=list(callbacks), **arguments)


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


# --- When


def test_a_model_is_not_recalibrated_by_itself():
    model = make_model()
    fit(model)
    assert_not_recalibrated(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "is_validated"),
    [
        ("train_end", False),
        ("validation", False),
        ("validation", True),
        ("epoch_end", False),
        ("epoch_end", True),
    ],
)
def test_a_model_is_recalibrated_after_fit(when, is_validated):
    model = make_model()
    callback = RecalibrateBatchNorm(X, when=when)
    assert callback.report is None
    fit(model, callback, validation_data=VALIDATION if is_validated else None)
    assert_recalibrated(model)
    assert callback.report.committed
    assert callback.report.samples == len(X)


def test_validation_uses_recalibrated_statistics():
    model = make_model()
    losses = []

    class Expected(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            twin = make_model()
            twin.set_weights(model.get_weights())
            recalibrate(twin, X, verbose=0)
            losses.append(twin.evaluate(*VALIDATION, batch_size=BATCH, verbose=0))

    callback = RecalibrateBatchNorm(X, when="validation")
    logs = fit(model, callback, Expected(), validation_data=VALIDATION).history
    assert logs["val_loss"] == pytest.approx(losses, rel=1e-4)
    loss = model.evaluate(*VALIDATION, batch_size=BATCH, verbose=0)
    assert logs["val_loss"][-1] == pytest.approx(loss)


def test_at_train_end_validation_uses_what_is_there():
    def run(*callbacks):
        keras.utils.set_random_seed(1)
        return fit(make_model(), *callbacks, validation_data=VALIDATION).history

    assert run(RecalibrateBatchNorm(X)) == run()


def test_training_is_bit_identical_with_it():
    def run(*callbacks):
        keras.utils.set_random_seed(1)
        model = make_model(keras.optimizers.SGD(0.02, momentum=0.9))
        loss = fit(model, *callbacks, validation_data=VALIDATION).history["loss"]
        return model, loss

    plain, loss = run()
    for when in ("train_end", "validation", "epoch_end"):
        model, other_loss = run(RecalibrateBatchNorm(X, when=when))
        assert loss == other_loss
        assert_same(
            [v.numpy() for v in plain.trainable_weights + plain.optimizer.variables],
            [v.numpy() for v in model.trainable_weights + model.optimizer.variables],
        )
        assert not np.array_equal(statistics(plain)[0], statistics(model)[0])


def test_between_validations_the_averages_are_bit_identical_to_those_without_it():
    def run(*callbacks):
        keras.utils.set_random_seed(1)
        look = Look("on_epoch_begin", "on_epoch_end", "on_train_batch_end")
        validations = Look("on_test_batch_begin")
        fit(make_model(), *callbacks, look, validations, epochs=3,
            validation_data=VALIDATION)  # fmt: skip
        return look.seen, validations.seen

    plain, plain_validations = run()
    seen, validations = run(RecalibrateBatchNorm(X, when="validation"))
    assert len(seen) == 3 * (STEPS + 2)
    for one, other in zip(plain, seen, strict=True):
        assert_same(one, other)
    for one, other in zip(plain_validations, validations, strict=True):
        assert not np.array_equal(one[0], other[0])


def test_at_epoch_end_the_averages_go_on_from_the_new_ones():
    look = Look("on_epoch_begin")
    model = make_model()
    fit(model, RecalibrateBatchNorm(X, when="epoch_end"), look, epochs=3)
    pooled = np.stack([X.mean(0, dtype=float), X.var(0, dtype=float)])
    np.testing.assert_allclose(look.seen[1][0], pooled, rtol=1e-4)
    np.testing.assert_allclose(look.seen[2][0], pooled, rtol=1e-4)


@pytest.mark.slow
def test_a_second_fit_recalibrates_again():
    model = make_model()
    callback = RecalibrateBatchNorm(X)
    fit(model, callback)
    first = callback.report
    fit(model, callback)
    assert callback.report is not first
    assert_recalibrated(model)
    other = make_model()
    fit(other, callback)
    assert_recalibrated(other)


def test_evaluating_outside_fit_changes_nothing():
    model = make_model()
    callback = RecalibrateBatchNorm(X, when="validation")
    fit(model)
    before = statistics(model)
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    assert_same(statistics(model), before)
    assert callback.report is None


# --- Validations that end early


class Fault(keras.callbacks.Callback):
    """Raises in the second validation, at a hook of one's choice."""

    def __init__(self, hook, error):
        super().__init__()
        self.validations = 0
        self.error = error
        setattr(self, hook, self.fail)

    def on_test_begin(self, logs=None):
        self.validations += 1

    def fail(self, *_, **__):
        if self.validations == 2:
            raise self.error


class Broken(keras.utils.PyDataset):
    """Validation data that end with an error in the second reading."""

    def __init__(self, error):
        super().__init__()
        self.error, self.reads = error, 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 6:
            raise self.error
        return VALIDATION[0][:4], VALIDATION[1][:4]


class Averages(keras.callbacks.Callback):
    """Notes the averages as they are when a validation begins."""

    def on_train_batch_end(self, batch, logs=None):
        self.averages = statistics(self.model)


@pytest.mark.parametrize("hook", ["on_test_batch_begin", "on_test_batch_end"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("theirs")], ids=str)
def test_what_ends_a_validation_leaves_the_averages(hook, error):
    model, averages = make_model(), Averages()
    callback = RecalibrateBatchNorm(X, when="validation")
    with pytest.raises(type(error)):
        fit(model, averages, callback, Fault(hook, error), validation_data=VALIDATION)
    assert_same(statistics(model), averages.averages)
    # Nor does the callback think that it is still in that `fit`.
    callback.report = None
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    assert callback.report is None
    assert_same(statistics(model), averages.averages)
    # And the next one goes on as if nothing had been.
    history = fit(model, callback, validation_data=VALIDATION).history
    assert callback.report.committed
    loss = model.evaluate(*VALIDATION, batch_size=BATCH, verbose=0)
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-3)
    assert "evaluate" not in vars(model)


def test_data_that_end_a_validation_leave_the_averages():
    model, averages = make_model(), Averages()
    data = Broken(KeyboardInterrupt())
    callback = RecalibrateBatchNorm(X, when="validation")
    with pytest.raises((KeyboardInterrupt, tf.errors.OpError)):
        fit(model, averages, callback, validation_data=data, epochs=9)
    assert data.reads > 6
    assert_same(statistics(model), averages.averages)


def test_ctrl_c_while_the_averages_are_put_back(monkeypatch):
    """As is likely with hundreds of layers."""
    model, averages = make_model(), Averages()
    own, calls = lending.restore, []

    def restore(saved):
        calls.append(saved)
        if len(calls) == 1:
            saved.state[0][0].assign(saved.state[0][1])
            raise KeyboardInterrupt
        own(saved)

    monkeypatch.setattr(lending, "restore", restore)
    callback = RecalibrateBatchNorm(X, when="validation")
    with pytest.raises(KeyboardInterrupt):
        fit(model, averages, callback, validation_data=VALIDATION)
    assert len(calls) == 2
    assert_same(statistics(model), averages.averages)


def test_an_evaluation_within_a_validation_does_not_end_the_loan():
    model = make_model()
    seen = []

    class Other(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            if batch == 0:
                self.model.evaluate(X[:4], Y[:4], verbose=0)
                seen.append(statistics(self.model))

        def on_train_batch_end(self, batch, logs=None):
            self.averages = statistics(self.model)

    other = Other()

    def run_validation():
        callback = RecalibrateBatchNorm(X, when="validation", tolerance=None)
        fit(model, callback, other, validation_data=VALIDATION, epochs=1)

    model.predict(X[:1], verbose=0)
    # Keras has one test function, and one iterator for each evaluation.
    run_validation()
    assert len(seen) == 1
    assert_recalibrated(model)
    assert_same(seen[0], statistics(model))


def test_a_loop_of_ones_own_gets_the_averages_back_later():
    model = make_model()
    fit(model)
    before = statistics(model)
    callback = RecalibrateBatchNorm(X, when="validation")

    def begin():
        callbacks = keras.callbacks.CallbackList([callback], model=model)
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(0)
        callbacks.on_test_begin()

    begin()
    assert_recalibrated(model)
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    assert_same(statistics(model), before)
    # But not if something else has been put there since.
    begin()
    norms(model)[0].moving_mean.assign([1.0, 2.0, 3.0])
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    assert statistics(model)[0][0].tolist() == [1, 2, 3]


def test_a_models_own_way_to_evaluate_is_kept():
    model = make_model()
    own = model.evaluate

    def mine(*args, **kwargs):
        return own(*args, **kwargs)

    vars(model)["evaluate"] = mine
    fit(model, RecalibrateBatchNorm(X, when="validation"), validation_data=VALIDATION)
    assert model.evaluate is mine


# --- Data and options


@pytest.mark.slow
def test_a_generator_serves_several_recalibrations():
    parts = (part for part in X.reshape(-1, BATCH, CHANNELS))
    model = make_model()
    callback = RecalibrateBatchNorm(parts, when="validation")
    fit(model, callback, validation_data=VALIDATION, epochs=3)
    assert callback.report.batches == STEPS
    assert_recalibrated(model)
    fit(model, callback)
    assert_recalibrated(model)


def test_steps_and_batch_size_choose_what_is_read():
    model = make_model()
    callback = RecalibrateBatchNorm(X, batch_size=8, steps=3)
    fit(model, callback)
    assert (callback.report.samples, callback.report.batches) == (24, 3)
    assert_recalibrated(model, X[:24])


def test_layers_chooses_what_is_recalibrated():
    model = make_model()
    look = Look("on_epoch_end")
    fit(model, look, RecalibrateBatchNorm(X, layers=norms(model)[1].name))
    np.testing.assert_array_equal(statistics(model)[0], look.seen[-1][0])
    assert not np.array_equal(statistics(model)[1], look.seen[-1][1])


def test_the_better_statistics_are_kept_where_validation_data_tell():
    model = make_model(momentum=0.5)
    look = Look("on_epoch_end")
    # Statistics of other data, for a model that is in order.
    callback = RecalibrateBatchNorm(X + 500, validation_data=VALIDATION)
    fit(model, look, callback)
    assert not callback.report.committed
    assert callback.report.loss_after > callback.report.loss_before
    assert_same(statistics(model), look.seen[-1])


def test_verbose_tells_of_each_recalibration(capsys):
    fit(make_model(), RecalibrateBatchNorm(X), epochs=1)
    assert capsys.readouterr().out == ""
    callback = RecalibrateBatchNorm(X, when="epoch_end", verbose=1)
    fit(make_model(), callback, epochs=2)
    out = capsys.readouterr().out
    # At each epoch's end, and with all data when training ends.
    assert out.count("Recalibrating BatchNormalization\n") == 3
    assert str(callback.report) in out


def test_undo_gives_the_averages_of_training_back():
    model = make_model()
    callback = RecalibrateBatchNorm(X)
    look = Look("on_epoch_end")
    fit(model, look, callback)
    callback.report.undo()
    assert_same(statistics(model), look.seen[-1])


# --- Together with other callbacks


def ema():
    return keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["train_end", "epoch_end"])
def test_statistics_fit_the_averaged_weights_of_the_optimizer(when):
    model = make_model(ema())
    raw = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: raw.append(model.get_weights())
    )
    fit(model, look, RecalibrateBatchNorm(X, when=when))
    kernel = model.layers[1].kernel.numpy()
    assert not np.allclose(kernel, raw[-1][4]), "averaged weights are in"
    assert_recalibrated(model)


def test_statistics_fit_the_weights_that_are_swapped_in_for_validation():
    if not hasattr(keras.callbacks, "SwapEMAWeights"):
        pytest.skip(f"Keras {keras.__version__} has no SwapEMAWeights")
    model = make_model(ema())
    fits = []

    class Check(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            with contextlib.suppress(AssertionError):
                assert_recalibrated(model)
                fits.append(model.layers[1].kernel.numpy())

    swap = keras.callbacks.SwapEMAWeights()
    callback = RecalibrateBatchNorm(X, when="validation")
    fit(model, swap, callback, Check(), validation_data=(X[:BATCH], Y[:BATCH]))
    assert len(fits) == 2, "recalibrated with the weights of each validation"
    assert_recalibrated(model)


@pytest.mark.parametrize("is_first", [False, True])
def test_best_weights_restored_before_us_are_recalibrated(is_first):
    early = keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=1, restore_best_weights=True
    )
    model = make_model()
    saved = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: saved.append(model.get_weights())
    )
    callback = RecalibrateBatchNorm(X)
    order = [callback, early] if is_first else [early, callback]
    fit(model, look, *order, epochs=9)
    assert early.stopped_epoch > 0
    best = saved[early.best_epoch]
    if is_first:
        # As the documentation warns: what is restored after us is restored whole.
        assert_same(model.get_weights(), best)
    else:
        np.testing.assert_array_equal(model.layers[1].kernel.numpy(), best[4])
        assert_recalibrated(model)


def test_checkpoints_hold_the_statistics_of_epoch_end(tmp_path):
    path = tmp_path / "model.keras"
    model = make_model()
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    # With all data then, so that nothing is left to do when training ends.
    callback = RecalibrateBatchNorm(X, when="epoch_end", tolerance=None)
    fit(model, callback, checkpoint)
    saved = keras.models.load_model(path)
    assert_recalibrated(saved)
    assert_same(saved.get_weights(), model.get_weights())


# --- Errors, before hours of training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "always"}, r"`when` must be .* Received: when='always'"),
        ({"refine": -1}, r"`refine` must be .* Received: refine=-1"),
        ({"tolerance": 0}, r"`tolerance` must be .* Received: tolerance=0"),
    ],
)
def test_bad_options_are_named_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecalibrateBatchNorm(X, **arguments)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (X[:0], {}, "empty"),
        (X[:, :2], {}, "does not fit the model"),
        (X, {"steps": 99}, r"Received: steps=99"),
        (X, {"steps": 0}, r"Received: steps=0"),
        (X, {"layers": "bn7"}, r"Received: 'bn7'"),
        (X, {"validation_data": X}, "targets"),
    ],
    ids=str,
)
def test_what_is_wrong_with_the_data_shows_before_training(x, arguments, message):
    model = make_model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        fit(model, RecalibrateBatchNorm(x, **arguments))
    assert_same(model.get_weights(), before)


def test_a_wrong_kind_of_data_shows_before_training():
    with pytest.raises(TypeError, match="`x` must be what `fit` takes"):
        fit(make_model(), RecalibrateBatchNorm("training.csv"))


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("when", ["train_end", "validation", "epoch_end"])
def test_a_model_without_such_layers_is_told_of_once(when, is_built, capsys):
    stack = [keras.Input((CHANNELS,))] if is_built else []
    model = keras.Sequential([*stack, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = RecalibrateBatchNorm(X, when=when, layers="bn")
    fit(model, callback, validation_data=VALIDATION)
    assert callback.report is None
    assert capsys.readouterr().out == (
        f"RecalibrateBatchNorm: model {model.name!r} has no BatchNormalization layer; "
        "there is nothing to recalibrate.\n"
    )


def test_a_model_that_its_first_step_builds_is_recalibrated():
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([norm, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, RecalibrateBatchNorm(X))
    pooled = np.stack([X.mean(0, dtype=float), X.var(0, dtype=float)])
    np.testing.assert_allclose(statistics(model)[0], pooled, rtol=1e-4)


def test_a_batch_of_nan_changes_nothing():
    x = X.copy()
    x[40] = np.nan
    model = make_model()
    look = Look("on_epoch_end")
    with pytest.raises(ValueError, match=r"not finite.*batch 1 "):
        fit(model, look, RecalibrateBatchNorm(x))
    assert_same(statistics(model), look.seen[-1])

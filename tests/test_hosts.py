"""The callbacks in loops, in searches, and beside callbacks that are not ours."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from extras import needed
from models import compiled, dense, normal

import bn_callbacks as bn
from bn_callbacks.layers import find, read

X = normal(128, 6)
Y = np.abs(X[:, :1])


def values(model):
    return np.concatenate([np.ravel(part) for part in read(find(model))])


def test_a_callback_list_in_a_loop_of_ones_own_drives_them():
    model = compiled(dense(2))
    monitor = bn.BatchNormMonitor(on_lag="ignore")
    history = keras.callbacks.History()
    callbacks = keras.callbacks.CallbackList(
        [monitor, bn.RecalibrateBatchNorm(X), history],
        model=model,
        params={"epochs": 2, "steps": 4, "verbose": 0},
    )
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for step in range(4):
            callbacks.on_train_batch_begin(step)
            part = slice(32 * step, 32 * step + 32)
            logs = model.train_on_batch(X[part], Y[part], return_dict=True)
            callbacks.on_train_batch_end(step, logs)
        callbacks.on_epoch_end(epoch, logs)
    callbacks.on_train_end()
    assert len(history.history["bn_lag"]) == 2
    assert min(history.history["bn_lag"]) > 0.2
    assert monitor.report is not None
    assert bn.audit(model, X).residual < 0.001


def test_logs_carry_floats_that_loggers_can_write():
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(dict(logs))
    )
    model = compiled(dense(2))
    monitor = bn.BatchNormMonitor(on_lag="ignore", probe=(X[:64], Y[:64]))
    model.fit(X, Y, epochs=2, callbacks=[monitor, note], verbose=0)
    for logs in seen:
        ours = {name: value for name, value in logs.items() if name.startswith("bn_")}
        assert {"bn_lag", "bn_loss_gap"} <= set(ours)
        assert {type(value) for value in ours.values()} == {float}


@pytest.mark.skipif(
    keras.__version__.startswith("3.0."),
    reason="Keras 3.0 restores no optimizer that has not been built",
)
def test_a_training_that_backup_and_restore_goes_on_with_is_watched(tmp_path):
    def fit(model, *callbacks):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        monitor = bn.BatchNormMonitor(on_lag="ignore")
        model.fit(
            X,
            Y,
            epochs=4,
            verbose=0,
            callbacks=[backup, monitor, bn.RecalibrateBatchNorm(X), *callbacks],
        )
        return monitor

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("the machine is gone")

    model = compiled(dense(2))
    with pytest.raises(RuntimeError, match="the machine is gone"):
        fit(model, Stop())
    resumed = compiled(keras.models.clone_model(model))
    monitor = fit(resumed)
    assert monitor.report is not None
    assert all(np.isfinite(layer.lag) for layer in monitor.report.layers)
    assert bn.audit(resumed, X).residual < 0.001
    assert np.isfinite(values(resumed)).all()


class Batches(keras.utils.PyDataset):
    """The data in four batches."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        part = slice(32 * index, 32 * index + 32)
        return X[part], Y[part]


KINDS = {
    "arrays": lambda: (X, Y),
    "tf.data": lambda: (tf.data.Dataset.from_tensor_slices((X, Y)).batch(32),),
    "PyDataset": lambda: (Batches(),),
}
OF_KERAS_TUNER = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:DeprecationWarning:keras_tuner",
    "ignore:Skipping variable loading for optimizer:UserWarning",
)
X_VAL = normal(64, 6, seed=1)
Y_VAL = np.abs(X_VAL[:, :1])


def with_momentum(momentum):
    keras.utils.set_random_seed(0)  # The same weights and batches in each trial.
    model = dense(2)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = momentum
    model.compile("adam", "mse")
    return model


def search(objective, data, callbacks, directory, trials=2):
    """Lets keras-tuner choose between a good momentum and a bad one."""
    kt = needed("keras_tuner", "hosts")
    tuner = kt.GridSearch(
        lambda hp: with_momentum(hp.Choice("momentum", [0.999, 0.5])),
        objective=objective and kt.Objective(objective, "min"),
        max_trials=trials,
        directory=directory,
        overwrite=True,
    )
    tuner.search(
        *data,
        epochs=3,
        validation_data=(X_VAL, Y_VAL),
        callbacks=callbacks,
        verbose=0,
    )
    return tuner


@pytest.mark.slow
@OF_KERAS_TUNER
@pytest.mark.parametrize("kind", KINDS)
def test_keras_tuner_minimises_bn_lag(kind, tmp_path):
    data = KINDS[kind]()
    probe = data if kind == "arrays" else data[0]
    monitor = bn.BatchNormMonitor(tmp_path / "logs", probe=probe, on_lag="ignore")
    tuner = search("bn_lag", data, [monitor], tmp_path)
    (best,) = tuner.get_best_hyperparameters()
    assert best.get("momentum") == 0.5
    trials = tuner.oracle.get_best_trials(2)
    scores = [trial.score for trial in trials]
    assert 0 < scores[0] < scores[1]
    assert trials[1].metrics.exists("bn_loss_gap")
    # The one that was given in is a pattern, and stays as it was.
    assert monitor.report is None
    assert len(list((tmp_path / "logs").iterdir())) == 2  # A run each.


@pytest.mark.slow
@OF_KERAS_TUNER
@pytest.mark.parametrize("kind", KINDS)
def test_keras_tuner_judges_weights_and_returns_what_it_judged(kind, tmp_path):
    data = KINDS[kind]()
    recalibrate = [
        bn.RecalibrateBatchNorm(data[0], when=when)
        for when in ("validation", "epoch_end")
    ]
    tuner = search("val_loss", data, recalibrate, tmp_path)
    scores = [trial.score for trial in tuner.oracle.get_best_trials(2)]
    # The momentum changes moving averages only, and these are not what is judged.
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    (model,) = tuner.get_best_models(1)
    loss = model.evaluate(X_VAL, Y_VAL, verbose=0)
    assert loss == pytest.approx(scores[0], rel=1e-3)
    assert bn.audit(model, X).residual < 0.01


@pytest.mark.slow
def test_a_grid_search_of_scikeras_compares_weights_and_keeps_what_it_found():
    wrappers = needed("scikeras.wrappers", "hosts")
    from sklearn.model_selection import GridSearchCV

    regressor = wrappers.KerasRegressor(
        with_momentum,
        epochs=3,
        random_state=0,
        verbose=0,
        callbacks=[bn.BatchNormMonitor(on_lag="ignore"), bn.RecalibrateBatchNorm(X)],
    )
    grid = GridSearchCV(
        regressor, {"model__momentum": [0.999, 0.5]}, cv=2, error_score="raise"
    ).fit(X, Y[:, 0])
    scores = grid.cv_results_["mean_test_score"]
    # The momentum changes moving averages only, and these are recalibrated.
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    best = grid.best_estimator_
    assert bn.audit(best.model_, X).residual < 0.001
    assert len(best.history_["bn_lag"]) == 3
    loaded = pickle.loads(pickle.dumps(best))
    np.testing.assert_array_equal(loaded.predict(X_VAL), best.predict(X_VAL))
    assert bn.audit(loaded.model_, X).residual < 0.001


@pytest.mark.slow
def test_callbacks_of_scikeras_are_copied_for_each_training():
    wrappers = needed("scikeras.wrappers", "hosts")
    from sklearn.model_selection import cross_validate

    monitor = bn.BatchNormMonitor(on_lag="ignore")
    regressor = wrappers.KerasRegressor(
        with_momentum,
        model__momentum=0.99,
        epochs=2,
        verbose=0,
        callbacks=[monitor],
    )
    found = cross_validate(
        regressor, X, Y[:, 0], cv=3, return_estimator=True, error_score="raise"
    )
    for each in found["estimator"]:
        assert len(each.history_["bn_lag"]) == 2
        assert min(each.history_["bn_lag"]) > 0
    assert monitor.report is None

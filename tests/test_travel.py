"""Callbacks and reports that are copied, pickled, and given to several threads."""

import copy
import json
import pickle
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import compiled, dense, normal

from bn_callbacks import (
    BatchNormMonitor,
    DebiasBatchNorm,
    RecalibrateBatchNorm,
    RecalibrationReport,
    recalibrate,
)

SLOW = pytest.mark.slow
X, Y = normal(64, 6), normal(64, 1)


def make_model():
    return compiled(dense(1))


def fit(*callbacks, model=None, **arguments):
    model = model or make_model()
    arguments = {"verbose": 0, "validation_data": (X, Y)} | arguments
    model.fit(X, Y, callbacks=list(callbacks), **arguments)
    return model


def generator():
    yield from np.split(X, 4)


CALLBACKS = {
    "monitor": lambda: BatchNormMonitor(probe=(X, Y), on_lag="ignore", threshold=0.5),
    "debias": DebiasBatchNorm,
    "recalibrate": lambda: RecalibrateBatchNorm(
        X, batch_size=16, validation_data=(X, Y), when="validation"
    ),
}


def arguments_of(callback):
    return {name: v for name, v in vars(callback).items() if not name.startswith("_")}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, pytest.param(copy.copy, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_copy_shares_the_data_and_nothing_of_a_fit(name, way):
    callback = CALLBACKS[name]()
    for _ in range(2):  # Before and after a `fit`.
        new = way(callback)
        assert type(new) is type(callback)
        assert arguments_of(new).keys() == arguments_of(callback).keys()
        for argument in callback._DATA:
            assert getattr(new, argument) is getattr(callback, argument)
        assert new.model is None
        fit(callback)
        fit(new)


@pytest.mark.parametrize(
    "name",
    [
        "monitor",
        *(pytest.param(n, marks=pytest.mark.slow) for n in list(CALLBACKS)[1:]),
    ],
)
def test_a_pickled_callback_works_as_the_first_one(name):
    callback = CALLBACKS[name]()
    for _ in range(2):
        new = pickle.loads(pickle.dumps(callback))
        assert new.model is None
        for argument in callback._DATA:
            one, other = getattr(new, argument), getattr(callback, argument)
            tf.nest.map_structure(np.testing.assert_array_equal, one, other)
        fit(callback)
        fit(new)
        if name == "recalibrate":
            assert new.report.samples == callback.report.samples == len(X)


@pytest.mark.slow
def test_a_copy_is_made_in_the_midst_of_a_fit_too():
    class Copy(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            self.made = [copy.deepcopy(each) for each in callbacks]

    callbacks = [make() for make in CALLBACKS.values()]
    copier = Copy()
    fit(*callbacks, copier)
    assert not any(each._is_fitting for each in copier.made)
    fit(*copier.made)


@pytest.mark.parametrize(
    "kind", [pytest.param("dataset", marks=pytest.mark.slow), "generator"]
)
def test_copies_share_datasets_and_generators(kind):
    x = tf.data.Dataset.from_tensor_slices(X).batch(16)
    callback = RecalibrateBatchNorm(x if kind == "dataset" else generator())
    copies = [copy.deepcopy(callback) for _ in range(2)]
    assert all(each.x is callback.x for each in copies)
    for each in (copies[0], callback):
        fit(each, validation_data=None)
        assert each.report.samples == len(X)
    with pytest.raises(TypeError, match=r"cannot be pickled.*Received: x of type"):
        pickle.dumps(callback)


def test_subclasses_keep_what_is_their_own():
    callback = Mine("logs")
    for new in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (new._label, new.seen, new.verbose) == ("logs", [], 0)
        assert new.seen is not callback.seen
        fit(new)
        assert len(new.seen) == 1


class Mine(BatchNormMonitor):
    """With arguments and a state of its own."""

    def __init__(self, label):
        super().__init__(on_lag="ignore")
        self._label = label
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.seen.append(logs["bn_lag"])


def test_a_report_travels_and_its_undo_does_not():
    model = make_model()
    before = model.get_weights()
    report = recalibrate(model, X, verbose=0)
    new = pickle.loads(pickle.dumps(report))
    assert new == report
    assert str(new) == str(report)
    with pytest.raises(RuntimeError, match="no undo in a report that has been"):
        new.undo()
    copy.deepcopy(report).undo()
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_report_is_plain_values():
    report = recalibrate(make_model(), X, verbose=0)
    content = report.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    fields = {name for name in vars(report) if name != "_undo"}
    assert set(content) == fields
    assert content["before"] == report.before.to_dict()
    assert isinstance(report, RecalibrationReport)


@pytest.mark.parametrize(
    "name",
    [
        "debias",
        *(pytest.param(n, marks=pytest.mark.slow) for n in list(CALLBACKS)[::2]),
    ],
)
def test_one_instance_in_two_threads_is_told(name):
    callback = CALLBACKS[name]()
    ready, done = threading.Event(), threading.Event()

    class Wait(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            ready.set()
            assert done.wait(60)

    failures = []

    def run():
        try:
            fit(callback, Wait())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    model = make_model()
    try:
        with pytest.raises(RuntimeError, match="runs in a `fit` of another thread"):
            fit(callback, model=model)
    finally:
        done.set()
        thread.join()
    assert failures == []
    fit(callback, model=model)


@pytest.mark.slow
def test_a_thread_whose_fit_failed_holds_nobody_up():
    callback = DebiasBatchNorm()
    ready, done = threading.Event(), threading.Event()

    class Fail(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            raise KeyboardInterrupt

    def run():
        with pytest.raises(KeyboardInterrupt):
            fit(callback, Fail())
        ready.set()
        done.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    fit(callback)
    done.set()
    thread.join()

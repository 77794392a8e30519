"""Static facts that the monitor's report carries from the first epoch on."""

import keras
import numpy as np
import pytest

from bn_callbacks import BatchNormMonitor, RecalibrateBatchNorm
from bn_callbacks.layers import calls_of, find
from bn_callbacks.watching.notes import find_notes

L = keras.layers
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X[:, :1]


def notes(model, total_steps=10_000, is_recalibrated=False, **compiled):
    model.compile(**{"optimizer": "sgd", "loss": "mse", **compiled})
    found = find(model)
    return " ".join(
        find_notes(
            model,
            found,
            total_steps=total_steps,
            is_recalibrated=is_recalibrated,
            calls=calls_of(model, found),
        )
    )


def dense(**arguments):
    return keras.Sequential(
        [keras.Input((4,)), L.BatchNormalization(**arguments), L.Dense(1)]
    )


def test_a_plain_model_in_a_long_fit_gives_nothing_away():
    assert notes(dense()) == ""
    assert notes(dense(), total_steps=None) == ""


def test_momentum_too_large_for_the_fit_comes_with_a_better_one():
    text = notes(dense(), total_steps=100)
    assert "momentum 0.99 is large for the 100 steps of this fit" in text
    assert "suggested: 0.9)" in text
    # What counts is 5 % of the start: 0.06 of it is left after 280 steps.
    assert "momentum 0.99 is large" in notes(dense(), total_steps=280)
    assert notes(dense(), total_steps=300) == ""


def test_momentum_one_is_seen():
    assert "momentum 1 never updates" in notes(dense(momentum=1.0))


def test_low_precision_is_seen():
    assert "less than float32" in notes(dense(dtype="bfloat16"))


def test_training_false_in_a_functional_graph_is_seen_also_inside_a_nested_model():
    inputs = keras.Input((4,))
    direct = keras.Model(inputs, L.BatchNormalization()(inputs, training=False))
    assert "overridden by `fit`" in notes(direct)
    base = dense()
    nested = keras.Model(inputs, L.Dense(1)(base(inputs, training=False)))
    assert "overridden by `fit`" in notes(nested)
    open_graph = keras.Model(inputs, L.BatchNormalization()(inputs))
    assert notes(open_graph) == ""


def test_trainable_changed_after_compile_is_seen():
    model = dense()
    model.compile("sgd", "mse")
    if not hasattr(model, "_compiled_trainable_state"):
        pytest.skip("this Keras does not remember what was compiled")
    model.layers[0].trainable = False
    found = find(model)
    text = find_notes(
        model,
        found,
        total_steps=None,
        is_recalibrated=False,
        calls=calls_of(model, found),
    )
    assert "changed after `compile`" in text[0]


def test_a_call_without_training_is_seen():
    class Deaf(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = L.BatchNormalization()

        def call(self, inputs):
            return self.bn(inputs)

    model = Deaf()
    model(X)
    assert "takes no `training`" in notes(model)


def test_shared_and_time_distributed_layers_are_seen():
    inputs = keras.Input((4,))
    shared = L.BatchNormalization()
    model = keras.Model(inputs, shared(shared(inputs)))
    assert "called 2 times a step" in notes(model)
    sequence = keras.Sequential(
        [keras.Input((5, 4)), L.TimeDistributed(L.BatchNormalization())]
    )
    assert "called 5 times a step" in notes(sequence)


def test_averaged_weights_are_seen_unless_they_are_taken_care_of():
    ema = {"optimizer": keras.optimizers.SGD(use_ema=True)}
    assert "averaged weights" in notes(dense(), **ema)
    assert notes(dense(), is_recalibrated=True, **ema) == ""


def test_the_report_carries_them_and_prints_them():
    model = dense()
    model.compile(keras.optimizers.SGD(use_ema=True), "mse")
    monitor = BatchNormMonitor(on_lag="ignore")
    model.fit(X, Y, verbose=0, callbacks=[monitor])
    assert any("averaged weights" in clue for clue in monitor.report.clues)
    assert "note: " in str(monitor.report)
    assert monitor.report.to_dict()["clues"] == list(monitor.report.clues)
    callbacks = [monitor, RecalibrateBatchNorm(X)]
    model.fit(X, Y, verbose=0, callbacks=callbacks)
    assert not any("averaged weights" in clue for clue in monitor.report.clues)

"""Rules of a character or two, whose change nothing else would notice."""

import keras
import numpy as np
import pytest

from bn_callbacks import recalibration
from bn_callbacks.layers import assign, find, read, state
from bn_callbacks.measuring.consistent import Solution, _layer_by_layer
from bn_callbacks.measuring.one_pass import Measurement
from bn_callbacks.recalibration import _is_worse
from bn_callbacks.statistics.moments import Moments, Statistics
from bn_callbacks.watching.watch import reading_interval


def test_an_epoch_has_five_windows_at_least():
    assert reading_interval([0.99], None, 100) == 20
    assert reading_interval([0.99], None, 10_000) == 50


def test_a_loss_that_stays_is_not_worse():
    assert not _is_worse(1.0, 1.0)
    assert _is_worse(1.0 + 1e-9, 1.0)


def two_layers():
    norm = keras.layers.BatchNormalization
    return find(keras.Sequential([keras.Input((2,)), norm(), norm()]))


def test_an_assignment_that_breaks_off_leaves_nothing_written(monkeypatch):
    layers = two_layers()
    before = read(layers)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers[1].layer.moving_variance, "assign", fail)
    with pytest.raises(KeyboardInterrupt):
        assign(layers, [Statistics(np.full(2, 5.0), np.full(2, 9.0))] * 2)
    for old, now in zip(before, read(layers), strict=True):
        np.testing.assert_array_equal(old, now)


def test_what_is_written_is_taken_back_where_another_worker_fails(monkeypatch):
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
    before = model.get_weights()

    def write_and_fail(*arguments):
        assign(*arguments)
        raise RuntimeError

    monkeypatch.setattr(state, "assign", write_and_fail)
    with pytest.raises(RuntimeError):
        recalibration.recalibrate(model, np.full((8, 2), 5.0), verbose=0)
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


def test_what_is_left_in_each_layer_adds_up_in_those_behind():
    layers = two_layers()
    old = [Statistics(np.zeros(2), np.ones(2))] * 2
    found = Moments(np.full(2, 10.0), np.full(2, 0.9e-3), np.full(2, 10.0))
    measured = Measurement([found, found], None, 1, 10, 1, np.zeros((0, 2)))
    last = Solution(old, measured, [0.9e-3, 0.5e-3])
    first, second = _layer_by_layer(layers, last, 1e-3)
    assert first.mean.tolist() == pytest.approx([0.9e-3] * 2)
    assert second.mean.tolist() == [0.0, 0.0]

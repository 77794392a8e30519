"""BN layers whose `call` is somebody's own."""

from typing import Any

import keras
import numpy as np
import pytest

from bn_callbacks import BatchNormMonitor, recalibrate
from bn_callbacks.layers import OwnCall, own_call

layers = keras.layers
DRAW = np.random.default_rng(0)
X = DRAW.normal(3, 2, size=(320, 6)).astype("float32")
Y = X[:, :1] * X[:, 1:2]


class Silent(layers.BatchNormalization):
    """From the formula, without the averages."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not training:
            return super().call(inputs, training=False, mask=mask)
        axes = list(range(len(inputs.shape) - 1))
        mean, variance = keras.ops.moments(inputs, axes=axes)
        z = (inputs - mean) / keras.ops.sqrt(variance + self.epsilon)
        return z * self.gamma + self.beta


class Told(layers.BatchNormalization):
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(1 * inputs, training=training, mask=mask)


class Off(layers.BatchNormalization):
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(inputs, training=False, mask=mask)


class Ranks(layers.BatchNormalization):
    """Normalises by something else than mean and variance."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not training:
            return super().call(inputs, training=False, mask=mask)
        return self.gamma * inputs / keras.ops.max(keras.ops.abs(inputs)) + self.beta


class Fussy(layers.BatchNormalization):
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        raise ValueError


KINDS = {
    layers.BatchNormalization: OwnCall.ASKS,
    Told: OwnCall.ASKS,
    Silent: OwnCall.ALIKE,
    Off: OwnCall.NEVER,
    Ranks: OwnCall.UNKNOWN,
    Fussy: OwnCall.UNKNOWN,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6,), (4, 4, 6)])
def test_what_a_call_does_is_tried_and_leaves_no_trace(kind: Any, shape: Any) -> None:
    layer = kind()
    layer.build((None, *shape))
    before, attributes = layer.get_weights(), set(vars(layer))
    assert own_call(layer) is KINDS[kind]
    assert set(vars(layer)) == attributes
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def trained(norm: Any, probe: Any) -> tuple[keras.Model, BatchNormMonitor]:
    stack = [keras.Input((6,)), norm(), layers.Dense(8, "relu"), layers.Dense(1)]
    model = keras.Sequential(stack)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    monitor = BatchNormMonitor(on_lag="ignore", probe=probe)
    model.fit(X, Y, epochs=6, verbose=0, callbacks=[monitor])
    return model, monitor


@pytest.mark.parametrize("probe", [None, (X, Y)])
def test_a_layer_that_forgets_is_not_in_inference_mode(probe: Any) -> None:
    model, monitor = trained(Silent, probe)
    report = monitor.report
    assert report is not None
    assert [layer.cause for layer in report.layers] == ["not_updating"]
    if probe is not None:
        # The loss that the model really has, and its own batches.
        expected = model.evaluate(X, Y, verbose=0)
        assert report.loss_inference == pytest.approx(expected, rel=1e-4)
        assert report.loss_gap is not None
        assert report.loss_gap > 1.5
        # And its advice helps.
        recalibrate(model, X, verbose=0)
        assert model.evaluate(X, Y, verbose=0) < expected / 1.5


def test_a_layer_that_never_uses_batches_is_in_inference_mode() -> None:
    _, monitor = trained(Off, (X, Y))
    report = monitor.report
    assert report is not None
    assert [layer.cause for layer in report.layers] == ["inference_mode"]
    assert report.loss_gap is None


def test_of_a_layer_that_does_something_else_nothing_is_said() -> None:
    _, monitor = trained(Ranks, (X, Y))
    report = monitor.report
    assert report is not None
    assert [layer.cause for layer in report.layers] == ["healthy"]
    assert report.loss_gap is None
    assert "the losses of a probe are not measured" in " ".join(report.clues)

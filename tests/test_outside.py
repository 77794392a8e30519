"""What others do to a model in training between its steps, told from the steps."""

from typing import Any

import keras
import numpy as np
import pytest

from bn_callbacks import BatchNormMonitor, RecalibrateBatchNorm
from bn_callbacks.report import BatchNormReport

layers = keras.layers
BN = layers.BatchNormalization

DRAW = np.random.default_rng(0)
X = DRAW.normal(1, 2, size=(640, 6)).astype("float32")
Y = X[:, :1] * X[:, 1:2]


def net() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(64, "relu"),
            layers.Dense(8, name="hidden"),
            BN(momentum=0.9),
            layers.ReLU(),
            layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    return model


class AtEpochsEnd(keras.callbacks.Callback):
    """Does something at each epoch's end, or at the last one's only."""

    def __init__(self, act: Any, last: int = 0) -> None:
        super().__init__()
        self._act, self._last = act, last

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch >= self._last:
            self._act(self.model)


def report(*acts: Any, is_first: bool = True, **options: Any) -> BatchNormReport:
    """What a monitor says at the end, beside others that are listed before or after."""
    monitor = BatchNormMonitor(on_lag="ignore", **options)
    others = [
        act if isinstance(act, keras.callbacks.Callback) else AtEpochsEnd(act)
        for act in acts
    ]
    callbacks = [*others, monitor] if is_first else [monitor, *others]
    net().fit(X, Y, batch_size=32, epochs=3, verbose=0, callbacks=callbacks)
    assert monitor.report is not None
    return monitor.report


def cause(*acts: Any, **options: Any) -> str:
    (layer,) = report(*acts, **options).layers
    return layer.cause


def dream(model: keras.Model) -> None:
    """Dropout that is to stay active, for one example, many times."""
    for _ in range(20):
        model(np.full((16, 6), 9.0, "float32") + X[:16], training=True)


def rescale(model: keras.Model) -> None:
    kernel = model.get_layer("hidden").kernel
    kernel.assign(2 * kernel)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("probe", [None, (X, Y)])
def test_calls_outside_of_training_steps_are_seen(is_first: bool, probe: Any) -> None:
    seen = report(dream, is_first=is_first, probe=probe)
    (layer,) = seen.layers
    assert layer.cause == "stale"
    assert "changed after the last training step" in layer.advice


@pytest.mark.parametrize("is_first", [True, False])
def test_one_matrix_replaced_is_seen(is_first: bool) -> None:
    assert cause(rescale, is_first=is_first) == "weights_replaced"


@pytest.mark.parametrize("is_first", [True, False])
def test_weights_and_statistics_put_in_together_belong_together(is_first: bool) -> None:
    other = net()
    other.fit(3 * X + 2, Y, batch_size=32, epochs=6, verbose=0)
    weights = other.get_weights()
    last = AtEpochsEnd(lambda model: model.set_weights(weights), last=2)
    # It has warmed up, and of the weights put in nothing is known.
    assert cause(last, is_first=is_first) in ("healthy", "unknown")


@pytest.mark.parametrize("is_first", [True, False])
def test_nothing_is_said_of_what_does_no_harm(is_first: bool) -> None:
    def look(model: keras.Model) -> None:
        model.evaluate(X, Y, verbose=0)
        model.predict(X, verbose=0)
        model(X, training=False)

    assert cause(look, is_first=is_first) == "healthy"
    recalibrate = RecalibrateBatchNorm(X, when="epoch_end")
    assert cause(rescale, recalibrate) in ("healthy", "unknown")

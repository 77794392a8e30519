"""What a probe costs: passes over its examples."""

from typing import Any

import keras
import numpy as np
import pytest
from models import compiled, dense, layers, normal

from bn_callbacks.measuring import probe as probes
from bn_callbacks.measuring.probe import Probe
from bn_callbacks.measuring.traced import Traced

ROWS = 96


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How often all examples have gone through the model."""
    examples = 0
    run = Traced.__call__

    def counting(self: Traced, group: Any, *others: Any) -> Any:
        nonlocal examples
        examples += sum(len(keras.tree.flatten(batch)[0]) for batch in group)
        return run(self, group, *others)

    monkeypatch.setattr(Traced, "__call__", counting)
    return lambda: examples / ROWS


def test_r_costs_what_b_and_i_do(passes: Any) -> None:
    model = compiled(dense(3))
    data = normal(ROWS, 6, mean=4.0), normal(ROWS, 1)
    reading = Probe(model, data).measure(32)
    assert reading.losses.recalibrated is not None
    # B, I, all examples as one batch, and R with what that has shown.
    assert passes() == 4


def test_r_of_layers_called_several_times_has_a_limit(
    passes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = keras.Sequential([keras.Input((6,))])
    for _ in range(12):
        encoder.add(layers.Dense(8))
        encoder.add(layers.BatchNormalization(momentum=0.9))
        encoder.add(layers.ReLU())
    photo, sketch = keras.Input((6,)), keras.Input((6,))
    both = layers.Concatenate()([encoder(photo), encoder(sketch)])
    model = compiled(keras.Model([photo, sketch], layers.Dense(1)(both)))
    x = normal(ROWS, 6)
    data = [x, 0.2 * x + 5], np.tanh(x[:, :1])
    model.fit(*data, epochs=20, verbose=0)
    probe = Probe(model, data)
    seen = passes()
    near = probe.measure(32).losses
    # As before, and for each pass the sample as it is, and corrected.
    assert 4 < passes() - seen <= 4 + 3 * probes.MOST_PASSES + 1
    # It is near enough to what it would be.
    monkeypatch.setattr(probes, "MOST_PASSES", 50)
    exact = probe.measure(32).losses
    assert near.family is exact.family
    assert near.mean("recalibrated") == pytest.approx(
        exact.mean("recalibrated"), rel=0.2
    )

"""Dropout before BatchNormalization: which statistics suit a model better?

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/dropout.py

The weights were trained with dropout, which adds variance to the input of the layers
behind it. At inference it is off. `recalibrate` measures without it, or with it if
`dropout=True`. Which is better depends on the model (Li et al., 2018, arXiv
1801.05134).
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import bn_callbacks as bn


def measure(name, x, y, outputs, loss, *, depth, rate):
    """Trains a model and prints its loss on held-out data with three statistics."""
    keras.utils.set_random_seed(0)
    split = 3 * len(x) // 4
    model = keras.Sequential([keras.Input(x.shape[1:])])
    for _ in range(depth):
        model.add(keras.layers.Dense(64))
        model.add(keras.layers.Dropout(rate))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(outputs))
    model.compile(keras.optimizers.Adam(0.003), loss)
    model.fit(x[:split], y[:split], epochs=10, verbose=0)

    def evaluate():
        return model.evaluate(x[split:], y[split:], verbose=0)

    losses = [evaluate()]
    for dropout in (False, True):
        with bn.recalibrated(model, x[:split], dropout=dropout, verbose=0):
            losses.append(evaluate())
    print(f"{name:16}" + "".join(f"{each:15.3f}" for each in losses))


rng = np.random.default_rng(0)
table = rng.normal(size=(4096, 8)).astype("float32")
hidden = np.tanh(table @ rng.normal(size=(8, 12)) / 2)
value = (hidden @ rng.normal(size=(12, 1))).astype("float32")
pixels, digit = load_digits(return_X_y=True)
pixels = (pixels / 16).astype("float32")

print(" " * 21 + "as trained  dropout=False   dropout=True")
measure("regression", table, value, 1, "mse", depth=2, rate=0.5)
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
measure("digits", pixels, digit, 10, cross_entropy, depth=3, rate=0.7)

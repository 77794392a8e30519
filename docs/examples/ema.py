"""Averaged weights: the statistics belong to other weights than those in the model.

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/ema.py

An optimizer with `use_ema=True` keeps a moving average of the weights and puts it into
the model when `fit` ends. The moving statistics of BatchNormalization were collected
with the weights of the last steps, and stay. The same training is run with and without
`RecalibrateBatchNorm`, whose default moment is right: after the exchange.
"""

import warnings

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bn_callbacks as bn

x, y = load_digits(return_X_y=True)
x_train, x_val, y_train, y_val = train_test_split(
    (x / 16).astype("float32"), y, test_size=400, random_state=0
)


def train(*callbacks, use_ema=True):
    """Trains from the same start; returns the model and the monitor's findings."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,))])
    for _ in range(3):
        model.add(keras.layers.Dense(64))
        model.add(keras.layers.BatchNormalization(momentum=0.9))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(10))
    average = {"use_ema": True, "ema_momentum": 0.995} if use_ema else {}
    model.compile(
        keras.optimizers.Adam(0.03, **average),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    monitor = bn.BatchNormMonitor(probe=(x_train[:512], y_train[:512]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bn.BatchNormWarning)
        model.fit(
            x_train, y_train, epochs=8, callbacks=[monitor, *callbacks], verbose=0
        )
    return model, [str(warning.message) for warning in caught]


def show(name, model, findings):
    loss, accuracy = model.evaluate(x_val, y_val, verbose=0)
    print(f"{name}: validation loss {loss:.4f}, accuracy {accuracy:.1%}")
    for finding in findings:
        print(f"  warning: {finding}")


show("weights of the last step", *train(use_ema=False))
show("averaged weights", *train())
show("averaged weights, recalibrated", *train(bn.RecalibrateBatchNorm(x_train)))

"""Transfer learning: `training=False` in a functional graph, which `fit` overrides.

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/transfer.py

A backbone learns the digits 0 to 4. A new head on top of it is to learn 5 to 9 from 40
pictures that come from another scanner: brighter, and of less contrast. The layers of
the backbone are called with `training=False`, which in Keras 2 kept the statistics of
BatchNormalization as they were, even when the backbone is unfrozen for fine-tuning.
Keras 3 overrides the argument in `fit` (github.com/keras-team/keras/issues/20285), and
says nothing. The cure is `trainable = False` for the BatchNormalization layers, and
`compile`.
"""

import warnings

import keras
import numpy as np
from sklearn.datasets import load_digits

import bn_callbacks as bn

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
source = y < 5
x_source, y_source = x[source], y[source]
x_target, y_target = 0.5 + 0.4 * x[~source], y[~source] - 5
x_train, y_train = x_target[:40], y_target[:40]
x_val, y_val = x_target[40:], y_target[40:]


def make_backbone():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same"),
            keras.layers.BatchNormalization(momentum=0.9, name="bn_1"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(32, 3, padding="same"),
            keras.layers.BatchNormalization(momentum=0.9, name="bn_2"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
        ],
        name="backbone",
    )


def batch_norms(model):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def compiled(model, rate):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def fine_tune(name, weights, *, is_pinned):
    """Trains a head, then everything; says what became of the statistics."""
    keras.utils.set_random_seed(1)
    backbone = make_backbone()
    backbone.set_weights(weights)
    inputs = keras.Input((8, 8, 1))
    features = backbone(inputs, training=False)
    model = keras.Model(inputs, keras.layers.Dense(5)(features))

    backbone.trainable = False
    compiled(model, 0.03)
    model.fit(x_train, y_train, epochs=40, batch_size=8, verbose=0)

    backbone.trainable = True
    if is_pinned:
        for layer in batch_norms(backbone):
            layer.trainable = False
    compiled(model, 0.0005)
    before = [layer.moving_mean.numpy() for layer in batch_norms(backbone)]
    monitor = bn.BatchNormMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bn.BatchNormWarning)
        model.fit(
            x_train, y_train, epochs=6, batch_size=8, callbacks=[monitor], verbose=0
        )
    after = [layer.moving_mean.numpy() for layer in batch_norms(backbone)]
    same = all(map(np.array_equal, before, after))
    print(f"{name}\n  statistics {'as before' if same else 'changed'}")
    for layer in monitor.report.layers:
        print(f"  {layer.path}: {layer.cause}")
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"  warning: {message}")
    loss, accuracy = model.evaluate(x_val, y_val, verbose=0)
    print(f"  validation loss {loss:.3f}, accuracy {accuracy:.1%}\n")


keras.utils.set_random_seed(0)
backbone = make_backbone()
head = keras.layers.Dense(5)
teacher = compiled(keras.Sequential([backbone, head]), 0.01)
teacher.fit(x_source, y_source, epochs=8, verbose=0)
learned = backbone.get_weights()
fine_tune("training=False in the graph alone", learned, is_pinned=False)
fine_tune("trainable=False, then compile", learned, is_pinned=True)

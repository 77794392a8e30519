"""Models that the tests of commands save."""

import keras


def make_model(**bn):
    """Dense, BN, ReLU; trained for so few steps that the start is still there."""
    model = keras.Sequential(
        [
            keras.Input((4,), name="feat"),
            keras.layers.Dense(6),
            keras.layers.BatchNormalization(name="bn", **bn),
            keras.layers.ReLU(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05), "mse")
    # Keras warns where it loads an optimizer that was saved without its state.
    model.optimizer.build(model.trainable_variables)
    return model

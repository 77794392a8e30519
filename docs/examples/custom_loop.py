"""A training loop without `fit`, with the library's callbacks and functions in it.

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/custom_loop.py

`BatchNormWatch` does what `BatchNormMonitor` does in `fit`. It has to be told when an
epoch begins and ends, and when a step begins. `audit` and `recalibrate` need a model,
and no loop at all.
"""

import keras
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bn_callbacks as bn

EPOCHS, BATCH = 3, 64

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x_train, x_val, y_train, y_val = train_test_split(
    (x / 16).astype("float32"), y, test_size=400, random_state=0
)
data = tf.data.Dataset.from_tensor_slices((x_train, y_train))
data = data.shuffle(len(x_train), seed=0).batch(BATCH, drop_remainder=True)
steps = int(data.cardinality())

model = keras.Sequential([keras.Input((64,))])
for _ in range(2):
    model.add(keras.layers.Dense(64))
    model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.ReLU())
model.add(keras.layers.Dense(10))
# For the watch, which counts the optimizer's steps, and for a loss in `audit`.
model.compile(
    keras.optimizers.Adam(0.01),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)


@tf.function
def train_step(x, y):
    with tf.GradientTape() as tape:
        # Without `training=True` BatchNormalization would be off.
        loss = model.compute_loss(x, y, model(x, training=True))
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return loss


def validation_loss():
    return float(model.compute_loss(x_val, y_val, model(x_val, training=False)))


watch = bn.BatchNormWatch(model, steps=steps, epochs=EPOCHS, probe=data)
for epoch in range(EPOCHS):
    watch.begin_epoch(epoch)
    for batch in data:
        watch.begin_step()
        loss = train_step(*batch)
    watch.end_epoch()
    logs = {"loss": float(loss), "val_loss": validation_loss()}
    # The validation loss as it would be with the right statistics.
    with bn.recalibrated(model, x_train, verbose=0):
        logs["val_loss_recalibrated"] = validation_loss()
    print(" ".join(f"{name} {value:.4f}" for name, value in logs.items()))
    for message in watch.messages():
        print(f"\n{message}\n")

print("\nBefore the export:")
print(bn.recalibrate(model, x_train, verbose=0))
report = bn.audit(model, (x_train, y_train))
print(f"validation loss {validation_loss():.4f}, loss gap {report.loss_gap:.3f}")

"""Quick start: a network that learns digits well and reads them badly.

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/digits.py

The steps are those of any project: watch `fit`, read the finding, recalibrate, check,
save. TensorBoard's files go to logs/digits.
"""

import tempfile
import warnings
from pathlib import Path

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bn_callbacks as bn

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x_train, x_val, y_train, y_val = train_test_split(
    (x / 16).astype("float32").reshape(-1, 8, 8, 1), y, test_size=400, random_state=0
)

model = keras.Sequential([keras.Input((8, 8, 1))])
for filters in (16, 32, 32):
    model.add(keras.layers.Conv2D(filters, 3, padding="same"))
    model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.ReLU())
model.add(keras.layers.GlobalAveragePooling2D())
model.add(keras.layers.Dense(10, activation="softmax"))
model.compile(
    keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"]
)


def show(name):
    loss, accuracy = model.evaluate(x_val, y_val, verbose=0)
    print(f"{name:16} validation loss {loss:.4f}, accuracy {accuracy:.1%}")


# 1. Watch. The probe is a sample of the training data.
monitor = bn.BatchNormMonitor("logs/digits", probe=(x_train[:512], y_train[:512]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", bn.BatchNormWarning)
    history = model.fit(x_train, y_train, epochs=2, callbacks=[monitor], verbose=0)

# 2. Read: the findings that `fit` warned about, then the whole report.
print(f"training loss {history.history['loss'][-1]:.4f}")
for warning in caught:
    print(f"\n{warning.message}\n")
print(monitor.report, "\n")
show("as trained")

# 3. Recalibrate, 4. check.
report = bn.recalibrate(model, x_train, verbose=0)
show("recalibrated")
print(report)
print(f"loss gap: {bn.audit(model, (x_train, y_train)).loss_gap:.3f}")

# 5. Save. What is loaded predicts as well as what was saved.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "digits.keras")
    model.save(path)
    model = keras.models.load_model(path)
    show("loaded again")

"""Federated learning: averaging the clients' variances forgets how clients differ.

    python -m pip install ".[demo]"      # from a clone
    python docs/examples/federated.py

Four clients have pictures that never leave them, each of other brightness. A server
averages their models after each round, moving statistics included, as federated code
usually does. Then each client measures its own pictures with the server's weights, and
sends counts, means and squared deviations, in files. Merged, these are the moments of
all pictures together; after two rounds of that the server has the statistics that
recalibration with all pictures in one place would give.
"""

import tempfile
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import bn_callbacks as bn

ROUNDS = 12
BRIGHTNESS = (-1.5, -0.5, 0.5, 1.5)

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(y))
x, y = (x[order] / 16).astype("float32"), y[order]
clients = [
    (x[i:1200:4] + np.float32(add), y[i:1200:4]) for i, add in enumerate(BRIGHTNESS)
]
x_test = np.concatenate([x[1200:] + np.float32(add) for add in BRIGHTNESS])
y_test = np.tile(y[1200:], len(BRIGHTNESS))


def make_model():
    model = keras.Sequential([keras.Input((64,))])
    for number in range(2):
        model.add(keras.layers.Dense(64))
        # By their names layers find what was measured of them elsewhere.
        name = f"bn_{number}"
        model.add(keras.layers.BatchNormalization(momentum=0.9, name=name))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


keras.utils.set_random_seed(0)
server, client = make_model(), make_model()
for _ in range(ROUNDS):
    returned = []
    for data in clients:
        client.set_weights(server.get_weights())
        client.fit(*data, batch_size=32, verbose=0)
        returned.append(client.get_weights())
    server.set_weights([np.mean(each, axis=0) for each in zip(*returned, strict=True)])


def show(name):
    loss, accuracy = server.evaluate(x_test, y_test, batch_size=512, verbose=0)
    variance = float(np.mean(server.layers[1].moving_variance))
    print(
        f"{name}: variance of the first layer {variance:.2f}, "
        f"loss {loss:.3f}, accuracy {accuracy:.1%}"
    )


def one_round(folder, merged):
    """Each client writes a file; the server merges them."""
    for number, (pictures, _) in enumerate(clients):
        client.set_weights(server.get_weights())
        part = bn.measure(client, pictures, statistics=merged)
        part.save(folder / f"{number}.npz")
    parts = [bn.PopulationMoments.load(path) for path in sorted(folder.glob("*.npz"))]
    result = parts[0]
    for part in parts[1:]:
        result = result.merge(part)
    return result


show("averaged statistics")
with tempfile.TemporaryDirectory() as name:
    merged = None
    for _ in range(2):
        merged = one_round(Path(name), merged)
report = bn.apply_statistics(server, merged)
show("merged moments     ")
print(report.notes[0])
pooled = np.concatenate([pictures for pictures, _ in clients])
report.undo()
bn.recalibrate(server, pooled, verbose=0)
show("all in one place   ")

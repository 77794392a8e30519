"""What the monitor recovers in random models against recorded batch statistics."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, note
from models import batch_norms, rows
from random_models import Net, build, data, examples, nets
from reference import replaced

from bn_callbacks import BatchNormMonitor

EPOCHS = 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:Gradients do not exist for variables"),
    pytest.mark.filterwarnings("ignore:The model does not have any trainable weights"),
]
"""Not each of these models has something to learn."""


def train(net: Net, monitor: BatchNormMonitor) -> dict[int, Any]:
    """Trains step by step and records what each BN layer's batches held."""
    model, x = build(net), data(net)
    model.compile(keras.optimizers.SGD(1e-4), "mse", run_eagerly=True)
    y = np.zeros((len(x), *model.output_shape[1:]), "float32")
    seen: dict[int, list[Any]] = {id(bn): [] for bn in batch_norms(model)}

    def recorder(bn: Any) -> Any:
        own = bn.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            if training and not tf.is_symbolic_tensor(tf.convert_to_tensor(inputs)):
                masked = None if mask is None else np.asarray(mask)
                seen[id(bn)].append(rows(bn, np.asarray(inputs), masked))
            extra = {} if mask is None else {"mask": mask}
            return own(inputs, training=training, **extra)

        return call

    with replaced(model, recorder):
        model.fit(
            x,
            y,
            batch_size=net.batch_size,
            epochs=EPOCHS,
            shuffle=False,
            verbose=0,
            callbacks=[monitor],
        )
    return seen


def check_monitor(net: Net) -> None:
    if net.is_masked and net.policy is not None:
        # Keras divides by the count plus 1e-7, which float16 does not hold.
        net = Net(**{**vars(net), "policy": None})
    monitor = BatchNormMonitor(on_lag="ignore")
    seen = train(net, monitor)
    if monitor.report is None or not monitor.report.layers:
        pytest.fail("the monitor has found no layer")
    windows = monitor._watch._windows
    assert windows is not None
    for index, bn in enumerate(windows.layers):
        layer = bn.layer
        batches = seen[id(layer)]
        if not layer.trainable or bn.momentum == 1 or bn.renorm:
            continue
        calls = bn.calls
        assert len(batches) == calls * EPOCHS * -(-net.samples // net.batch_size)
        # The oldest windows are forgotten.
        begin = len(batches) - calls * sum(window.steps for window in windows._kept)
        for window in windows._kept:
            assert window.is_valid[index]
            updates = window.steps * calls
            part = batches[begin : begin + updates]
            begin += updates
            check_window(windows, window, index, part)
        assert begin == len(batches)


def check_window(windows: Any, window: Any, index: int, batches: list[Any]) -> None:
    """The window's statistics are the weighted mean of those that were recorded."""
    bn = windows.layers[index]
    if any(len(batch) == 0 for batch in batches):
        return  # Keras lets a masked batch move the averages towards 0.
    momentum, count = bn.momentum, len(batches)
    weights = (1 - momentum) * momentum ** np.arange(count - 1, -1, -1)
    weights /= weights.sum()
    means = np.array([batch.mean(0) for batch in batches])
    variances = np.array([batch.var(0) for batch in batches])
    old, new = (
        windows.readings.averages(flat, index)[0] for flat in (window.old, window.new)
    )
    got = windows._batch(window.old, window.new, window.steps, index)
    # Each update rounds an average that is the larger, the less of it is the window.
    eps = np.finfo(np.float32).eps
    share = 1 - momentum**count
    for name, value, batch, before, after in (
        ("mean", got.mean, means, old[0], new[0]),
        ("variance", got.variance, variances, old[1], new[1]),
    ):
        size = np.max([np.abs(before), np.abs(after), np.abs(batch).max(0)], axis=0)
        scale = size + (np.square(means).max(0) * eps if name == "variance" else 0)
        bound = 4 * eps * scale * (4 + count / share * (1 + momentum))
        if name == "variance":
            # Batch variances of float32 inputs are as exact as their deviations.
            bound += 8 * eps * np.sqrt(np.square(means).max(0) * variances.max(0))
        else:
            # Its values cancel to a mean that may be next to 0.
            bound += 8 * eps * np.sqrt(variances.max(0))
        error = np.abs(value - weights @ batch)
        note(f"{bn.path} {name}: {np.max(error):.2g}, allowed {np.min(bound):.2g}")
        assert np.all(error <= bound)


@pytest.mark.slow
@examples(3)
@given(nets(max_samples=12))
def test_a_few_random_models(net: Net) -> None:
    check_monitor(net)


@pytest.mark.slow
@examples(300)
@given(nets(max_samples=12))
def test_300_random_models(net: Net) -> None:
    check_monitor(net)

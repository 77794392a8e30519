"""After every cure the verdict is healthy, and `bn-callbacks inspect` ends with 0."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from models import dense

from bn_callbacks import DebiasBatchNorm, audit, recalibrate
from bn_callbacks.cli import main
from bn_callbacks.layers import find

ROWS = 640


def data() -> tuple[Any, Any]:
    """Rows that nobody has centred, and something to learn from them."""
    x = np.random.default_rng(0).normal(3, 2, (ROWS, 6)).astype("float32")
    return x, np.tanh(x[:, :1] - 3)


def trained(
    depth: int,
    epochs: int = 1,
    momentum: float = 0.99,
    rate: float = 0.01,
    **fit: Any,
) -> tuple[Any, Any, Any]:
    model = dense(depth)
    for bn in find(model):
        bn.layer.momentum = momentum
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    x, y = data()
    model.fit(x, y, epochs=epochs, verbose=0, **fit)
    return model, x, y


def inspected(model: keras.Model, x: Any, y: Any, directory: Path) -> list[int]:
    """The status of `inspect` with targets, without them, and without any data."""
    path, both, inputs = (directory / n for n in ("m.keras", "both.npz", "x.npz"))
    model.save(path)
    np.savez(both, x=x, y=y)
    np.savez(inputs, x=x)
    commands = [], ["--data", str(both)], ["--data", str(inputs)]
    return [main(["inspect", str(path), *command]) for command in commands]


def assert_healthy(model: keras.Model, x: Any, y: Any) -> None:
    for given in ((x, y), x):
        report = audit(model, given)
        assert not report.lagging, report


def test_recalibrated_then_saved_and_loaded(tmp_path: Path) -> None:
    model, x, y = trained(3, epochs=3)
    assert audit(model, x).lagging
    assert inspected(model, x, y, tmp_path)[-1] == 1
    recalibrate(model, x, verbose=0)
    assert_healthy(model, x, y)
    assert audit(model, x).residual <= 1e-3
    assert inspected(model, x, y, tmp_path) == [0, 0, 0]
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_healthy(loaded, x, y)
    assert audit(loaded, x).residual <= 1e-3


@pytest.mark.slow
def test_debiased(tmp_path: Path) -> None:
    # Slowly: what is left of the start is its matter, and not how far weights move.
    assert audit(trained(2, rate=0.001)[0], data()[0]).lagging
    model, x, y = trained(2, rate=0.001, callbacks=[DebiasBatchNorm()])
    assert_healthy(model, x, y)
    assert inspected(model, x, y, tmp_path) == [0, 0, 0]


@pytest.mark.slow
def test_trained_for_long_and_compiled_anew(tmp_path: Path) -> None:
    model, x, y = trained(2, epochs=8, momentum=0.9)
    # A new optimizer has made a step or two, and the averages have had hundreds.
    model.compile(keras.optimizers.Adam(1e-4), "mse", jit_compile=False)
    model.fit(x[:64], y[:64], verbose=0)
    assert_healthy(model, x, y)
    assert inspected(model, x, y, tmp_path) == [0, 0, 0]


def test_what_is_really_warming_up_is_called_so_in_mixed_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, x, y = trained(2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert inspected(model, x, y, tmp_path) == [0, 1, 1]
    assert capsys.readouterr().out.count("warming_up") >= 2
    assert {layer.cause for layer in audit(model, x).lagging} == {"warming_up"}
    recalibrate(model, x, verbose=0)
    assert_healthy(model, x, y)
    assert inspected(model, x, y, tmp_path) == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 20])
def test_deep_networks_recalibrated_and_in_one_pass(depth: int, tmp_path: Path) -> None:
    model, x, y = trained(depth)
    stored = model.get_weights()
    recalibrate(model, x, verbose=0)
    report = audit(model, x)
    assert report.residual <= 1e-3
    assert_healthy(model, x, y)
    assert inspected(model, x, y, tmp_path) == [0, 0, 0]
    model.set_weights(stored)
    # The usual single pass: right for batches, and not for inference.
    recalibrate(model, x, batch_size=16, refine=0, verbose=0)
    report = audit(model, x, batch_size=16)
    if depth == 20:
        assert report.residual >= 0.05 > report.max_lag

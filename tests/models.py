"""Tiny models, and what tests compare them by: states, inputs seen, references."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

layers = keras.layers
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
Array = NDArray[Any]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, mean: float = 3.0, std: float = 2.0, seed: int = 0) -> Array:
    """Correlated channels that are not normalised: something to recalibrate for."""
    values = rng(seed).normal(size=shape)
    return (mean + std * (values + 0.3 * values[..., ::-1])).astype("float32")


def grouped(groups: int, size: int, features: int, seed: int = 0) -> Array:
    """Rows as of `groups` speakers, one after the other: no batch is like the next."""
    draw = rng(seed)
    centres = draw.normal(size=(groups, 1, features)) * 3
    scales = draw.uniform(0.3, 3, size=(groups, 1, features))
    rows = centres + scales * draw.normal(size=(groups, size, features))
    return rows.reshape(-1, features).astype("float32")


def single(features: int = 4, **arguments: Any) -> keras.Model:
    """One BN layer and nothing else."""
    return keras.Sequential(
        [keras.Input((features,)), layers.BatchNormalization(**arguments)]
    )


def dense(depth: int = 3, features: int = 6, width: int = 8) -> keras.Model:
    """`depth` blocks of Dense, BN and ReLU, and one output."""
    stack: list[Any] = [keras.Input((features,))]
    for _ in range(depth):
        stack += [layers.Dense(width), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([*stack, layers.Dense(1)])


def residual_net(depth: int, features: int = 6, width: int = 8) -> keras.Model:
    """`depth` BN layers, each in a block that its input bypasses."""
    inputs = keras.Input((features,))
    x = layers.Dense(width)(inputs)
    for _ in range(depth):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Dense(width)(x)))
        x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(1)(x))


def conv() -> keras.Model:
    """Three convolutions with BN: by default, without scale, without centre."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(5, 3, padding="valid"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(4, 2, strides=2, padding="valid"),
            layers.BatchNormalization(scale=False, epsilon=1e-2),
            layers.Activation("tanh"),
            layers.Flatten(),
            layers.Dense(3),
            layers.BatchNormalization(center=False),
        ]
    )


def scatter(model: keras.Model, seed: int = 1) -> keras.Model:
    """Gives BN layers some scale, offset and statistics, as after training."""
    draw = rng(seed)
    for bn in batch_norms(model):
        size = bn.moving_mean.shape
        for name, low, high in (
            ("gamma", 0.5, 1.5),
            ("beta", -0.5, 0.5),
            ("moving_mean", -1.0, 1.0),
            ("moving_variance", 0.5, 2.0),
        ):
            variable = getattr(bn, name, None)
            if variable is not None:
                variable.assign(draw.uniform(low, high, size))
    return model


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Layers that are made inside have this policy."""
    config = keras.config if KERAS >= (3, 4) else keras.mixed_precision
    config.set_dtype_policy(name)
    try:
        yield
    finally:
        config.set_dtype_policy("float32")


def compiled(model: keras.Model, **arguments: Any) -> keras.Model:
    model.compile("adam", "mse", metrics=["mae"], **arguments)
    return model


def batch_norms(model: keras.Model) -> list[Any]:
    """BN layers in the order of their variables; needs no private Keras call."""
    found: list[Any] = []

    def visit(layer: Any) -> None:
        if isinstance(layer, layers.BatchNormalization):
            # Keras 3.0 keeps an unused twin of a bidirectional layer.
            if layer not in found and layer.built:
                found.append(layer)
            return
        for child in vars(layer).get("_layers", []):
            visit(child)

    visit(model)
    order = [id(variable) for variable in model.variables]
    return sorted(found, key=lambda bn: order.index(id(bn.moving_mean)))


def stored(model: keras.Model) -> list[tuple[Array, Array]]:
    return [
        (np.array(bn.moving_mean.value), np.array(bn.moving_variance.value))
        for bn in batch_norms(model)
    ]


def state(model: keras.Model) -> dict[str, bytes]:
    """Every variable of the model, its optimizer, metrics and seeds, bit by bit."""
    variables = {f"model {i}": v for i, v in enumerate(model.variables)}
    for index, variable in enumerate(model.metrics_variables):
        variables[f"metric {index}"] = variable
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        for index, variable in enumerate(optimizer.variables):
            variables[f"optimizer {index}"] = variable
    for index, layer in enumerate(model._flatten_layers()):
        for name in ("seed_generator", "generator"):
            if hasattr(layer, name):
                variables[f"seed {index}"] = getattr(layer, name).state
    return {
        f"{key} {variable.path}": variable.value.numpy().tobytes()
        for key, variable in variables.items()
    }


def attributes(model: keras.Model) -> dict[int, dict[str, Any]]:
    """What the layers' dictionaries hold: names, and the objects behind them."""
    # What Keras itself notes in any call, and garbage it clears.
    noted = {"_called", "_losses", "_loss_ids", "_call_context_args"}
    return {
        index: {
            name: value if isinstance(value, (bool, int, float, str)) else id(value)
            for name, value in vars(layer).items()
            if name not in noted
        }
        for index, layer in enumerate(model._flatten_layers())
    }


@contextlib.contextmanager
def unchanged(model: keras.Model, except_for: str = "nothing") -> Iterator[None]:
    """Asserts that the block leaves the model bit-identical.

    Variables whose path contains `except_for` may change, and one of them must.
    """
    before, named = state(model), attributes(model)
    yield
    after = state(model)
    assert list(after) == list(before)
    changed = [key for key in before if before[key] != after[key]]
    if except_for == "nothing":
        assert changed == []
    else:
        assert changed
        assert [key for key in changed if except_for not in key] == []
    assert attributes(model) == named


@contextlib.contextmanager
def watched(
    model: keras.Model, see: Callable[[Any, Array, Array | None], None]
) -> Iterator[None]:
    """Shows `see` the layer, the input and the mask of each call of a BN layer."""

    def watching(bn: Any) -> Any:
        own = bn.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            see(bn, np.asarray(inputs), None if mask is None else np.asarray(mask))
            if mask is None:
                return own(inputs, training=training)
            return own(inputs, training=training, mask=mask)

        return call

    found = batch_norms(model)
    for bn in found:
        vars(bn)["call"] = watching(bn)
    try:
        yield
    finally:
        for bn in found:
            del vars(bn)["call"]


def rows(bn: Any, inputs: Array, mask: Array | None = None) -> Array:
    """The elements that count, as rows of channels, in float64."""
    values = np.moveaxis(inputs.astype(np.float64), bn.axis, -1)
    if mask is not None:
        return values[mask.astype(bool)]
    return values.reshape(-1, values.shape[-1])


def seen_in_inference(model: keras.Model, batches: Sequence[Any]) -> list[Array]:
    """Each BN layer's inputs over all batches in inference mode, as rows."""
    seen: dict[int, list[Array]] = {id(bn): [] for bn in batch_norms(model)}

    def see(bn: Any, inputs: Array, mask: Array | None) -> None:
        seen[id(bn)].append(rows(bn, inputs, mask))

    with watched(model, see):
        for batch in batches:
            model(batch, training=False)
    return [np.concatenate(parts) for parts in seen.values()]


def lag(bn: Any, seen: Array, mean: Array, variance: Array) -> float:
    """DESIGN §2: the RMS error that stored statistics put on the output."""
    sigma_seen = np.sqrt(seen.var(0) + bn.epsilon)
    sigma = np.sqrt(variance.astype(np.float64) + bn.epsilon)
    shift = (seen.mean(0) - mean) / sigma
    return float(np.sqrt(np.mean(shift**2 + (sigma_seen / sigma - 1) ** 2)))


def residual(model: keras.Model, batches: Sequence[Any]) -> float:
    """The largest lag of any layer, measured apart from the library."""
    return max(
        lag(bn, seen, *statistics)
        for bn, seen, statistics in zip(
            batch_norms(model),
            seen_in_inference(model, batches),
            stored(model),
            strict=True,
        )
    )


def layer_by_layer(
    model: keras.Model, batches: Sequence[Any]
) -> list[tuple[Array, Array]]:
    """Population statistics one layer after the other: as many passes as layers."""
    saved = stored(model)
    found = batch_norms(model)
    exact: list[tuple[Array, Array]] = []
    for index, bn in enumerate(found):
        values = seen_in_inference(model, batches)[index]
        exact.append((values.mean(0), values.var(0)))
        bn.moving_mean.assign(values.mean(0))
        bn.moving_variance.assign(values.var(0))
    for bn, (mean, variance) in zip(found, saved, strict=True):
        bn.moving_mean.assign(mean)
        bn.moving_variance.assign(variance)
    return exact


def assert_close(
    model: keras.Model, exact: Sequence[tuple[Array, Array]], within: float = 5e-3
) -> None:
    """Asserts that the statistics stored are `exact`, to a part of each σ."""
    found = zip(batch_norms(model), stored(model), exact, strict=True)
    for bn, (mean, variance), (mean_0, variance_0) in found:
        sigma, sigma_0 = (np.sqrt(v + bn.epsilon) for v in (variance, variance_0))
        np.testing.assert_allclose((mean - mean_0) / sigma_0, 0, atol=within)
        np.testing.assert_allclose(sigma / sigma_0, 1, atol=within)


def cut(x: Array, size: int) -> list[Array]:
    return [x[start : start + size] for start in range(0, len(x), size)]

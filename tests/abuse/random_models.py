"""Small random models with BN in every place that Keras allows, drawn as plain data.

A drawn net is an immutable tree, which hypothesis prints and shrinks; `build` turns it
into a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from models import KERAS, batch_norms, dtype_policy, layers, scatter


def examples(count: int) -> settings:
    """The same examples each time, however slow they are: a test is no lottery."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


HAS_RENORM = KERAS >= (3, 13)
PRESERVING = ("norm", "dense", "relu", "tanh", "dropout")
NESTING = ("nested", "twice", "residual", "subclass")
RESHAPING = {
    "vector": ("widen",),
    "sequence": ("widen", "conv", "timewise"),
    "image": ("widen", "conv", "depthwise", "pool"),
}
# What keeps a mask; a model as a layer does not.
MASKED = {"widen", "timewise", "residual", "subclass"}


@dataclass(frozen=True)
class Norm:
    """Arguments of one BN layer; `axis` counts from 0 without the batch, -1 last."""

    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    dtype: str | None = None
    is_frozen: bool = False
    renorm: bool = False
    shares: int | None = None


@dataclass(frozen=True)
class Block:
    """One step of a net; `inner` are the steps of what it nests."""

    kind: str
    norm: Norm = field(default_factory=Norm)
    inner: "tuple[Block, ...]" = ()
    units: int = 3


@dataclass(frozen=True)
class Net:
    """A whole model, and the data it is to be given."""

    kind: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    policy: str | None
    is_masked: bool
    samples: int
    batch_size: int
    mean: float
    seed: int


@st.composite
def norms(draw: Any, rank: int, *, is_masked: bool, plain: bool) -> Norm:
    axes = [-1] if is_masked or plain else [-1, *range(rank)]
    return Norm(
        axis=draw(st.sampled_from(axes)),
        momentum=draw(st.sampled_from([0.99, 0.9, 0.5, 0.0, 0.999])),
        epsilon=draw(st.sampled_from([1e-3, 1e-5, 1e-1])),
        center=draw(st.booleans()),
        scale=draw(st.booleans()),
        dtype=draw(st.sampled_from([None, None, None, "float64"])),
        is_frozen=draw(st.sampled_from([False, False, False, True])),
        renorm=HAS_RENORM and draw(st.sampled_from([False] * 5 + [True])),
        shares=draw(st.sampled_from([None, None, 0, 1])),
    )


@st.composite
def blocks(draw: Any, kinds: Sequence[str], rank: int, is_masked: bool) -> Block:
    kind = draw(st.sampled_from(kinds))
    plain = kind == "timewise"
    inner = ()
    if kind in NESTING:
        within = PRESERVING if "twice" not in kinds else (*PRESERVING, "residual")
        inner = tuple(
            draw(st.lists(blocks(within, rank, is_masked), min_size=1, max_size=3))
        )
    return Block(
        kind=kind,
        norm=draw(norms(rank, is_masked=is_masked, plain=plain)),
        inner=inner,
        units=draw(st.integers(1, 5)),
    )


@st.composite
def nets(draw: Any, max_samples: int = 40) -> Net:
    """Nets of one to five blocks, at least one BN layer of which trains."""
    kind = draw(st.sampled_from(["vector", "sequence", "image"]))
    shape = {
        "vector": (draw(st.integers(1, 5)),),
        "sequence": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "image": (
            draw(st.integers(3, 6)),
            draw(st.integers(3, 6)),
            draw(st.integers(1, 4)),
        ),
    }[kind]
    is_masked = kind == "sequence" and draw(st.booleans())
    kinds = [
        *PRESERVING,
        "norm",
        *(k for k in NESTING if not is_masked or k in MASKED),
        *(k for k in RESHAPING[kind] if not is_masked or k in MASKED),
    ]
    chosen = draw(
        st.lists(blocks(kinds, len(shape), is_masked), min_size=1, max_size=5)
    )
    net = Net(
        kind=kind,
        shape=shape,
        blocks=tuple(chosen),
        policy=draw(
            st.sampled_from([None] * 5 + ["mixed_float16", "mixed_bfloat16", "float64"])
        ),
        is_masked=is_masked,
        samples=draw(st.integers(2, max_samples)),
        batch_size=draw(st.integers(1, 16)),
        mean=draw(st.sampled_from([0.0, 1.0, -3.0, 30.0])),
        seed=draw(st.integers(0, 2**16)),
    )
    if trains(net.blocks):
        return net
    first = Block("norm", Norm())
    return Net(**{**vars(net), "blocks": (first, *net.blocks)})


def trains(parts: Sequence[Block]) -> bool:
    """Whether a BN layer is among them that is not frozen, nor possibly another's."""
    return any(
        (
            part.kind in ("norm", "timewise")
            and not part.norm.is_frozen
            and part.norm.shares is None
        )
        or trains(part.inner)
        for part in parts
    )


class Wrapped(keras.layers.Layer):
    """A layer of somebody's own, which holds a BN layer and passes all on."""

    def __init__(self, inner: keras.layers.Layer, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inner = inner
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.built = True

    def call(self, x: Any, training: bool | None = None, mask: Any = None) -> Any:
        return self.inner(x, training=training, mask=mask)


class _Builder:
    """Puts a functional model together."""

    def __init__(self) -> None:
        self._shared: list[tuple[Any, tuple[Any, ...]]] = []

    def norm(self, norm: Norm, shape: tuple[Any, ...], *, may_share: bool) -> Any:
        fitting = [bn for bn, of in self._shared if of == shape]
        if may_share and norm.shares is not None and fitting:
            return fitting[norm.shares % len(fitting)]
        rank = len(shape) - 1
        arguments: dict[str, Any] = {} if norm.dtype is None else {"dtype": norm.dtype}
        if norm.renorm:
            arguments["renorm"] = True
        bn = layers.BatchNormalization(
            axis=-1 if norm.axis == -1 else 1 + norm.axis % rank,
            momentum=norm.momentum,
            epsilon=norm.epsilon,
            center=norm.center,
            scale=norm.scale,
            trainable=not norm.is_frozen,
            **arguments,
        )
        if may_share:
            self._shared.append((bn, shape))
        return bn

    def chain(self, parts: Sequence[Block], x: Any) -> Any:
        for part in parts:
            x = self.apply(part, x)
        return x

    def apply(self, part: Block, x: Any) -> Any:
        shape = tuple(x.shape)
        kind, units = part.kind, part.units
        simple = {
            "dense": lambda: layers.Dense(shape[-1]),
            "widen": lambda: layers.Dense(units),
            "relu": layers.ReLU,
            "tanh": lambda: layers.Activation("tanh"),
            "dropout": lambda: layers.Dropout(0.4, seed=1),
            "conv": lambda: (layers.Conv1D if len(shape) == 3 else layers.Conv2D)(
                units, 2, padding="same"
            ),
            "depthwise": lambda: layers.DepthwiseConv2D(2, padding="same"),
            "pool": lambda: layers.MaxPooling2D(2, padding="same"),
        }
        if kind in simple:
            return simple[kind]()(x)
        if kind == "norm":
            return self.norm(part.norm, shape, may_share=True)(x)
        if kind == "subclass":
            inner = self.norm(part.norm, shape, may_share=False)
            return self.chain(part.inner, Wrapped(inner)(x))
        if kind == "timewise":
            return layers.TimeDistributed(
                self.norm(part.norm, (None, *shape[2:]), may_share=False)
            )(x)
        if kind == "residual":
            return layers.Add()([x, self.chain(part.inner, x)])
        inputs = keras.Input(shape[1:], dtype=x.dtype)
        model = keras.Model(inputs, _Builder().chain(part.inner, inputs))
        return model(model(x)) if kind == "twice" else model(x)


def build(net: Net) -> keras.Model:
    """A model with random weights and statistics, as after some training."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(net.seed)
    with dtype_policy(net.policy or "float32"):
        inputs = keras.Input(net.shape)
        x = layers.Masking(0.0)(inputs) if net.is_masked else inputs
        model = keras.Model(inputs, _Builder().chain(net.blocks, x))
    scatter(model, net.seed)
    for bn in batch_norms(model):
        if getattr(bn, "renorm", False):
            stddev = np.sqrt(np.array(bn.moving_variance.value) + bn.epsilon)
            for variable, value in (
                (bn.moving_stddev, stddev),
                (bn.renorm_mean, bn.moving_mean.value),
                (bn.renorm_stddev, stddev),
            ):
                variable.assign(value)
    return model


def data(net: Net) -> Any:
    """Data for a net: correlated, of different scales, padded where it has a mask."""
    draw = np.random.default_rng(net.seed)
    x = draw.normal(size=(net.samples, *net.shape))
    x = net.mean + draw.uniform(0.3, 3, net.shape[-1]) * (x + 0.3 * x[..., ::-1])
    if net.is_masked:
        lengths = draw.integers(0, net.shape[0] + 1, net.samples)
        lengths[0] = net.shape[0]
        x[np.arange(net.shape[0]) >= lengths[:, None]] = 0.0
    return x.astype("float32")

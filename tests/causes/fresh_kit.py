"""Cases that an examiner wrote who had read none of the rules, and how each is proven.

Nothing here measures with the library: a case is what it says if the cure that its
mechanism has makes the loss in inference mode fall, and the cures of other causes do
not.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from kit import Callbacks, Case, Cases, Run

Changes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Trial(Run):
    """A run with data that it has not seen.

    Args:
        held_out: `(x, y)` of the distribution that the model is used on.
        moving: Whether to look only at the layers that this is true of.
    """

    held_out: tuple[Any, Any] = ()  # type: ignore[assignment]
    moving: Callable[[Any], bool] = lambda layer: bool(layer.trainable)


@dataclass(frozen=True)
class Proof:
    """What a case claims.

    Args:
        recalibrating: "cures", "helps", "nothing" (neither), "harms" or "any".
        cures: Changes of the training after which the loss in inference mode is at
            most two thirds of what it was.
        fails: Changes that leave more than half of it, or twice what any cure does.
    """

    case: Case
    recalibrating: str
    cures: Changes = field(default_factory=dict)
    fails: Changes = field(default_factory=dict)


PROOFS: list[Proof] = []


class Fresh(Cases):
    """Held-back cases, each with its proof."""

    def case(
        self,
        *causes: str,
        recalibrating: str = "any",
        cures: Changes | None = None,
        fails: Changes | None = None,
        gap: tuple[float, float] | None = None,
    ) -> Callable[[Callable[..., Run]], Callable[..., Run]]:
        """Adds a training that suffers from any of these causes, or from none."""
        expected, *also = causes or (None,)

        def add(build: Callable[..., Run]) -> Callable[..., Run]:
            case = Case(
                build.__name__, expected, True, build, gap, also=tuple(map(str, also))
            )
            self._cases.append(case)
            PROOFS.append(Proof(case, recalibrating, cures or {}, fails or {}))
            return build

        return add

    def __iter__(self) -> Iterator[Case]:
        return iter(self._cases)


def norms(model: keras.Model) -> list[Any]:
    """All its BN layers."""
    found: list[Any] = []
    for layer in model._flatten_layers():
        is_new = all(layer is not one for one in found)
        if isinstance(layer, keras.layers.BatchNormalization) and is_new:
            found.append(layer)
    return found


@contextmanager
def calling(chosen: list[Any], instead: Callable[..., Any]) -> Iterator[None]:
    """Has `instead(layer, inputs, mask)` called in the place of these layers."""
    for layer in chosen:

        def call(
            inputs: Any, training: Any = None, mask: Any = None, layer: Any = layer
        ) -> Any:
            return instead(layer, inputs, mask)

        object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        for layer in chosen:
            object.__delattr__(layer, "call")


def moments(layer: Any, x: Any, mask: Any) -> tuple[Any, Any, float]:
    """Mean, variance and count of each channel of some inputs, in float64."""
    x = np.asarray(keras.ops.convert_to_numpy(x), "float64")
    x = np.moveaxis(x, layer.axis, -1)
    channels = x.shape[-1]
    if mask is not None:
        keep = np.broadcast_to(keras.ops.convert_to_numpy(mask), x.shape[:-1])
        x = x[keep.astype(bool)]
    x = x.reshape(-1, channels)
    return x.mean(0), x.var(0), len(x)


def normalised(layer: Any, x: Any, mean: Any, variance: Any) -> Any:
    shape = [1] * len(x.shape)
    shape[layer.axis] = -1
    x = keras.ops.cast(x, "float32")
    z = (x - np.reshape(mean, shape)) / np.sqrt(
        np.reshape(variance, shape) + layer.epsilon
    )
    z = keras.ops.cast(z, "float32")
    if layer.scale:
        z = z * keras.ops.cast(keras.ops.reshape(layer.gamma, shape), "float32")
    if layer.center:
        z = z + keras.ops.cast(keras.ops.reshape(layer.beta, shape), "float32")
    return keras.ops.cast(z, layer.compute_dtype)


def by_batch(layer: Any, x: Any, mask: Any) -> Any:
    """BN with the statistics of the batch, moving nothing."""
    mean, variance, _ = moments(layer, x, mask)
    return normalised(layer, x, mean, variance)


def part(data: Any, rows: slice) -> Any:
    if isinstance(data, (list, tuple)):
        return [one[rows] for one in data]
    return data[rows]


def count(data: Any) -> int:
    return len(data[0] if isinstance(data, (list, tuple)) else data)


def of_batches(data: tuple[Any, Any], size: int) -> Iterator[tuple[Any, Any, int]]:
    x, y = data[:2]
    for start in range(0, count(y), size):
        rows = slice(start, start + size)
        yield part(x, rows), part(y, rows), count(part(y, rows))


def loss(model: keras.Model, data: tuple[Any, Any], size: int = 256) -> float:
    """The compiled loss in inference mode without penalties."""
    function = model.loss
    total = rows = 0.0
    for x, y, number in of_batches(data, size):
        out = model(x, training=False)
        if isinstance(out, (list, tuple)):
            functions = function if isinstance(function, list) else [function] * len(y)
            pairs = list(zip(functions, y, out, strict=True))
        else:
            pairs = [(function, y, out)]
        for one, truth, guess in pairs:
            value = keras.losses.get(one)(truth, keras.ops.cast(guess, "float32"))
            total += number * float(np.mean(keras.ops.convert_to_numpy(value)))
        rows += number
    return total / rows


def recalibrate(model: keras.Model, chosen: list[Any], x: Any, size: int = 256) -> None:
    """Gives each layer the moments of what inference brings it.

    One layer is right after the first pass, two after the second, and so on.
    """
    if not chosen:
        return
    with calling(chosen, by_batch):  # a start: all data as a batch
        model(x, training=False)
    for _ in range(len(chosen) + 1):
        seen: dict[int, list[Any]] = {id(layer): [] for layer in chosen}

        def record(layer: Any, inputs: Any, mask: Any, seen: Any = seen) -> Any:
            seen[id(layer)].append(moments(layer, inputs, mask))
            return normalised(
                layer,
                inputs,
                keras.ops.convert_to_numpy(layer.moving_mean).astype("float32"),
                keras.ops.convert_to_numpy(layer.moving_variance).astype("float32"),
            )

        with calling(chosen, record):
            for start in range(0, count(x), size):
                model(part(x, slice(start, start + size)), training=False)
        for layer in chosen:
            found = seen[id(layer)]
            if not found:
                continue
            weights = np.array([n for *_, n in found], "float64")
            means = np.array([mean for mean, *_ in found])
            inner = np.array([variance for _, variance, _ in found])
            mean = np.average(means, axis=0, weights=weights)
            outer = np.average((means - mean) ** 2, axis=0, weights=weights)
            variance = np.average(inner, axis=0, weights=weights) + outer
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(variance)


@dataclass(frozen=True)
class Measured:
    """Losses of a trained case.

    Args:
        inference: Of the probe, as stored (I).
        batch: Of the probe, in batches as in training (B).
        recalibrated: Of the probe, with the probe's own statistics (R).
        held_out: Of the held-out data, as stored.
        cured: Of the held-out data, with the statistics of the probe.
        debiased: Of the held-out data, without the start values.
    """

    inference: float
    batch: float
    recalibrated: float
    held_out: float
    cured: float
    debiased: float = math.nan


def trained(case: Case, callbacks: Callbacks | None = None, **changes: Any) -> Trial:
    """Builds a case, perhaps otherwise, and trains it without the library."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(7)
    run = case.build(**changes)  # type: ignore[call-arg]
    assert isinstance(run, Trial)
    run.fit(callbacks or [])
    return run


def measure(run: Trial) -> Measured:
    model = run.model
    chosen = [layer for layer in norms(model) if run.moving(layer)]
    kept = model.get_weights()
    inference, held_out = loss(model, run.probe), loss(model, run.held_out)
    with calling(chosen, by_batch):
        batch = loss(model, run.probe, run.batch_size)
    recalibrate(model, chosen, run.probe[0])
    recalibrated, cured = loss(model, run.probe), loss(model, run.held_out)
    model.set_weights(kept)
    return Measured(inference, batch, recalibrated, held_out, cured)


HELPS = {
    "cures": lambda before, after: after < 0.67 * before or not before < math.inf,
    "helps": lambda before, after: after < 0.9 * before,
    "nothing": lambda before, after: after > 0.9 * before,
    "harms": lambda before, after: after > 1.1 * before,
    "any": lambda before, after: True,
}


def prove(proof: Proof) -> tuple[bool, str]:
    """Whether a case is what it claims, and the figures."""
    as_is = measure(trained(proof.case))
    before = as_is.held_out
    is_so = HELPS[proof.recalibrating](before, as_is.cured)
    if proof.case.expected is None:
        is_so &= as_is.inference < 1.4 * as_is.batch or as_is.cured > 0.9 * before
    text = (
        f"I {as_is.inference:.3g} B {as_is.batch:.3g} R {as_is.recalibrated:.3g} | "
        f"held out {before:.3g}, recalibrated {as_is.cured:.3g} "
        f"({proof.recalibrating})"
    )
    best = 0.25 * before
    for name, changes in proof.cures.items():
        after = measure(trained(proof.case, **changes)).held_out
        is_so &= after < 0.67 * before or not before < math.inf
        best = min(best, after)
        text += f", cured by {name}: {after:.3g}"
    for name, changes in proof.fails.items():
        after = measure(trained(proof.case, **changes)).held_out
        is_so &= after > min(0.5 * before, 2 * best)
        text += f", not by {name}: {after:.3g}"
    return is_so, text

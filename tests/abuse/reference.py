"""What recalibration is, written down once more: eager, in NumPy, slow and plain.

Every BN layer is made to normalise in float64 with moments of its own batch, or with
given statistics; all that it ever sees is kept, and its moments are taken at the end.
Nothing of the library is used.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from models import Array, batch_norms, rows

Given = dict[int, tuple[Array, Array]]
"""Mean and variance by the `id` of a layer."""


def measure(
    model: keras.Model,
    batches: Sequence[Any],
    given: Given | None = None,
    perturbed: float = 0.0,
) -> Given:
    """Population statistics of all layers that are not frozen, from one pass.

    With `perturbed`, each input of a layer is off by about that much of itself: what
    comes out shows how much rounding matters to this model.
    """
    seen: dict[int, list[Array]] = {}
    draw = np.random.default_rng(0)

    def stand_in(bn: Any) -> Any:
        own = bn.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            if not bn.trainable:
                extra = {} if mask is None else {"mask": mask}
                return own(inputs, training=False, **extra)
            x = np.asarray(tf.cast(inputs, tf.float64))
            x = x * (1 + perturbed * draw.normal(size=x.shape))
            valid = rows(bn, x, None if mask is None else np.asarray(mask))
            seen.setdefault(id(bn), []).append(valid)
            if given is None and len(valid):
                mean, variance = valid.mean(0), valid.var(0)
            else:
                # What is masked throughout is not looked at: any numbers will do.
                nothing = (np.zeros(x.shape[bn.axis]), np.ones(x.shape[bn.axis]))
                mean, variance = (given or {}).get(id(bn), nothing)
            # Not the same again: what cancels in the difference leaves its rounding.
            x = x * (1 + perturbed * draw.normal(size=x.shape))
            outputs = (np.moveaxis(x, bn.axis, -1) - mean) / np.sqrt(
                variance + bn.epsilon
            )
            if bn.scale:
                outputs = outputs * np.asarray(bn.gamma.value, np.float64)
            if bn.center:
                outputs = outputs + np.asarray(bn.beta.value, np.float64)
            return tf.cast(np.moveaxis(outputs, -1, bn.axis), bn.compute_dtype)

        return call

    with replaced(model, stand_in):
        for batch in batches:
            model(batch, training=False)
    values = {key: np.concatenate(parts) for key, parts in seen.items()}
    return {
        key: (value.mean(0), value.var(0))
        for key, value in values.items()
        if len(value)
    }


@contextlib.contextmanager
def replaced(model: keras.Model, stand_in: Any) -> Iterator[None]:
    """Inside, each BN layer calls what `stand_in` makes of it."""
    found = batch_norms(model)
    for bn in found:
        vars(bn)["call"] = stand_in(bn)
    try:
        yield
    finally:
        for bn in found:
            del vars(bn)["call"]


def recalibration(
    model: keras.Model, batches: Sequence[Any], refine: int, perturbed: float = 0.0
) -> Given:
    """The statistics after a first pass and so many more."""
    statistics = measure(model, batches, perturbed=perturbed)
    for _ in range(refine):
        statistics = measure(model, batches, statistics, perturbed)
    return statistics


def distance(bn: Any, one: tuple[Array, Array], other: tuple[Array, Array]) -> float:
    """Largest difference of two statistics in any channel, in standard deviations."""
    (mean, variance), (mean_0, variance_0) = one, other
    sigma, sigma_0 = np.sqrt(variance + bn.epsilon), np.sqrt(variance_0 + bn.epsilon)
    shift = np.abs(mean - mean_0) / sigma_0
    return float(np.max(np.maximum(shift, np.abs(sigma / sigma_0 - 1)), initial=0))

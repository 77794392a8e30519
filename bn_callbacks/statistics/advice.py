"""Says what to do about each cause, in a sentence or two."""

import math
from collections.abc import Sequence

import numpy as np

from bn_callbacks.statistics.causes import (
    BATCH_DEPENDENT,
    CORRELATED_BATCHES,
    DRIFTING,
    INFERENCE_MODE,
    LOW_PRECISION,
    MIXED_CALLS,
    NOISY,
    NON_FINITE,
    NOT_UPDATING,
    OUTLIERS,
    REPLICAS_DIFFER,
    RESCALED_INPUTS,
    STALE,
    TINY_BATCH,
    UNEXPECTED_UPDATE,
    WARMING_UP,
    WEIGHTS_REPLACED,
)
from bn_callbacks.statistics.evidence import Evidence, Measured
from bn_callbacks.statistics.losses import Family
from bn_callbacks.statistics.moving_average import (
    FORGOTTEN,
    LEAST_MOMENTUM,
    start_weight,
    suggest_momentum,
    updates_to_forget,
)


def suggested_momentum(seen: Evidence, measured: Measured, cause: str) -> float | None:
    """A better momentum for this cause; None if no other would help."""
    total = seen.total_updates or seen.updates
    if cause == WARMING_UP and total:
        best = min(suggest_momentum(total), _forgets(_distance(seen), total))
    elif cause in (NOISY, DRIFTING) and measured.stream is not None:
        # With a larger one, too much of the start would be left at the end.
        largest = 0.999 if not total else min(0.999, FORGOTTEN ** (1 / total))
        best = measured.stream.best_momentum(largest)
    else:
        return None
    best = max(best, LEAST_MOMENTUM)
    is_better = best > seen.momentum if cause == NOISY else best < seen.momentum
    return best if is_better else None


def _forgets(distance: float, updates: int) -> float:
    """The momentum that leaves a lag of 0.05: `m^N·distance = 0.05`."""
    return float((FORGOTTEN / max(distance, 1.0)) ** (1 / updates))


def _distance(seen: Evidence) -> float:
    """How far the start is from the batches, in their own standard deviations."""
    if seen.start is None or seen.batch is None:
        return 0.0
    sigma2 = np.maximum(seen.batch.variance, 0) + seen.epsilon
    of_mean = float(np.mean(np.square(seen.start.mean - seen.batch.mean) / sigma2))
    of_scale = float(np.mean(np.maximum(seen.start.variance, 0) / sigma2))
    return max(math.sqrt(of_mean), of_scale)


def advise(
    seen: Evidence, measured: Measured, cause: str, momentum: float | None
) -> str:
    """Writes the advice: what to do, with which numbers."""
    write = _ADVICE.get(cause)
    if write is not None:
        return write(seen, measured, momentum)
    return _PLAIN_ADVICE.get(cause, "").format(
        fix="Set a momentum below 1. " if seen.momentum == 1 else ""
    )


def _warming_up(seen: Evidence, measured: Measured, momentum: float | None) -> str:
    recalibrate = "(`recalibrate(model, x)` or `RecalibrateBatchNorm`)"
    if not seen.updates:
        return (
            "The layer still holds the values that a new layer has: no training step "
            f"has updated them. Recalibrate {recalibrate}."
        )
    weight = start_weight(seen.momentum, seen.updates)
    needed = updates_to_forget(seen.momentum, FORGOTTEN)
    ways = [f"Recalibrate before export {recalibrate}"]
    if measured.rest_part <= seen.threshold:
        # It takes out the start, and leaves what else puts the averages off.
        ways.append("debias for free (`DebiasBatchNorm`)")
    if momentum is not None:
        ways.append(f"set momentum={momentum:.3g}")
    return (
        f"{weight:.2g} of the start values is still in the moving statistics, which "
        f"puts them off by {measured.start_part:.2g} standard deviations: momentum "
        f"{seen.momentum:g} has had {seen.updates} updates, and needs {needed} to "
        f"forget 95 % of a start. {_or(ways)}."
    )


def _or(ways: Sequence[str]) -> str:
    """Ways to choose from, the first of which begins a sentence."""
    return ", or ".join([", ".join(ways[:-1]), ways[-1]]) if ways[1:] else ways[0]


def _drifting(seen: Evidence, measured: Measured, momentum: float | None) -> str:
    smaller = "" if momentum is None else f", or set momentum={momentum:.3g}"
    return (
        "The weights move faster than the moving statistics follow. Recalibrate "
        "before export and before validation (`recalibrate(model, x)` or "
        "`RecalibrateBatchNorm(x, when='validation')`), let the learning rate fall "
        f"towards the end{smaller}."
    )


def _noisy(seen: Evidence, measured: Measured, momentum: float | None) -> str:
    what = (
        f"The moving statistics fluctuate by {measured.noise_part:.2g} standard "
        f"deviations from sampling alone: momentum {seen.momentum:g} averages too few "
        "batches."
    )
    recalibrate = "recalibrate before export (`recalibrate(model, x)`)."
    larger = "" if momentum is None else f"set momentum={momentum:.3g}, "
    if seen.last_batch_size and seen.batch_size:
        sizes = f"{seen.last_batch_size:.0f} examples instead of {seen.batch_size:.0f}"
        return (
            f"{what} The last batch of an epoch has {sizes} and weighs as much: drop "
            f"it (`drop_remainder=True`), {larger}and {recalibrate}"
        )
    do = f"{larger}use larger batches, and {recalibrate}"
    return f"{what} {do[0].upper()}{do[1:]}"


def _correlated(seen: Evidence, measured: Measured, momentum: float | None) -> str:
    scatter = _scatter(seen, measured)
    if seen.family is Family.BATCHES and not scatter:
        scatter = ": no fixed statistics do for all what their own do for each"
    return (
        f"Batches are no random sample{scatter}. Shuffle the examples before batching "
        "(padding, and examples that only fill a batch, count too: pass a mask, or "
        "leave them out); no momentum helps. Until then recalibrating over shuffled "
        "data helps in part at best: let it measure (`recalibrate(model, x, "
        "validation_data=...)`)."
    )


def _tiny_batch(seen: Evidence, measured: Measured, momentum: float | None) -> str:
    size = "so few" if seen.batch_size is None else f"{seen.batch_size:.0f}"
    return (
        f"Batches of {size} examples have no useful statistics, and recalibration "
        "cannot repair what was trained with them. Use larger batches, or another "
        "normaliser (`GroupNormalization`, `LayerNormalization`)."
    )


def _rescaled(seen: Evidence, measured: Measured, momentum: float | None) -> str:
    return (
        f"The data given differ from those of training by {seen.input_map} in every "
        "channel: preprocessing is missing, different, or done twice. Give the data as "
        "training got them. Do not recalibrate: the model would then be wrong for its "
        "own data."
    )


def _stale(seen: Evidence, measured: Measured, momentum: float | None) -> str:
    what = "are not those of these weights and data"
    if (seen.moving.variance < 0).any():
        what = "have a negative variance, which no average of batches has"
    if seen.is_touched:
        return (
            "The stored statistics changed after the last training step, though no "
            "training step was made: something else has called the layer with "
            "`training=True` (dropout that is to stay active, for one), or has written "
            "them. Make such calls with `training=False`, or leave BN out of them, and "
            "recalibrate (`recalibrate(model, x)`)."
        )
    return (
        f"The stored statistics {what}, and nothing shows why. Weights "
        "restored or copied without their statistics, a faulty conversion, other "
        "data, or calls with `training=True` outside `fit` can do it. Check first that "
        "the data are preprocessed as in training: recalibrating on other data ruins "
        "the model. Then recalibrate (`recalibrate(model, x)`)."
    )


def _scatter(seen: Evidence, measured: Measured) -> str:
    design = measured.figures.design_effect
    if design is None or seen.batch_size is None or design < 2:
        # If another layer proves it, this one's small figure would contradict it.
        return ""
    return (
        f": their means vary {design:.0f} times as much as those of shuffled batches "
        f"of {seen.batch_size:.0f}"
    )


_ADVICE = {
    WARMING_UP: _warming_up,
    DRIFTING: _drifting,
    NOISY: _noisy,
    CORRELATED_BATCHES: _correlated,
    TINY_BATCH: _tiny_batch,
    RESCALED_INPUTS: _rescaled,
    STALE: _stale,
}

_PLAIN_ADVICE = {
    INFERENCE_MODE: (
        "The statistics never changed in training, most likely since the layer ran in "
        "inference mode: pass `training` on to it, or freeze it with "
        "`layer.trainable = False`. Do not recalibrate: the weights have adapted to "
        "the statistics as they are."
    ),
    NOT_UPDATING: (
        "The layer trained on batch statistics, but its moving statistics never "
        "changed. {fix}Recalibrate before export (`recalibrate(model, x)`)."
    ),
    UNEXPECTED_UPDATE: (
        "The layer was meant to keep its statistics, yet training changes them: "
        "`trainable` is sure to count only after `compile`, and in `fit` a functional "
        "model overrides `training=False`. Set `layer.trainable = False`, then "
        "`compile`."
    ),
    OUTLIERS: (
        "Rare extreme examples dominate the variance, which differs wildly from "
        "batch to batch (a column that is hardly ever other than 0 does the same). "
        "Clean, clip or regroup the data; recalibrate only then."
    ),
    BATCH_DEPENDENT: (
        "The model works with the statistics of each batch, but with no fixed ones, "
        "and nothing shows why: batches differ no more than random ones, or their "
        "size is not known. Try whether shuffled or larger batches, or a layer for "
        "each kind of input, close the gap; targets that depend on the other examples "
        "of a batch keep it open. Recalibrating helps in part, or "
        "harms: let it measure (`recalibrate(model, x, validation_data=...)`)."
    ),
    MIXED_CALLS: (
        "One step calls the layer several times on inputs with different statistics, "
        "and one average is right for none of them. Use a layer for each, or "
        "concatenate the inputs into one batch. Recalibrating helps in part, or harms: "
        "let it measure (`recalibrate(model, x, validation_data=...)`)."
    ),
    WEIGHTS_REPLACED: (
        "The weights were replaced after the statistics were collected (averaged or "
        "restored weights). Recalibrate after the swap (`recalibrate(model, x)`, or "
        "`RecalibrateBatchNorm` as the last callback)."
    ),
    REPLICAS_DIFFER: (
        "Each replica keeps moving statistics of its own, and these differ, since the "
        "replicas see different data; a saved model holds the first replica's only. "
        "Use `BatchNormalization(synchronized=True)`, and recalibrate before export "
        "(`recalibrate(model, x)`), which gives all replicas the same."
    ),
    LOW_PRECISION: (
        "The statistics are stored in less than float32, where small updates are "
        "rounded away. Use a policy with float32 variables (such as 'mixed_bfloat16') "
        "and recalibrate (`recalibrate(model, x)`)."
    ),
    NON_FINITE: (
        "The moving statistics are NaN or infinite and stay so for good. Find the "
        "batch that did it, then `recalibrate(model, x)` heals the layer."
    ),
}

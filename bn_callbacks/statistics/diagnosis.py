"""From what was seen of one layer to the cause of its lag, and the remedy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bn_callbacks.statistics.lag import lag, mean_shift, scale_ratio
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import (
    average_noise,
    debias,
    suggest_momentum,
    updates_to_forget,
)
from bn_callbacks.statistics.stream import Stream, observe

HEALTHY = "healthy"
WARMING_UP = "warming_up"
DRIFTING = "drifting"
NOISY = "noisy"
TINY_BATCH = "tiny_batch"
CORRELATED_BATCHES = "correlated_batches"
MIXED_CALLS = "mixed_calls"
WEIGHTS_REPLACED = "weights_replaced"
INFERENCE_MODE = "inference_mode"
NOT_UPDATING = "not_updating"
UNEXPECTED_UPDATE = "unexpected_update"
LOW_PRECISION = "low_precision"
OUTLIERS = "outliers"
NON_FINITE = "non_finite"

STATISTICAL = (WARMING_UP, NOISY, DRIFTING)
"""Three ways in which the average of good batches is wrong."""

DATA_CAUSES = (TINY_BATCH, OUTLIERS, CORRELATED_BATCHES)
"""Causes that lie in the batches, and so reach every layer."""

DEFAULT_THRESHOLD = 0.2
"""Lag that is worth a word: a fifth of a standard deviation on every output."""

GAP_LIMIT = 1.4
"""Loss gap that proves a problem. Of 46 measured cases healthy ones reached 1.29, and
27 of 32 true problems exceeded 1.5 (CAUSES); this is the middle."""

PROVEN = 0.25
"""Share of the threshold that a mechanism must reach to explain a proven gap."""

FORGOTTEN = 0.05
"""Weight of the start below which it no longer explains a lag."""

NOISE_FACTOR = 2.0
"""A distance up to so many standard errors is taken for sampling noise."""

DESIGN_LIMIT = 7.0
"""Design effect that proves grouped batches: random ones have 1, drift has reached
4.6, grouped ones began at 12 (CAUSES); this is the geometric middle of the latter."""

VARIATION_LIMIT = 3.0
"""Variation of batch variances that outliers cause: 7 with outliers, at most 1.4
elsewhere (CAUSES); this is the geometric middle."""

TINY = 2
"""Examples a batch up to which batch statistics are useless; nobody means them."""


@dataclass(frozen=True)
class Evidence:
    """All that was seen of one layer. What is not known is `None` or empty.

    Args:
        path: The layer's path, for the advice.
        momentum: The layer's momentum (it weights the old value).
        epsilon: The layer's epsilon.
        moving: The statistics the layer stores.
        batch: Batch statistics to hold them against.
        past: What the layer stored before `batch` was seen, given where `moving` is
            made of the same batches in the main, and so no witness.
        trainable: Whether training is to update the statistics.
        updates: Number of updates watched.
        total_updates: Number of updates that training will have made at its end.
        start: The statistics before the first of the `updates`.
        windows: Batch statistics of successive windows, equally long, oldest first.
        window_updates: Length of a window in updates.
        window_share: Variance of a window's statistics over that of one batch's.
        recurrence: Variance of the windows' means within an epoch that the next epoch
            repeats, in units of the batch variance.
        batch_size: Examples a batch.
        last_batch_size: Examples of an epoch's last batch, if it is smaller.
        is_still: Whether the statistics were watched and never changed.
        is_initial: Whether they began as the values a new layer has.
        is_pinned: Whether the model's graph stores `training=False` for the layer.
        precision: Machine epsilon of the dtype they are stored in, where that is
            less than float32.
        has_mixed_calls: Whether one step calls the layer several times.
        are_weights_replaced: Whether weights changed after the last update.
        loss_gap: Loss in inference mode over loss with batch statistics.
        threshold: Lag above which something is said.
    """

    path: str
    momentum: float
    epsilon: float
    moving: Statistics
    batch: Statistics | None = None
    past: Statistics | None = None
    trainable: bool = True
    updates: int | None = None
    total_updates: int | None = None
    start: Statistics | None = None
    windows: Sequence[Statistics] = ()
    window_updates: int | None = None
    window_share: float | None = None
    recurrence: float | None = None
    batch_size: float | None = None
    last_batch_size: float | None = None
    is_still: bool = False
    is_initial: bool = True
    is_pinned: bool = False
    precision: float | None = None
    has_mixed_calls: bool = False
    are_weights_replaced: bool = False
    loss_gap: float | None = None
    threshold: float = DEFAULT_THRESHOLD


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on one layer and the figures behind it."""

    cause: str
    advice: str = ""
    lag: float | None = None
    mean_shift: float | None = None
    scale_ratio: float | None = None
    noise: float | None = None
    start_weight: float | None = None
    suggested_momentum: float | None = None
    design_effect: float | None = None
    batch_noise: float | None = None
    batch_variation: float | None = None


@dataclass(frozen=True)
class Figures:
    """What is computed from the evidence before anything is judged.

    Args:
        lag: Distance of batch and moving statistics, in standard deviations.
        mean_shift: Its part from the means.
        scale_ratio: Batch over moving standard deviation.
        start_weight: Weight of the start in the moving statistics.
        stream: Noise and drift of the batch statistics.
        start_part: Error that the start puts on the moving statistics.
        drift_part: Distance that neither the start nor noise explains.
        noise_part: Fluctuation of the moving statistics from sampling.
        stall_part: Error at which updates are rounded away.
        design_effect: Variance of batch means over that of random batches.
    """

    lag: float | None = None
    mean_shift: float | None = None
    scale_ratio: float | None = None
    start_weight: float | None = None
    stream: Stream | None = None
    start_part: float = 0.0
    drift_part: float = 0.0
    noise_part: float | None = None
    stall_part: float = 0.0
    design_effect: float | None = None


def diagnose(evidence: Evidence, cause: str | None = None) -> Diagnosis:
    """Names the cause of a layer's lag and what to do about it.

    Args:
        evidence: What was seen of the layer.
        cause: The cause, where it is known already.

    Returns:
        The verdict, `"healthy"` unless a mechanism is seen to be at work.

    Example:
    >>> import numpy as np
    >>> far = Statistics(np.full(8, 1.0), np.ones(8))
    >>> start = Statistics(np.zeros(8), np.ones(8))
    >>> now = Statistics(np.full(8, 1 - 0.99**50), np.ones(8))
    >>> diagnosis = diagnose(
    ...     Evidence(
    ...         "bn",
    ...         momentum=0.99,
    ...         epsilon=1e-3,
    ...         moving=now,
    ...         batch=far,
    ...         updates=50,
    ...         start=start,
    ...     )
    ... )
    >>> diagnosis.cause, round(diagnosis.lag, 3)
    ('warming_up', 0.605)
    """
    figures = measure(evidence)
    cause = cause or _own_cause(evidence, figures)
    momentum = _suggested_momentum(evidence, figures, cause)
    stream = figures.stream
    return Diagnosis(
        cause=cause,
        advice=_advice(evidence, figures, cause, momentum),
        lag=figures.lag,
        mean_shift=figures.mean_shift,
        scale_ratio=figures.scale_ratio,
        noise=figures.noise_part,
        start_weight=figures.start_weight,
        suggested_momentum=momentum,
        design_effect=figures.design_effect,
        batch_noise=None if stream is None else math.sqrt(stream.noise),
        batch_variation=None if stream is None else stream.variation,
    )


def diagnose_model(evidence: Sequence[Evidence]) -> list[Diagnosis]:
    """Diagnoses all layers of a model, each in the light of the others.

    Bad batches reach every layer, where they look like noise or drift: such findings
    take the cause that another layer proves. And a loss gap that no layer explains
    means that the weights are not those the statistics were collected with, or that
    one layer serves several inputs.

    Args:
        evidence: What was seen of each layer.

    Returns:
        A verdict for each.
    """
    causes = [_own_cause(seen, measure(seen)) for seen in evidence]
    of_data = [cause for cause in causes if cause in DATA_CAUSES]
    if of_data:
        consequences = (NOISY, DRIFTING)
        causes = [of_data[0] if cause in consequences else cause for cause in causes]
    causes = _main_causes(evidence, causes)
    is_proven = any(_is_proven(seen) for seen in evidence)
    if is_proven and all(cause == HEALTHY for cause in causes):
        causes = [_unexplained(seen, evidence) for seen in evidence]
    return [diagnose(seen, cause) for seen, cause in zip(evidence, causes, strict=True)]


def _main_causes(evidence: Sequence[Evidence], causes: Sequence[str]) -> list[str]:
    """Drops what was named only since a gap is proven, if something larger explains it.

    Of errors below the threshold only those of the same kind as the largest remain.
    """
    pairs = list(zip(evidence, causes, strict=True))
    sizes = [_part(measure(seen), cause) for seen, cause in pairs]
    largest = max(sizes, default=0.0)
    main = causes[sizes.index(largest)] if sizes else HEALTHY
    kept = []
    for (seen, cause), size in zip(pairs, sizes, strict=True):
        is_minor = cause in STATISTICAL and size <= seen.threshold
        is_other = largest > seen.threshold or cause != main
        kept.append(HEALTHY if is_minor and is_other else cause)
    return kept


def _part(figures: Figures, cause: str) -> float:
    """Size of the error that a statistical cause accounts for."""
    return {
        WARMING_UP: figures.start_part,
        NOISY: figures.noise_part or 0.0,
        DRIFTING: figures.drift_part,
    }.get(cause, 0.0)


def _own_cause(seen: Evidence, figures: Figures) -> str:
    return next(cause for cause, applies in RULES if applies(seen, figures))


def _unexplained(seen: Evidence, evidence: Sequence[Evidence]) -> str:
    if any(other.has_mixed_calls for other in evidence):
        return MIXED_CALLS if seen.has_mixed_calls else HEALTHY
    return WEIGHTS_REPLACED if seen.trainable and not seen.is_still else HEALTHY


def measure(seen: Evidence) -> Figures:
    """The figures behind a verdict."""
    weight = None if seen.updates is None else seen.momentum**seen.updates
    stream = None
    if seen.window_updates and seen.window_share:
        stream = observe(
            seen.windows, seen.epsilon, seen.window_share, seen.window_updates
        )
    noise_part = design = None
    floor = 0.0
    if stream is not None:
        noise_part = _noise_part(seen, stream)
        share = average_noise(seen.momentum) + (seen.window_share or 0.0)
        floor = math.sqrt(stream.noise * share)
        if seen.batch_size is not None:
            scatter = max(stream.mean_noise, _ordered(seen))
            design = scatter * max(seen.batch_size - 1, 0)
    if seen.batch is None:
        return Figures(
            start_weight=weight,
            stream=stream,
            noise_part=noise_part,
            stall_part=_stall_part(seen),
            design_effect=design,
        )
    clean = seen.past or seen.moving
    start_part = 0.0
    if seen.start is not None and weight is not None and not seen.past and weight < 1:
        clean = Statistics(
            debias(seen.moving.mean, seen.start.mean, weight),
            debias(seen.moving.variance, seen.start.variance, weight),
        )
        start_part = lag(clean, seen.moving, seen.epsilon)
    elif seen.updates == 0 and seen.is_initial:
        clean = seen.batch
        start_part = lag(seen.batch, seen.moving, seen.epsilon)
    rest = lag(seen.batch, clean, seen.epsilon)
    is_noise = rest <= NOISE_FACTOR * floor
    pair = (seen.batch, seen.past or seen.moving, seen.epsilon)
    return Figures(
        lag=lag(*pair),
        mean_shift=mean_shift(*pair),
        scale_ratio=scale_ratio(*pair),
        start_weight=weight,
        stream=stream,
        start_part=start_part,
        drift_part=0.0 if is_noise else math.sqrt(max(0.0, rest**2 - floor**2)),
        noise_part=noise_part,
        stall_part=_stall_part(seen),
        design_effect=design,
    )


def _ordered(seen: Evidence) -> float:
    """Variance that one batch's mean would need to explain a recurring pattern."""
    return (seen.recurrence or 0.0) / (seen.window_share or 1.0)


def _stall_part(seen: Evidence) -> float:
    """Lag that updates cannot mend, since rounding takes them away.

    A value `v` stays where it is if the update `(1 − m)·d` is below half its spacing,
    `v·eps/2`; so mean and variance may be off by `d = v·eps/(2·(1 − m))`.
    """
    if seen.precision is None or seen.momentum == 1:
        return 0.0
    share = seen.precision / 2 / (1 - seen.momentum)
    sigma2 = np.maximum(seen.moving.variance, 0) + seen.epsilon
    of_mean = np.square(seen.moving.mean) / sigma2
    return share * math.sqrt(float(np.mean(of_mean + 0.25)))


def _noise_part(seen: Evidence, stream: Stream) -> float:
    """Noise of the average; at an epoch's end with that of a small last batch.

    A last batch of `b` instead of `B` examples has `B/b` times the variance, and its
    own variance is too small by `σ²/b`; both enter with the weight `1 − m`.
    """
    squared = stream.average_noise(seen.momentum) ** 2
    if seen.batch_size and seen.last_batch_size:
        new = 1 - seen.momentum
        ratio = seen.batch_size / seen.last_batch_size
        squared += new**2 * stream.noise * ratio
        squared += (new * min(stream.mean_noise * ratio, 1.0) / 2) ** 2
    return math.sqrt(squared)


Rule = Callable[[Evidence, Figures], bool]


def _is_proven(seen: Evidence) -> bool:
    return seen.loss_gap is not None and seen.loss_gap >= GAP_LIMIT


def _is_refuted(seen: Evidence) -> bool:
    return seen.loss_gap is not None and seen.loss_gap < GAP_LIMIT


def _least(seen: Evidence) -> float:
    """Size that a mechanism must have to be named."""
    return seen.threshold * (PROVEN if _is_proven(seen) else 1.0)


def _non_finite(seen: Evidence, figures: Figures) -> bool:
    return not all(np.isfinite(part).all() for part in seen.moving)


def _unexpected_update(seen: Evidence, figures: Figures) -> bool:
    if (seen.trainable and not seen.is_pinned) or seen.is_still or not seen.updates:
        return False
    if _is_refuted(seen) or seen.start is None:
        return False
    # It moved, but only a move that matters is worth a word.
    return lag(seen.moving, seen.start, seen.epsilon) > _least(seen)


def _frozen(seen: Evidence, figures: Figures) -> bool:
    return not seen.trainable


def _not_updating(seen: Evidence, figures: Figures) -> bool:
    if not seen.is_still:
        return False
    return _is_proven(seen) or (seen.momentum == 1 and seen.is_initial)


def _inference_mode(seen: Evidence, figures: Figures) -> bool:
    return seen.is_still and seen.is_initial


def _pinned_on_purpose(seen: Evidence, figures: Figures) -> bool:
    # To statistics from elsewhere, as in transfer learning.
    return seen.is_still


def _tiny_batch(seen: Evidence, figures: Figures) -> bool:
    stream = figures.stream
    if stream is None:
        return False
    if seen.batch_size is not None and seen.batch_size <= TINY:
        return math.sqrt(stream.mean_noise) > seen.threshold
    # A dense layer sees one value a channel: no batch has any variance.
    variances = [window.variance for window in seen.windows]
    return bool(np.max(variances) <= seen.epsilon * 1e-3)


def _no_gap(seen: Evidence, figures: Figures) -> bool:
    return _is_refuted(seen)


def _low_precision(seen: Evidence, figures: Figures) -> bool:
    return figures.stall_part > _least(seen)


def _outliers(seen: Evidence, figures: Figures) -> bool:
    return figures.stream is not None and figures.stream.variation > VARIATION_LIMIT


def _correlated(seen: Evidence, figures: Figures) -> bool:
    if figures.stream is None or figures.design_effect is None:
        return False
    scatter = math.sqrt(max(figures.stream.mean_noise, seen.recurrence or 0.0))
    is_large = scatter > max(_least(seen), figures.start_part / 2)
    return figures.design_effect > DESIGN_LIMIT and is_large


def _replaced(seen: Evidence, figures: Figures) -> bool:
    return seen.are_weights_replaced


def _mixed_calls(seen: Evidence, figures: Figures) -> bool:
    # The moving statistics are right for no call, however well they follow.
    follows = max(figures.start_part, figures.drift_part) < seen.threshold
    return seen.has_mixed_calls and _is_proven(seen) and follows


def _dominant(cause: str) -> Rule:
    """The largest of three errors, if it is large enough to be named."""

    def applies(seen: Evidence, figures: Figures) -> bool:
        is_young = (figures.start_weight or 0.0) > FORGOTTEN
        causes = STATISTICAL if is_young else (NOISY, DRIFTING)
        parts = {each: _part(figures, each) for each in causes}
        return parts.get(cause, -1.0) == max(parts.values()) > _least(seen)

    return applies


def _always(seen: Evidence, figures: Figures) -> bool:
    return True


RULES: tuple[tuple[str, Rule], ...] = (
    (NON_FINITE, _non_finite),
    (UNEXPECTED_UPDATE, _unexpected_update),
    (HEALTHY, _frozen),
    (NOT_UPDATING, _not_updating),
    (INFERENCE_MODE, _inference_mode),
    (HEALTHY, _pinned_on_purpose),
    (TINY_BATCH, _tiny_batch),
    (HEALTHY, _no_gap),
    (LOW_PRECISION, _low_precision),
    (OUTLIERS, _outliers),
    (CORRELATED_BATCHES, _correlated),
    (WEIGHTS_REPLACED, _replaced),
    (MIXED_CALLS, _mixed_calls),
    (WARMING_UP, _dominant(WARMING_UP)),
    (NOISY, _dominant(NOISY)),
    (DRIFTING, _dominant(DRIFTING)),
    (HEALTHY, _always),
)
"""The first rule that applies decides.

Facts come first (not finite, frozen, never moved), then the loss gap, where it is
known: it clears a model of everything that is a matter of degree. Then what makes
batches themselves unfit, since no average of them can be right; last the three ways
in which an average of good batches is wrong, the largest of them.
"""


def _suggested_momentum(seen: Evidence, figures: Figures, cause: str) -> float | None:
    if cause == WARMING_UP:
        rule = suggest_momentum(seen.total_updates or seen.updates or 1)
        return min(rule, seen.momentum)
    if cause in (NOISY, DRIFTING) and figures.stream is not None:
        # A larger one would not have forgotten the start when training ends.
        total = seen.total_updates
        largest = 0.999 if not total else min(0.999, FORGOTTEN ** (1 / total))
        best = figures.stream.best_momentum(largest)
        is_better = best > seen.momentum if cause == NOISY else best < seen.momentum
        return best if is_better else None
    return None


def _advice(
    seen: Evidence, figures: Figures, cause: str, momentum: float | None
) -> str:
    set_momentum = "" if momentum is None else f"set momentum={momentum:.3g}"
    if cause == WARMING_UP:
        needed = updates_to_forget(seen.momentum, FORGOTTEN)
        return (
            f"{figures.start_weight:.0%} of the start values is still in the moving "
            f"statistics: momentum {seen.momentum:g} needs {needed} updates to forget "
            f"them and has had {seen.updates}. Recalibrate before export "
            "(`recalibrate(model, x)` or `RecalibrateBatchNorm`), debias for free "
            f"(`DebiasBatchNorm`), or {set_momentum}."
        )
    if cause == DRIFTING:
        smaller = f", or {set_momentum}" if set_momentum else ""
        return (
            "The weights move faster than the moving statistics follow. Recalibrate "
            "before export and before validation (`recalibrate(model, x)` or "
            "`RecalibrateBatchNorm(x, when='validation')`), let the learning rate fall "
            f"towards the end{smaller}."
        )
    if cause == NOISY:
        larger = (
            f"{set_momentum[0].upper()}{set_momentum[1:]}, use" if momentum else "Use"
        )
        rest = ""
        if seen.last_batch_size and seen.batch_size:
            rest = (
                f" The last batch of an epoch has {seen.last_batch_size:.0f} examples "
                f"instead of {seen.batch_size:.0f} and weighs as much: drop it "
                "(`drop_remainder=True`)."
            )
        return (
            f"The moving statistics fluctuate by {figures.noise_part:.2g} standard "
            f"deviations from sampling alone: momentum {seen.momentum:g} averages too "
            f"few batches. {larger} larger batches, and recalibrate before export "
            f"(`recalibrate(model, x)`).{rest}"
        )
    if cause == CORRELATED_BATCHES:
        return (
            f"Batches are no random sample{_scatter(seen, figures)}. Shuffle the "
            "examples before batching (padding counts too: pass a mask); no momentum "
            "helps. Until then recalibrate over shuffled data "
            "(`recalibrate(model, x)`)."
        )
    if cause == TINY_BATCH:
        size = "so few" if seen.batch_size is None else f"{seen.batch_size:.0f}"
        return (
            f"Batches of {size} examples have no useful statistics, and recalibration "
            "cannot repair what was trained with them. Use larger batches, or another "
            "normaliser (`GroupNormalization`, `LayerNormalization`)."
        )
    if cause == OUTLIERS:
        return (
            "Rare extreme examples dominate the variance, which differs wildly from "
            "batch to batch. Clean or clip the data; recalibrate only then."
        )
    return _PLAIN_ADVICE.get(cause, "").format(
        fix="Set a momentum below 1. " if seen.momentum == 1 else ""
    )


def _scatter(seen: Evidence, figures: Figures) -> str:
    if figures.design_effect is None or seen.batch_size is None:
        return ""
    return (
        f": their means vary {figures.design_effect:.0f} times as much as those of "
        f"shuffled batches of {seen.batch_size:.0f}"
    )


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
        "`trainable` counts only after `compile`, and in `fit` a functional model "
        "overrides `training=False`. Set `layer.trainable = False`, then `compile`."
    ),
    MIXED_CALLS: (
        "One step calls the layer several times on inputs with different statistics, "
        "and one average is right for none of them. Use a layer for each, or "
        "concatenate the inputs into one batch; recalibration helps in part."
    ),
    WEIGHTS_REPLACED: (
        "The weights were replaced after the statistics were collected (averaged or "
        "restored weights). Recalibrate after the swap (`recalibrate(model, x)`, or "
        "`RecalibrateBatchNorm` as the last callback)."
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

"""From what was seen of one layer to the cause of its lag."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bn_callbacks.statistics.advice import advise, suggested_momentum
from bn_callbacks.statistics.causes import (
    CORRELATED_BATCHES,
    DRIFTING,
    HEALTHY,
    INFERENCE_MODE,
    LOW_PRECISION,
    MIXED_CALLS,
    NOISY,
    NON_FINITE,
    NOT_UPDATING,
    OUTLIERS,
    REPLICAS_DIFFER,
    TINY_BATCH,
    UNEXPECTED_UPDATE,
    WARMING_UP,
    WEIGHTS_REPLACED,
)
from bn_callbacks.statistics.evidence import FORGOTTEN, Evidence, Figures, measure
from bn_callbacks.statistics.lag import lag

STATISTICAL = (WARMING_UP, NOISY, DRIFTING)
"""Three ways in which the average of good batches is wrong."""

DATA_CAUSES = (TINY_BATCH, OUTLIERS, CORRELATED_BATCHES)
"""Causes that lie in the batches, and so reach every layer."""

GAP_LIMIT = 1.4
"""Loss gap that proves a problem. Of 46 measured cases healthy ones reached 1.29, and
27 of 32 true problems exceeded 1.5 (CAUSES); this is the middle."""

PROVEN = 0.25
"""Share of the threshold that a mechanism must reach to explain a proven gap."""

DESIGN_LIMIT = 7.0
"""Design effect that proves grouped batches: random ones have 1, drift has reached
4.6, grouped ones began at 12 (CAUSES); this is the geometric middle of the latter."""

VARIATION_LIMIT = 3.0
"""Variation of batch variances that outliers cause: 7 with outliers, at most 1.4
elsewhere (CAUSES); this is the geometric middle."""

TINY = 2
"""Examples a batch up to which batch statistics are useless; nobody means them."""


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
    disagreement: float | None = None


def diagnose(evidence: Evidence) -> Diagnosis:
    """Names the cause of a layer's lag and what to do about it.

    Args:
        evidence: What was seen of the layer.

    Returns:
        The verdict, `"healthy"` unless a mechanism is seen to be at work.

    Examples:
        >>> import numpy as np
        >>> from bn_callbacks.statistics.moments import Statistics
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
    return _verdict(evidence, figures, _own_cause(evidence, figures))


def _verdict(evidence: Evidence, figures: Figures, cause: str) -> Diagnosis:
    momentum = suggested_momentum(evidence, figures, cause)
    stream = figures.stream
    return Diagnosis(
        cause=cause,
        advice=advise(evidence, figures, cause, momentum),
        lag=figures.lag,
        mean_shift=figures.mean_shift,
        scale_ratio=figures.scale_ratio,
        noise=figures.noise_part,
        start_weight=figures.start_weight,
        suggested_momentum=momentum,
        design_effect=figures.design_effect,
        batch_noise=None if stream is None else math.sqrt(stream.noise),
        batch_variation=None if stream is None else stream.variation,
        disagreement=figures.disagreement,
    )


def diagnose_model(evidence: Sequence[Evidence]) -> list[Diagnosis]:
    """Diagnoses all layers of a model, each in the light of the others.

    Bad batches reach every layer, where they look like noise or drift: such findings
    take the cause that another layer proves. And a loss gap that no layer explains
    means that the weights are not those the statistics were collected with.

    Args:
        evidence: What was seen of each layer.

    Returns:
        A verdict for each.
    """
    figures = [measure(seen) for seen in evidence]
    causes = list(map(_own_cause, evidence, figures))
    of_data = [cause for cause in causes if cause in DATA_CAUSES]
    if of_data:
        consequences = (NOISY, DRIFTING)
        causes = [of_data[0] if cause in consequences else cause for cause in causes]
    causes = _main_causes(evidence, figures, causes)
    is_proven = any(_is_proven(seen) for seen in evidence)
    if is_proven and all(cause == HEALTHY for cause in causes):
        causes = [
            WEIGHTS_REPLACED if seen.trainable and not seen.is_still else HEALTHY
            for seen in evidence
        ]
    return list(map(_verdict, evidence, figures, causes))


def _main_causes(
    evidence: Sequence[Evidence], figures: Sequence[Figures], causes: Sequence[str]
) -> list[str]:
    """Drops what was named only since a gap is proven, if something larger explains it.

    Of errors below the threshold only those of the same kind as the largest remain.
    """
    sizes = list(map(_part, figures, causes))
    largest = max(sizes, default=0.0)
    main = causes[sizes.index(largest)] if sizes else HEALTHY
    kept = []
    for seen, cause, size in zip(evidence, causes, sizes, strict=True):
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
    if stream is None or seen.windows is None:
        return False
    if seen.batch_size is not None and seen.batch_size <= TINY:
        return math.sqrt(stream.mean_noise) > seen.threshold
    # A dense layer sees one value a channel: no batch has any variance.
    return bool(np.max(seen.windows.variance) <= seen.epsilon * 1e-3)


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


def _replicas_differ(seen: Evidence, figures: Figures) -> bool:
    return (figures.disagreement or 0.0) > max(_least(seen), figures.own_noise)


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
    (REPLICAS_DIFFER, _replicas_differ),
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

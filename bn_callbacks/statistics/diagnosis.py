"""From what was seen of one layer to the cause of its lag.

The losses, where they are known, decide from which family a cause may come (`FAMILIES`
in `losses.py`); the rules below name one that is seen at work. What the losses prove,
though nothing shows how it came, is `stale` where recalibrating cures, and
`batch_dependent` where no fixed statistics will do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bn_callbacks.statistics.advice import advise, suggested_momentum
from bn_callbacks.statistics.causes import (
    BATCH_DEPENDENT,
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
    RESCALED_INPUTS,
    STALE,
    TINY_BATCH,
    UNEXPECTED_UPDATE,
    WARMING_UP,
    WEIGHTS_REPLACED,
)
from bn_callbacks.statistics.evidence import (
    Evidence,
    Figures,
    Measured,
    measure,
    ordered_effect,
    scatter_of_means,
)
from bn_callbacks.statistics.lag import lag
from bn_callbacks.statistics.losses import CAUSES_OF, Family

STATISTICAL = (WARMING_UP, NOISY, DRIFTING, STALE)
"""Ways in which the average of good batches is wrong."""

DATA_CAUSES = (TINY_BATCH, OUTLIERS, CORRELATED_BATCHES)
"""Causes that lie in the batches, and so reach every layer."""

# tests/benchmarks/limits.py measures what the limits lie between; docs/benchmarks.md
# has the figures.

PROVEN = 0.25
"""Share of the threshold that a mechanism must reach to explain a proven gap."""

DESIGN_LIMIT = 7.0
"""Design effect that proves grouped batches: random ones have 1, drift has reached
4.6, grouped ones began at 12; this is the geometric middle of the latter."""

APART_LIMIT = 2.5
"""Design effect that shows grouped batches where the losses have proven that no fixed
statistics will do, which drift does not bring about: random batches reach 2.5 at
most."""

CRIPPLING = 0.5
"""Standard deviations by which the means of batches, or replicas, must differ to be
named though the losses of a probe agree: a fifth of all variance is between them, and
is lost to whoever normalises with those of a batch."""

VARIATION_LIMIT = 3.0
"""Variation of batch variances that outliers cause: 7 with outliers, at most 1.5
elsewhere; this is the geometric middle."""

DOMINANCE_LIMIT = 20.0
"""Largest batch variance over a usual one that outliers cause: recordings whose
gains differ by a factor of 10 show 3 (`one_patient_a_batch` in tests/causes), a column
that is hardly ever other than 0 shows 30, wild values hundreds."""

FEW = 8
"""Examples a batch from which the variances of batches vary less than those of single
examples, by `1/sqrt(B)`; with fewer, outliers have to show so much more clearly."""

TINY = 2
"""Examples a batch up to which batch statistics are useless; nobody means them."""


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on one layer and the figures behind it."""

    cause: str
    advice: str = ""
    suggested_momentum: float | None = None
    figures: Figures = field(default_factory=Figures)


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
        >>> diagnosis.cause, round(diagnosis.figures.lag, 3)
        ('warming_up', 0.605)
    """
    (diagnosis,) = diagnose_model([evidence])
    return diagnosis


def diagnose_model(evidence: Sequence[Evidence]) -> list[Diagnosis]:
    """Diagnoses all layers of a model, each in the light of the others.

    Bad batches reach every layer, where they look like noise or drift: such findings
    take the cause that another layer proves. And where the losses prove something,
    though no layer shows how that came, that is what is said, and no more.

    Args:
        evidence: What was seen of each layer.

    Returns:
        A verdict for each.
    """
    measured = [measure(seen) for seen in evidence]
    causes = list(map(_own_cause, evidence, measured))
    of_data = [cause for cause in causes if cause in DATA_CAUSES]
    if of_data:
        causes = [
            _beside(of_data[0], seen, one, cause)
            for seen, one, cause in zip(evidence, measured, causes, strict=True)
        ]
    causes = _main_causes(evidence, measured, causes)
    if all(cause == HEALTHY for cause in causes):
        causes = _unexplained(evidence, measured)
    return list(map(_verdict, evidence, measured, causes))


def _verdict(evidence: Evidence, measured: Measured, cause: str) -> Diagnosis:
    momentum = suggested_momentum(evidence, measured, cause)
    advice = advise(evidence, measured, cause, momentum)
    return Diagnosis(cause, advice, momentum, measured.figures)


def _beside(of_data: str, seen: Evidence, measured: Measured, cause: str) -> str:
    """What a layer's own cause is, if bad batches are the cause elsewhere."""
    if cause in (NOISY, DRIFTING, STALE):
        return of_data
    is_minor = cause == WARMING_UP and measured.start_part <= seen.threshold
    return HEALTHY if is_minor else cause


def _main_causes(
    evidence: Sequence[Evidence], measured: Sequence[Measured], causes: Sequence[str]
) -> list[str]:
    """Drops what was named only since a gap is proven, if something larger explains it.

    Of errors below the threshold only those of the same kind as the largest remain.
    """
    sizes = list(map(_part, measured, causes))
    largest = max(sizes, default=0.0)
    main = causes[sizes.index(largest)] if sizes else HEALTHY
    kept = []
    for seen, cause, size in zip(evidence, causes, sizes, strict=True):
        is_minor = cause in STATISTICAL and size <= seen.threshold
        is_other = largest > seen.threshold or cause != main
        kept.append(HEALTHY if is_minor and is_other else cause)
    return kept


def _unexplained(
    evidence: Sequence[Evidence], measured: Sequence[Measured]
) -> list[str]:
    """What the losses alone prove, where no layer shows its cause.

    Stale statistics are stale: of the layers that training updates, those that are
    farthest from what they should be. Where no fixed statistics can do what those of
    batches do, and these differ more than random ones, they are no random sample; if
    they do not, the model depends on its batches, and why is not known.
    """
    sizes = [
        max(one.figures.residual or 0.0, one.figures.lag or 0.0)
        if seen.trainable and seen.is_called
        else -1.0
        for seen, one in zip(evidence, measured, strict=True)
    ]
    farthest = max(sizes, default=-1.0)
    is_apart = any(map(_is_apart, evidence, measured))
    of_batches = CORRELATED_BATCHES if is_apart else BATCH_DEPENDENT
    named = {
        Family.STALE: STALE,
        Family.BATCHES: of_batches,
    }
    if any(map(_is_witness, evidence, measured)):
        # Inference brings the layers what they store, or they would be stale.
        named |= {Family.LIKELY: of_batches, Family.UNCLEAR: of_batches}
    causes = []
    for seen, size in zip(evidence, sizes, strict=True):
        is_meant = size >= max(farthest / 2, 0.0)
        causes.append(named.get(seen.family, HEALTHY) if is_meant else HEALTHY)
    return causes


def _is_apart(seen: Evidence, measured: Measured) -> bool:
    """Whether batches differ more than random ones."""
    effects = (measured.figures.design_effect, seen.probe_effect)
    return max(effect or 0.0 for effect in effects) > APART_LIMIT


def _part(measured: Measured, cause: str) -> float:
    """Size of the error that a statistical cause accounts for."""
    return {
        WARMING_UP: measured.start_part,
        NOISY: measured.noise_part,
        DRIFTING: measured.drift_part,
        STALE: measured.rest_part,
    }.get(cause, 0.0)


Rule = Callable[[Evidence, Measured], bool]


FAR = 1.0
"""Lag, in standard deviations, that is a witness of its own where losses are unclear:
every activation is off by as much as it varies."""

LARGE = 0.5
"""Lag that is a witness beside a small gap that recalibrating surely closes."""


def _is_witness(seen: Evidence, measured: Measured) -> bool:
    """Whether the lag tells what losses that few batches make do not prove."""
    part = max(measured.rest_part, measured.start_part)
    least = {
        Family.LIKELY: seen.threshold,
        Family.SLIGHT: max(LARGE, seen.threshold),
        Family.UNCLEAR: max(FAR, seen.threshold),
    }
    return part > least.get(seen.family, math.inf)


def _own_cause(seen: Evidence, measured: Measured) -> str:
    is_witness = _is_witness(seen, measured)
    allowed = CAUSES_OF[Family.UNKNOWN if is_witness else seen.family]
    return next(
        cause
        for cause, applies in RULES
        if (cause == HEALTHY or cause in allowed) and applies(seen, measured)
    )


def _is_proven(seen: Evidence) -> bool:
    return seen.family in (Family.STALE, Family.BATCHES)


def _is_without_gap(seen: Evidence) -> bool:
    return seen.family in (Family.INNOCENT, Family.ADAPTED, Family.SLIGHT)


def _least(seen: Evidence) -> float:
    """Size that a mechanism must have to be named."""
    return seen.threshold * (PROVEN if _is_proven(seen) else 1.0)


def _uncalled(seen: Evidence, measured: Measured) -> bool:
    return not seen.is_called


def _non_finite(seen: Evidence, measured: Measured) -> bool:
    return not all(np.isfinite(part).all() for part in seen.moving)


def _unexpected_update(seen: Evidence, measured: Measured) -> bool:
    if (seen.trainable and not seen.is_pinned) or seen.is_still or not seen.updates:
        return False
    # New layers have nothing to keep, and nobody is harmed if they learn it.
    if seen.start is None or (seen.is_initial and _is_without_gap(seen)):
        return False
    # It moved, but only a move that matters is worth a word.
    return lag(seen.moving, seen.start, seen.epsilon) > _least(seen)


def _frozen(seen: Evidence, measured: Measured) -> bool:
    return not seen.trainable


def _impossible(seen: Evidence, measured: Measured) -> bool:
    # No batch has a negative variance, so no average of batches has one.
    return bool((seen.moving.variance < -seen.epsilon * 1e-3).any())


def _not_updating(seen: Evidence, measured: Measured) -> bool:
    if not seen.is_still:
        return False
    uses_batches = _is_proven(seen) or (seen.is_initial and bool(seen.trains))
    return uses_batches or (seen.momentum == 1 and seen.is_initial)


def _inference_mode(seen: Evidence, measured: Measured) -> bool:
    if not (seen.is_still and seen.is_initial):
        return False
    # A layer that does something of its own in training mode may use batches or not.
    return not seen.trains and not seen.is_opaque


def _pinned_on_purpose(seen: Evidence, measured: Measured) -> bool:
    # To statistics from elsewhere, as in transfer learning.
    return seen.is_still


def _tiny_batch(seen: Evidence, measured: Measured) -> bool:
    stream = measured.stream
    if stream is None or seen.windows is None:
        return False
    if _is_tiny(seen):
        # In its mean or in its scale: examples may differ in loudness alone.
        return math.sqrt(stream.noise) > seen.threshold
    # A dense layer sees one value a channel: no batch has any variance.
    return bool(np.max(seen.windows.variance) <= seen.epsilon * 1e-3)


def _rescaled(seen: Evidence, measured: Measured) -> bool:
    # Proven by the data, mapped back, for all layers at once.
    is_off = (measured.figures.lag or 0.0) > _least(seen)
    return seen.input_map is not None and is_off and measured.start_part < _least(seen)


def _low_precision(seen: Evidence, measured: Measured) -> bool:
    return measured.stall_part > _least(seen)


def _is_tiny(seen: Evidence) -> bool:
    return seen.batch_size is not None and seen.batch_size <= TINY


def _outliers(seen: Evidence, measured: Measured) -> bool:
    # One example's variance may be many times another's: it takes a batch of several
    # to call that wild, the more so the fewer they are.
    if _is_tiny(seen):
        return False
    few = math.sqrt(max(1.0, FEW / (seen.batch_size or FEW)))
    if measured.dominance > DOMINANCE_LIMIT * few**2:
        return True
    return (measured.figures.batch_variation or 0.0) > VARIATION_LIMIT * few


def _correlated(seen: Evidence, measured: Measured) -> bool:
    scatter = scatter_of_means(seen, measured.stream)
    if _is_without_gap(seen) and scatter < CRIPPLING:
        return False
    effect = measured.figures.design_effect or 0.0
    if _is_refuted(seen):
        effect = ordered_effect(seen)
    elif seen.is_grouped:
        return True
    is_large = scatter > max(_least(seen), measured.start_part / 2)
    return effect > DESIGN_LIMIT and is_large


def _is_refuted(seen: Evidence) -> bool:
    """Whether a probe shows that it is not the batches which differ.

    Weights that leap from step to step shift the means of batches as grouped examples
    do. Through a probe the weights rest: if its batches differ no more than random
    ones, and fixed statistics will do for all of them, it was the weights. What recurs
    in each epoch is no leap, though, and stands: a probe may be of one group alone.
    """
    if seen.probe_effect is None or seen.family is Family.BATCHES:
        return False
    return seen.probe_effect <= APART_LIMIT


def _replicas_differ(seen: Evidence, measured: Measured) -> bool:
    apart = measured.figures.disagreement or 0.0
    if _is_without_gap(seen) and apart < CRIPPLING:
        return False
    return apart > max(_least(seen), measured.own_noise)


def _replaced(seen: Evidence, measured: Measured) -> bool:
    return seen.are_weights_replaced


def _touched(seen: Evidence, measured: Measured) -> bool:
    return seen.is_touched and _rest(seen, measured)


def _mixed_calls(seen: Evidence, measured: Measured) -> bool:
    if not seen.has_mixed_calls:
        return False
    if seen.family is not Family.STALE:
        return seen.family is Family.BATCHES
    # The averages follow the calls of training, and inference makes others.
    error = max(measured.start_part, measured.rest_part)
    residual = measured.figures.residual or 0.0
    return error < _least(seen) < residual


def _dominant(cause: str) -> Rule:
    """The largest of the errors whose cause is seen, if it is large enough."""

    def applies(seen: Evidence, measured: Measured) -> bool:
        if _is_consistent(seen, measured):
            return False
        parts = {each: _part(measured, each) for each in (WARMING_UP, NOISY, DRIFTING)}
        return (
            parts[cause]
            == max(parts.values())
            > max(_least(seen), measured.rest_part / SEEN)
        )

    return applies


SEEN = 4.0
"""How many times a seen error a distance may be for that error to explain it: it is 1
where the start or drift is the cause, and far more where an average is off though
nothing moves (tests/benchmarks/limits.py)."""


def _rest(seen: Evidence, measured: Measured) -> bool:
    return measured.rest_part > _least(seen) and not _is_consistent(seen, measured)


def _is_consistent(seen: Evidence, measured: Measured) -> bool:
    """Whether inference brings the layer what it stores: nothing is stale then."""
    residual = measured.figures.residual
    return residual is not None and residual <= _least(seen)


def _always(seen: Evidence, measured: Measured) -> bool:
    return True


RULES: tuple[tuple[str, Rule], ...] = (
    (HEALTHY, _uncalled),
    (NON_FINITE, _non_finite),
    (UNEXPECTED_UPDATE, _unexpected_update),
    (HEALTHY, _frozen),
    (STALE, _impossible),
    (NOT_UPDATING, _not_updating),
    (INFERENCE_MODE, _inference_mode),
    (HEALTHY, _pinned_on_purpose),
    (TINY_BATCH, _tiny_batch),
    (RESCALED_INPUTS, _rescaled),
    (LOW_PRECISION, _low_precision),
    (REPLICAS_DIFFER, _replicas_differ),
    (STALE, _touched),
    (OUTLIERS, _outliers),
    (CORRELATED_BATCHES, _correlated),
    (WEIGHTS_REPLACED, _replaced),
    (MIXED_CALLS, _mixed_calls),
    (WARMING_UP, _dominant(WARMING_UP)),
    (NOISY, _dominant(NOISY)),
    (DRIFTING, _dominant(DRIFTING)),
    (STALE, _rest),
    (HEALTHY, _always),
)
"""Of the causes that the family allows, the first whose rule applies.

Facts come first (never called, not finite, frozen, never moved), then what makes
batches themselves unfit, since no average of them can be right; last the ways in which
an average of good batches is wrong, the largest of them. Innocent BN has no cause but a
fact.
"""

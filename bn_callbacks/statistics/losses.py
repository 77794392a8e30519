"""Three losses on the same examples, and the family of causes that they prove.

**B** is the loss with the statistics of batches, as training makes them; **I** that in
inference mode, with the statistics that are stored; **R** that in inference mode with
the statistics that these very examples have. Everything but BN is in inference mode in
all three. `FAMILIES` is the table that says what each pattern means.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

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

# tests/benchmarks/limits.py measures what each limit lies between, here and elsewhere;
# docs/benchmarks.md has the figures.

GAP_LIMIT = 1.4
"""`I/B` that proves a problem. Of 46 small trainings healthy ones reached 1.29, and 27
of 32 true problems exceeded 1.5; this is the middle."""

STALE_LIMIT = 1.34
"""`I/R` that proves stale statistics: of 57 small trainings healthy ones reached 1.28,
stale ones began at 1.4; this is the geometric middle."""

BATCH_LIMIT = 2.0
"""`R/B` from which no fixed statistics can do what those of batches do: healthy models
have reached 1.24, stale ones 1.0, bad batches began at 4; the geometric middle of 1.24
and 4 is 2.2."""

SLIGHT_LIMIT = 1.05
"""`I/R` and `I/B` that are worth a word beside a large lag. Early in training all three
losses are near chance, and their ratios near 1, while accuracy is lost."""

HARM_LIMIT = 1.25
"""`R/I` from which recalibrating would harm, which healthy models reach and those with
BN switched off exceed many times. It makes no finding by itself."""

STANDARD_ERRORS = 3.0
"""Standard errors that a difference must exceed as well: of 57 small trainings a
healthy one has shown a gap of 1.53 at 2.5 of them."""

LIKELY_LIMIT = 10.0
"""`I/B` that is no chance beside a lag, though few batches make it: those that a
classifier gets wrong may have losses of thousands, and too large a standard error."""

LONELY_LIMIT = 2.5
"""Least ratio that counts where a single batch leaves no standard error: of healthy
models single batches have reached 2.2."""


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of each batch of a sample, in three modes.

    Args:
        batch: B of each batch, of shape `(batches,)`.
        inference: I of each batch.
        recalibrated: R of each batch; None where it was not measured.
        weights: Number of examples in each batch.

    Examples:
        >>> losses = Losses.of([1.0, 1.2, 1.1], [2.9, 3.1, 3.0], [1.0, 1.2, 1.1])
        >>> round(losses.gap, 2), losses.family.name
        (2.73, 'STALE')
    """

    batch: NDArray[np.float64]
    inference: NDArray[np.float64]
    recalibrated: NDArray[np.float64] | None
    weights: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        batch: ArrayLike,
        inference: ArrayLike,
        recalibrated: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Losses:
        """From anything like arrays; all batches weigh the same by default."""
        b, i = np.asarray(batch, np.float64), np.asarray(inference, np.float64)
        r = None if recalibrated is None else np.asarray(recalibrated, np.float64)
        w = np.ones(len(b)) if weights is None else np.asarray(weights, np.float64)
        return cls(b, i, r, w)

    def mean(self, name: str) -> float | None:
        """The loss over all examples: of `"batch"`, `"inference"`, `"recalibrated"`."""
        values = getattr(self, name)
        if values is None:
            return None
        with np.errstate(all="ignore"):
            return float(self.weights @ values / self.weights.sum())

    @property
    def gap(self) -> float | None:
        """`I/B`; None where losses are not positive, as a ratio means nothing then."""
        return self.ratio("inference", "batch")

    def ratio(self, upper: str, lower: str) -> float | None:
        """One loss over another; None if one is unknown, or the lower not positive."""
        above, below = self.mean(upper), self.mean(lower)
        if above is None or below is None or not below > 0:
            return None
        return above / below

    def exceeds(self, upper: str, lower: str, limit: float) -> bool:
        """Whether one loss is so many times another, and surely larger.

        The difference `d_b` of each batch, with weights `w_b = n_b/Σn`, has the mean
        `D = Σw·d` and the standard error `sqrt(K/(K−1)·Σw²·(d − D)²)`: paired, so
        that what makes batches differ in both modes does not count.

        Args:
            upper: The name of the loss that should be larger.
            lower: The name of the other.
            limit: The ratio that counts.

        Returns:
            Whether the ratio reaches `limit` and the difference is more than 3
            standard errors. A loss that is no number exceeds every number.
        """
        above, below = self.mean(upper), self.mean(lower)
        if above is None or below is None or not math.isfinite(below):
            return False
        if not math.isfinite(above):
            return True
        if not (below > 0 and above >= limit * below):
            return False
        if len(self.weights) == 1:
            return above >= max(limit, LONELY_LIMIT) * below
        error = self._standard_error(getattr(self, upper) - getattr(self, lower))
        return above - below > STANDARD_ERRORS * error

    def _standard_error(self, differences: NDArray[np.float64]) -> float:
        share = self.weights / self.weights.sum()
        apart = differences - share @ differences
        count = len(differences)
        return math.sqrt(count / (count - 1) * float(np.square(share * apart).sum()))

    @property
    def family(self) -> Family:
        """What the three losses prove: the first row of `FAMILIES` that fits."""
        return next(row.family for row in FAMILIES if row.fits(self))


class Family(enum.Enum):
    """What three losses say of BN; from each a different kind of remedy follows."""

    UNKNOWN = "no losses are known"
    INNOCENT = "BN is innocent"
    STALE = "the statistics are stale: recalibrating cures"
    HELPED = "the gap is small, and still recalibrating helps"
    BATCHES = "no fixed statistics can do what those of batches do"
    ADAPTED = "recalibrating would harm: the weights have adapted to what is stored"
    LIKELY = "there is a large gap, though few batches make it: the lag decides"
    UNCLEAR = "there is a gap, but so few batches prove none"
    SLIGHT = "there is a small gap that recalibrating closes: a large lag decides"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        family: What it proves.
        fits: Whether some losses show it.
        causes: The causes that may be named then, and no others.
    """

    family: Family
    fits: Callable[[Losses], bool]
    causes: frozenset[str]


def _no_ratio(seen: Losses) -> bool:
    """Nothing to judge by: not measured, not positive, or no number in batches."""
    low = seen.mean("batch")
    return low is None or not (low > 0 and math.isfinite(low))


def _stale(seen: Losses) -> bool:
    """I ≫ R ≈ B: or R so much nearer to B that it explains most of the gap."""
    if seen.exceeds("recalibrated", "batch", BATCH_LIMIT):
        return False
    if not seen.exceeds("inference", "batch", GAP_LIMIT):
        return False
    if seen.exceeds("inference", "recalibrated", STALE_LIMIT):
        return True
    stale = seen.ratio("inference", "recalibrated")
    unfit = seen.ratio("recalibrated", "batch")
    return stale is None or unfit is None or stale >= unfit


def _helped(seen: Losses) -> bool:
    """R < I ≈ B."""
    if seen.exceeds("recalibrated", "batch", BATCH_LIMIT):
        return False
    return seen.exceeds("inference", "recalibrated", STALE_LIMIT)


def _batches(seen: Losses) -> bool:
    """R ≫ B, whatever I: unless I ≈ B ≪ R, where nothing is wrong as it is."""
    if not seen.exceeds("recalibrated", "batch", BATCH_LIMIT):
        return seen.exceeds("inference", "batch", GAP_LIMIT)
    is_well = not seen.exceeds("inference", "batch", GAP_LIMIT)
    return not (is_well and seen.exceeds("recalibrated", "inference", HARM_LIMIT))


def _adapted(seen: Losses) -> bool:
    """R ≫ I; whose weights have adapted does no worse in inference than in batches."""
    return not _likely(seen) and seen.exceeds("recalibrated", "inference", HARM_LIMIT)


def _likely(seen: Losses) -> bool:
    """I ≫ B, though chance may do it: what the lag shows stands."""
    gap = seen.ratio("inference", "batch")
    return gap is not None and gap >= LIKELY_LIMIT


def _unclear(seen: Losses) -> bool:
    """I > B, though chance may do it: what windows prove by themselves stands."""
    gap = seen.ratio("inference", "batch")
    return gap is not None and gap > GAP_LIMIT


def _slight(seen: Losses) -> bool:
    """I > R ≈ B, by little and for sure: what a large lag shows stands."""
    from_batch = seen.exceeds("inference", "batch", SLIGHT_LIMIT)
    return from_batch and seen.exceeds("inference", "recalibrated", SLIGHT_LIMIT)


STALE_CAUSES = frozenset(
    {
        WARMING_UP,
        DRIFTING,
        NOISY,
        WEIGHTS_REPLACED,
        NOT_UPDATING,
        LOW_PRECISION,
        NON_FINITE,
        UNEXPECTED_UPDATE,
        REPLICAS_DIFFER,
        OUTLIERS,
        TINY_BATCH,
        RESCALED_INPUTS,
        STALE,
        # The windows of training prove these by themselves: a sample that is one
        # stretch of a drifting series, or goes through one of several calls only,
        # shows too small an R.
        CORRELATED_BATCHES,
        MIXED_CALLS,
    }
)
BATCH_CAUSES = frozenset(
    {
        BATCH_DEPENDENT,
        CORRELATED_BATCHES,
        MIXED_CALLS,
        TINY_BATCH,
        OUTLIERS,
        RESCALED_INPUTS,
        NON_FINITE,
        # Replicas whose shares differ are batches that differ.
        REPLICAS_DIFFER,
        UNEXPECTED_UPDATE,
    }
)
FACTS = frozenset(
    {
        NON_FINITE,
        # Losses that agree do not refute these: where they are the same in all three
        # modes, training itself may be crippled, and what a frozen layer has lost may
        # be of use for other data. The rules ask for more where no gap is proven.
        CORRELATED_BATCHES,
        REPLICAS_DIFFER,
        UNEXPECTED_UPDATE,
    }
)
"""Causes that training proves by itself, whatever the losses of a probe."""

ADAPTED_CAUSES = FACTS | {INFERENCE_MODE, TINY_BATCH}
ALL_CAUSES = STALE_CAUSES | BATCH_CAUSES | ADAPTED_CAUSES

FAMILIES = (
    #   seen                         what may be the cause
    Row(Family.UNKNOWN, _no_ratio, ALL_CAUSES),
    Row(Family.STALE, _stale, STALE_CAUSES),
    Row(Family.HELPED, _helped, STALE_CAUSES),
    Row(Family.BATCHES, _batches, BATCH_CAUSES),
    Row(Family.ADAPTED, _adapted, ADAPTED_CAUSES),
    Row(Family.LIKELY, _likely, FACTS),
    Row(Family.UNCLEAR, _unclear, FACTS),
    Row(Family.SLIGHT, _slight, FACTS),
    Row(Family.INNOCENT, lambda seen: True, FACTS),
)
"""The first row that fits decides. Remedies: nothing for innocent BN; recalibrate stale
statistics, and do what prevents it next time; change the batches or the layer where no
fixed statistics will do; leave alone what weights have adapted to."""

CAUSES_OF = {row.family: row.causes for row in FAMILIES}
"""The causes that may be named in each family."""

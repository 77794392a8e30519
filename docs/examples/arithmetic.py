"""Ways of turning batch statistics into population statistics, and what each gives.

    python docs/examples/arithmetic.py

The formulas are those that docs/comparison.md names, written anew in NumPy; none of the
libraries is needed. Every row uses data whose mean and variance are known.
"""

import numpy as np

from bn_callbacks.statistics.moments import Moments, pool
from bn_callbacks.statistics.moving_average import start_weight

rng = np.random.default_rng(0)


def squares_minus_square(batches):
    """E[x²] − E[x]² in float32, combined as running means."""
    mean = square = np.float32(0)
    seen = 0
    for batch in (each.astype(np.float32) for each in batches):
        seen += len(batch)
        share = np.float32(len(batch) / seen)
        center, spread = batch.mean(), batch.var()
        mean += (center - mean) * share
        square += (center * center + spread - square) * share
    return float(square - mean * mean)


def mean_of_variances(batches, ddof=0):
    """Every batch weighs the same; what differs between batches is lost."""
    return float(np.mean([batch.var(ddof=ddof) for batch in batches]))


def pooled(batches):
    """Counts, means and squared deviations merged, in float64."""
    parts = [Moments.from_values(batch[:, None]) for batch in batches]
    return float(pool(parts).variance[0])


def inverted_average(batch_means):
    """A moving average whose old value weighs 1/(k + 1) at step k, from 0."""
    moving = 0.0
    for k, mean in enumerate(batch_means):
        keep = 1 / (k + 1)
        moving = keep * moving + (1 - keep) * mean
    return moving


def show(name, value, truth):
    print(f"{name:46}{value:12.4g}   truth {truth:.4g}")


far = [rng.normal(1e4, 1, 256) for _ in range(20)]
truth = float(np.concatenate(far).var())
show("mean 1e4, σ 1: E[x²] − E[x]², float32", squares_minus_square(far), truth)
show("mean 1e4, σ 1: pooled", pooled(far), truth)

groups = [rng.normal(center, 1, 64) for center in rng.normal(0, 5, 200)]
truth = float(np.concatenate(groups).var())
show("groups of σ 1, centres of σ 5: mean", mean_of_variances(groups), truth)
show("groups of σ 1, centres of σ 5: pooled", pooled(groups), truth)

pairs = list(rng.normal(0, 1, (4000, 2)))
truth = float(np.concatenate(pairs).var())
show("batches of 2: mean, biased", mean_of_variances(pairs), truth)
show("batches of 2: mean, unbiased", mean_of_variances(pairs, ddof=1), truth)
show("batches of 2: pooled", pooled(pairs), truth)

uneven = [*rng.normal(0, 1, (9, 1000)), rng.normal(0, 10, 10)]
truth = float(np.concatenate(uneven).var())
show("last batch of 10, σ 10: mean", mean_of_variances(uneven), truth)
show("last batch of 10, σ 10: pooled", pooled(uneven), truth)

ramp = np.arange(1.0, 101.0)
show("means 1 to 100: old value weighs 1/(k + 1)", inverted_average(ramp), ramp.mean())

means = rng.normal(3, 1, (50, 64)).mean(axis=1)
show("50 batches, divided by 100", means.sum() / 100, means.mean())

for steps in (16, 100):
    share = start_weight(0.99, steps)
    show(f"{steps} steps, momentum 0.99: weight of 0 and 1", share, 0)

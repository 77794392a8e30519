"""What was measured on both sides of each limit of the diagnosis.

    python tests/benchmarks/limits.py [--only GAP_LIMIT ...]
                                      [--markdown docs/benchmarks.md]

The cases are some of tests/causes: each is trained once under a monitor with a probe,
or audited, and every figure that a limit is for is read from what has been seen there.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "causes"))

from cluster import add_devices

# Before anything uses TensorFlow: for the cases with several replicas.
add_devices()

import kit  # noqa: E402
import numpy as np  # noqa: E402
from audits import audits  # noqa: E402
from cases import CASES  # noqa: E402
from page import Section, new_parser, table  # noqa: E402
from probe import twins  # noqa: E402

from bn_callbacks.layers import facts, find, read  # noqa: E402
from bn_callbacks.measuring import probe as probes  # noqa: E402
from bn_callbacks.measuring.consistent import known, lags  # noqa: E402
from bn_callbacks.measuring.data import Batches  # noqa: E402
from bn_callbacks.measuring.one_pass import Population  # noqa: E402
from bn_callbacks.statistics import affine, diagnosis, evidence, losses  # noqa: E402
from bn_callbacks.statistics.evidence import Evidence, Measured, measure  # noqa: E402
from bn_callbacks.statistics.moments import Statistics  # noqa: E402
from bn_callbacks.statistics.moving_average import window_noise  # noqa: E402
from bn_callbacks.watching import warning_filter  # noqa: E402


class Seen(NamedTuple):
    """What the monitor of a training had seen at its end, of each layer."""

    watch: Any
    each: list[tuple[Evidence, Measured]]

    @property
    def losses(self) -> losses.Losses:
        return self.watch._probe_result.losses


@functools.cache
def trained(name: str) -> Seen:
    """A case, trained under a monitor."""
    case = next(case for case in CASES if case.name == name)
    made = kit.build(case)
    monitor = kit.Listening(probe=made.probe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit([monitor])
    watch = monitor._watch
    return Seen(watch, [(seen, measure(seen)) for seen in watch.evidence])


def ratio(upper: str, lower: str) -> Callable[[str], float]:
    return lambda name: trained(name).losses.ratio(upper, lower) or np.nan


def of_a_batch(pick: Callable[[Any], Any]) -> Callable[[str], float]:
    """The largest, or the smallest, gap of any single batch of the probe."""

    def figure(name: str) -> float:
        seen = trained(name).losses
        return float(pick(seen.inference / seen.batch))

    return figure


def largest(figure: Callable[[Evidence, Measured], float | None]) -> Any:
    """Of all layers."""
    return lambda name: max(figure(*one) or 0.0 for one in trained(name).each)


def first(figure: Callable[[Evidence, Measured], float | None]) -> Any:
    """Of the first layer, which no other comes before."""
    return lambda name: figure(*trained(name).each[0]) or 0.0


def worst(figure: Callable[[Evidence, Measured], float]) -> Any:
    """Of the layer that lags most."""

    def of(name: str) -> float:
        each = trained(name).each
        return figure(*max(each, key=lambda one: one[1].figures.lag or 0.0))

    return of


def drift_share(seen: Evidence, measured: Measured) -> float:
    """What drift accounts for, of what neither start nor noise explains."""
    drift = measured.stream.drift_lag(seen.momentum) if measured.stream else 0.0
    return drift / measured.rest_part if measured.rest_part else 0.0


def unexplained(seen: Evidence, measured: Measured) -> float:
    """The distance over the largest error that is seen."""
    parts = measured.start_part, measured.noise_part, measured.drift_part
    return measured.rest_part / max(*parts, 1e-9)


def corrected(seen: Evidence, measured: Measured) -> float | None:
    """Variance of means by windows, over that by single batches."""
    if measured.stream is None or not seen.scatter or not seen.scatter.mean:
        return None
    return measured.stream.mean_noise / seen.scatter.mean


def at_rest(figure: Callable[[Evidence, Measured], float], pick: Any) -> Any:
    """Of windows that do not drift, of 200 seeds, and an average that is off by 1."""

    def of(name: str) -> float:
        return float(pick([figure(*at_rest_and_off(seed)) for seed in range(200)]))

    return of


def at_rest_and_off(seed: int) -> tuple[Evidence, Measured]:
    momentum, updates, examples = 0.99, 10, 32
    share = window_noise(momentum, updates)
    means = np.random.default_rng(seed).normal(size=(16, 8)) * np.sqrt(share / examples)
    seen = Evidence(
        "bn",
        momentum=momentum,
        epsilon=1e-3,
        moving=Statistics(np.ones(8), np.ones(8)),
        batch=Statistics(means[-1], np.ones(8)),
        windows=Statistics(means, np.ones_like(means)),
        window_updates=updates,
        window_share=share,
        batch_size=float(examples),
    )
    return seen, measure(seen)


def change_of_weights(name: str) -> float:
    """How far the weights were from those of the last step when training had ended."""
    watch = trained(name).watch
    before, now = map(np.concatenate, (watch._weights, watch._fingerprint()))
    return float(np.linalg.norm(now - before) / np.linalg.norm(before))


def unsolved(name: str) -> float:
    """What is left when the probe has been run as one batch."""
    case = next(case for case in CASES if case.name == name)
    made = kit.build(case)
    return left(made.model, Batches(made.probe, batch_size=made.batch_size))


def unsolved_twins(name: str) -> float:
    """The same of a network whose layers are called twice."""
    x = np.random.default_rng(0).normal(1, 1, (512, 64)).astype("float32")
    return left(twins(), Batches(x, batch_size=32))


def left(model: Any, batches: Batches) -> float:
    layers = find(model)
    solver = Population(model, layers)
    given = probes._solved(solver, batches, read(layers))
    assert given is not None
    return known(lags(layers, solver.measure(batches, given).moments, given)) or 0.0


def spread(name: str) -> float:
    """Relative spread of the channels' ratios at the first layer, in an audit."""
    case = next(case for case in audits if case.name == name)
    given = case.made()
    layers = find(given.model)
    (x, _), stored = given.data, read(layers)
    seen = Population(given.model, layers).measure(Batches(x), stored)
    scales = np.sqrt(seen.moments[0].variance / stored[0].variance)
    return float(np.sqrt(np.mean(np.square(scales / np.median(scales) - 1))))


WELL = ("long_healthy_regression", "overfitting")
SILENT = ("long_healthy_regression", "short_run_on_standardised_data", "overfitting")
STALE = ("short_regression", "memory_longer_than_progress", "optimizer_ema")
GROUPED = ("one_session_a_batch", "two_datasets_in_turn")
MIXED = ("one_layer_for_three_sensors",)
DEPENDENT = ("places_among_the_documents_of_a_query",)
WILD = ("a_few_wild_rows",)
DRIFTING = ("memory_longer_than_progress", "high_learning_rate")
OFF_BY_ONE = ("windows at rest, an average off by 1",)
OFF = ("train_step_without_training",)


class Limit(NamedTuple):
    """A constant, and the figures that it lies between.

    Attributes:
        where: The module that declares it.
        name: What it is called there.
        what: The figure that it limits.
        below: The figure of a case that must not reach it, and such cases.
        above: The same of those that must.
    """

    where: Any
    name: str
    what: str
    below: tuple[Callable[[str], float], tuple[str, ...]]
    above: tuple[Callable[[str], float], tuple[str, ...]]


def limit(
    where: Any,
    name: str,
    what: str,
    figure: Callable[[str], float],
    below: tuple[str, ...],
    above: tuple[str, ...],
) -> Limit:
    return Limit(where, name, what, (figure, below), (figure, above))


design = largest(lambda seen, measured: measured.figures.design_effect)
LIMITS = (
    limit(losses, "GAP_LIMIT", "I/B", ratio("inference", "batch"), SILENT, STALE),
    limit(
        losses, "STALE_LIMIT", "I/R", ratio("inference", "recalibrated"), WELL, STALE
    ),
    limit(
        losses,
        "BATCH_LIMIT",
        "R/B",
        ratio("recalibrated", "batch"),
        SILENT + STALE,
        GROUPED + MIXED + DEPENDENT,
    ),
    limit(losses, "HARM_LIMIT", "R/I", ratio("recalibrated", "inference"), SILENT, OFF),
    Limit(
        losses,
        "LONELY_LIMIT",
        "I/B of any one batch",
        (of_a_batch(np.max), SILENT),
        (of_a_batch(np.min), ("high_learning_rate", "one_session_a_batch")),
    ),
    limit(
        diagnosis,
        "LARGE",
        "lag beside a small gap",
        largest(lambda seen, measured: measured.figures.lag),
        SILENT,
        ("ten_classes_near_chance",),
    ),
    limit(diagnosis, "DESIGN_LIMIT", "design effect", design, SILENT + STALE, GROUPED),
    limit(
        diagnosis,
        "APART_LIMIT",
        "design effect where R ≫ B",
        largest(lambda seen, measured: seen.probe_effect),
        SILENT + DEPENDENT,
        GROUPED,
    ),
    limit(
        diagnosis,
        "VARIATION_LIMIT",
        "variation of a batch's variances",
        largest(lambda seen, measured: measured.figures.batch_variation),
        SILENT + STALE + GROUPED,
        WILD,
    ),
    limit(
        diagnosis,
        "DOMINANCE_LIMIT",
        "largest variance of a batch over a usual one",
        largest(lambda seen, measured: measured.dominance),
        SILENT + STALE + GROUPED,
        WILD,
    ),
    Limit(
        evidence,
        "DRIFT_SHARE",
        "drift over an unexplained distance",
        (at_rest(drift_share, np.max), OFF_BY_ONE),
        (worst(drift_share), DRIFTING),
    ),
    Limit(
        diagnosis,
        "SEEN",
        "distance over the error that is seen",
        (worst(unexplained), ("short_regression", *DRIFTING)),
        (at_rest(unexplained, np.min), OFF_BY_ONE),
    ),
    Limit(
        evidence,
        "CORRECTED",
        "variance of means, by windows over by batches",
        (first(corrected), GROUPED),
        (largest(corrected), ("memory_longer_than_progress",)),
    ),
    limit(
        warning_filter,
        "CLEAR",
        "I/R at the end of a training",
        ratio("inference", "recalibrated"),
        SILENT,
        ("optimizer_ema",),
    ),
    limit(
        facts,
        "REPLACED",
        "relative change of weights after the last step",
        change_of_weights,
        ("ema_of_weights_that_rest",),
        ("optimizer_ema", "optimizer_ema_of_a_conv_net"),
    ),
    Limit(
        probes,
        "SOLVED",
        "residual of a probe run as one batch",
        (unsolved, ("short_regression", "momentum_too_long_for_conv")),
        (unsolved_twins, ("twelve layers called twice",)),
    ),
    limit(
        affine,
        "ALIKE",
        "spread of the channels' ratios",
        spread,
        ("table_in_other_units",),
        ("deviation_for_variance", "learning_rate_finder"),
    ),
)

PAGE = """\
Each limit of the diagnosis lies between what was measured where it must not be reached
and where it must: the largest figure of the one kind and the smallest of the other,
among some cases of `tests/causes` after their training.

{rows}
"""
HEAD = ("limit", "value", "of", "not reached, at most", "reached, at least")


def row(one: Limit) -> tuple[str, ...]:
    """A line of the table; marked if the limit is not where it should be."""
    value = float(getattr(one.where, one.name))
    sides = []
    for (figure, names), pick in ((one.below, max), (one.above, min)):
        found = {name: figure(name) for name in names}
        chosen = pick(found, key=lambda name: found[name])
        sides.append((found[chosen], chosen))
    (low, _), (high, _) = sides
    mark = "" if low < value <= high else " ✗"
    cells = [f"{number:.3g} ({name})" for number, name in sides]
    return (f"`{one.name}`{mark}", f"{value:g}", one.what, *cells)


def main() -> None:
    """Prints the table."""
    parser = new_parser(__doc__)
    names = [each.name for each in LIMITS]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    section = Section("limits")
    rows = []
    for each in LIMITS:
        if each.name in options.only:
            rows.append(row(each))
            print("  ".join(rows[-1]), flush=True)
    section.write(PAGE.format(rows=table(HEAD, rows)), options.markdown)


if __name__ == "__main__":
    main()

"""`recalibrate` and `recalibrated`: give BN layers the statistics of data."""

import contextlib
import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import keras

from bn_callbacks.arguments import (
    check_flag,
    check_verbose,
    is_positive,
    is_whole,
    is_word,
    shown,
)
from bn_callbacks.auditing import Seen, report_on
from bn_callbacks.layers import (
    LayerSelection,
    check_model,
    commit,
    count_inputs,
    find,
    read,
    restore,
    snapshot,
    team_of,
)
from bn_callbacks.measuring.consistent import (
    RESIDUAL_LIMIT,
    Solution,
    by_passes,
    consistent,
    known,
    residuals,
)
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.handful import corrected, handful
from bn_callbacks.measuring.one_pass import Measurement, Population
from bn_callbacks.measuring.precision import MIN_BATCHES, Precision
from bn_callbacks.measuring.probe import Probe
from bn_callbacks.measuring.progress import Progress
from bn_callbacks.measuring.reach import targets_of
from bn_callbacks.measuring.rescaling import input_map
from bn_callbacks.measuring.sample import KeptBatches, examples_in
from bn_callbacks.report import BatchNormWarning, RecalibrationReport, Shrinkage
from bn_callbacks.statistics.affine import InputMap
from bn_callbacks.statistics.causes import RESCALED_INPUTS
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.warn import warn

BRIEF_TOLERANCE = 0.01
"""Standard error that is small enough for a validation in `fit`."""

BRIEF_RESIDUAL = 0.005
"""Residual that is small compared with `BRIEF_TOLERANCE`: errors add up as squares."""

BRIEF_SAMPLES, BRIEF_SHARE = 2048, 1 / 7
"""A validation reads no more than so many samples, or this share of the data if that is
more. More would take longer than a tenth of an epoch of 20,000 samples
(tests/benchmarks/validation.py)."""

BRIEF_GRAIN = BRIEF_SAMPLES // MIN_BATCHES
"""Samples after which a validation looks whether it has read enough."""

SHORT_SAMPLE = 512
"""Size of the first sample if `tolerance` may end the pass early."""

SAME_LOSS = 1e-3
"""Losses with a smaller relative difference count as equal."""

GROUPED = 3.0
"""Batches with a larger design effect are no random samples. Random ones have 1 at
most, up to 2.5 by chance; grouped, sorted and padded ones 12 and more (docs/causes.md).
"""


def recalibrate(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    refine: int | Literal["auto"] = "auto",
    dropout: bool = False,
    layers: LayerSelection = None,
    validation_data: Any = None,
    prior: Literal["stored"] | None = None,
    verbose: int | Literal["auto"] = "auto",
) -> RecalibrationReport:
    """Gives BN layers the statistics that inference really sees ("Precise BN").

    Replaces `moving_mean` and `moving_variance` by the mean and (biased) variance
    that each layer's input has over the data *in inference mode*, when every other
    layer uses its new statistics as well. A sample of the data, run as one batch,
    nearly finds them; passes over all data, usually one to four, correct them until
    they are within 0.001 standard deviations. Moments are pooled in float64, weighted
    by the number of elements. `refine=0` makes one pass in which each layer normalises
    by batch (Wu & Johnson, 2021, arXiv 2105.07576).

    Nothing in the model changes until everything is computed and finite; then only the
    statistics change. If the new statistics are no nearer to what inference sees than
    the old ones, `recalibrate` keeps these and gives a `BatchNormWarning`. Another one
    says if the data prove to be those of training, scaled or shifted: then
    preprocessing is missing, or done twice.

    Args:
        model: A built Keras model.
        x: Training data as `fit` takes them: arrays or a list, dict or tuple of
            arrays, `(x, y)` or `(x, y, sample_weight)`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator, whose batches are kept in
            memory. Targets are ignored.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        tolerance: By default all data are read. With a number, the first pass stops
            when the standard error of every layer's statistics is below this, in
            standard deviations (0.01 is plenty). The error is estimated from how
            batches differ, so it also holds for batches of samples that belong
            together. Arrays and `PyDataset`s are read in random order; shuffle datasets
            and generators yourself, or the pass stops too early. Further passes use the
            same batches.
        refine: `"auto"`, the default; 0 for the usual Precise BN in one pass by batch;
            or a number of further passes, each with the statistics that the last one
            found.
        dropout: Whether dropout, noise and augmentation layers act as in training;
            `False` by default.
        layers: Which layers: `None`, the default, for those that `fit` would update; or
            names, paths, a regular expression, a predicate, or a list of these. Name a
            frozen layer to recalibrate it.
        validation_data: Data with targets; none by default. The model's loss on them
            decides between the old statistics, the new ones, and those of a single pass
            by batch.
        prior: `"stored"` for a handful of examples, at least 3: corrects the stored
            statistics, layer after layer, by as much as the examples can tell. A model
            that they do not show to be wrong is left alone. With more than 1,024
            examples it has no effect. `None`, the default, trusts the data alone.
        verbose: 0 is silent; 1, and `"auto"`, the default, show progress and the
            result.

    Returns:
        A `RecalibrationReport`; its `undo()` restores the old statistics.

    Raises:
        TypeError: `model` is not a Keras 3 model.
        ValueError: There is no BN layer to recalibrate; the data are empty, endless,
            not finite or of a wrong structure; or `prior` gets fewer than 3 examples.

    Examples:
        >>> import keras, numpy as np
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.BatchNormalization()]
        ... )
        >>> x = np.random.default_rng(0).normal(5, 2, (256, 4)).astype("float32")
        >>> report = recalibrate(model, x, verbose=0)
        >>> bool(np.allclose(model.layers[0].moving_mean, x.mean(0), atol=1e-4))
        True
        >>> report.undo()
        >>> model.layers[0].moving_mean.numpy().tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    check_model(model)
    with team_of(model).agreed():
        check_options(refine, tolerance, dropout, verbose, prior)
        batches = Batches(
            x, batch_size=batch_size, steps=steps, inputs=count_inputs(model)
        )
    return Recalibration(
        model,
        batches,
        tolerance=tolerance,
        refine=refine,
        dropout=dropout,
        layers=layers,
        validation_data=validation_data,
        prior=prior,
        checks_data=True,
    ).run(verbose)


@contextlib.contextmanager
def recalibrated(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    refine: int | Literal["auto"] = "auto",
    dropout: bool = False,
    layers: LayerSelection = None,
    validation_data: Any = None,
    prior: Literal["stored"] | None = None,
    verbose: int | Literal["auto"] = "auto",
) -> Iterator[RecalibrationReport]:
    """Recalibrates inside the `with` block, and restores the old statistics after it.

    Args:
        model: A built Keras model.
        x: Training data; these and all other arguments are those of `recalibrate`.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        tolerance: Standard error at which to stop; by default all data are read.
        refine: `"auto"`, the default, or a number of further passes.
        dropout: Whether dropout acts as in training; `False` by default.
        layers: Which layers; by default those that `fit` would update.
        validation_data: Data that decide which statistics are better; none by default.
        prior: `"stored"` for a handful of examples; `None` by default.
        verbose: 0 is silent; 1, and `"auto"`, the default, show progress and the
            result.

    Returns:
        A context manager that gives the `RecalibrationReport`. When the block ends,
        also by an exception, it restores the old statistics bit for bit.

    Raises:
        TypeError: As `recalibrate`.
        ValueError: As `recalibrate`.

    Examples:
        >>> import keras, numpy as np
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.BatchNormalization()]
        ... )
        >>> with recalibrated(model, np.full((8, 4), 3.0), verbose=0):
        ...     print(model.layers[0].moving_mean.numpy().tolist())
        [3.0, 3.0, 3.0, 3.0]
        >>> model.layers[0].moving_mean.numpy().tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    check_model(model)
    saved = snapshot(find(model))
    try:
        yield recalibrate(
            model,
            x,
            batch_size=batch_size,
            steps=steps,
            tolerance=tolerance,
            refine=refine,
            dropout=dropout,
            layers=layers,
            validation_data=validation_data,
            prior=prior,
            verbose=verbose,
        )
    finally:
        restore(saved)


class Recalibration:
    """A recalibration that is set up once and may run often.

    Args:
        model: The model.
        batches: Training data.
        tolerance: As in `recalibrate`.
        refine: As in `recalibrate`.
        dropout: As in `recalibrate`.
        layers: As in `recalibrate`.
        validation_data: As in `recalibrate`.
        prior: As in `recalibrate`.
        is_brief: Whether to stop after a part of the data, as for a validation.
    """

    def __init__(
        self,
        model: keras.Model,
        batches: Batches,
        *,
        tolerance: float | None = None,
        refine: int | Literal["auto"] = "auto",
        dropout: bool = False,
        layers: LayerSelection = None,
        validation_data: Any = None,
        prior: Literal["stored"] | None = None,
        is_brief: bool = False,
        checks_data: bool = False,
    ) -> None:
        self._model = model
        self._is_brief = is_brief
        self._checks_data = checks_data
        self._tolerance = BRIEF_TOLERANCE if is_brief else tolerance
        self._refine: int | Literal["auto"] = (
            refine if refine == "auto" else int(refine)
        )
        if is_brief and batches.steps is None:
            batches = batches.by_rows()
        self._batches = batches
        self._prior = prior
        self._shrinkage: tuple[Shrinkage, ...] = ()
        self._team = team_of(model)
        self._validation: Probe | None = None
        self._team.check_same(
            "options",
            [
                f"tolerance={tolerance}",
                f"refine={refine}",
                f"dropout={bool(dropout)}",
                f"prior={prior}",
                f"layers={'given' if layers is not None else None}",
                f"validation_data={'given' if validation_data is not None else None}",
            ],
        )
        with self._team.agreed():
            if prior and self._team.workers > 1:
                raise ValueError(
                    "`prior` is for a handful of examples, which one process can read. "
                    f"Received: prior={prior!r} with {self._team.workers} workers. "
                    "Recalibrate in one process, and load the model in the others."
                )
            self._targets, self._skipped, self._uncalled = targets_of(
                model, layers, batches
            )
            self._population = Population(model, self._targets, dropout=dropout)
            if validation_data is not None:
                self._validation = Probe(model, validation_data, self._targets)
            first = batches.peek()
            # Raises if the data do not fit the model, before hours of training.
            self._population.bytes_of_example(first)
        batches.mix()
        self._population.share(batches)
        self._brief_samples = _brief_samples(examples_in(first), batches.length)

    def run(self, verbose: int | Literal["auto"]) -> RecalibrationReport:
        """Measures, decides and writes, as `recalibrate` describes it."""
        show = 1 if verbose == "auto" else int(verbose)
        if not self._team.is_chief:
            show = 0
        progress = Progress(bool(show), self._batches.length)
        targets, old = self._targets, read(self._targets)
        solution = self._solve(old, progress)
        measured = solution.measured
        reached = [not moments.is_empty for moments in measured.moments]
        if not any(reached):
            raise ValueError(
                "The data reach no BatchNormalization layer. Received: "
                f"{measured.batches} batches of which no value reaches a layer. Pass "
                "data that are not empty or masked throughout."
            )
        seen = Seen()
        seen.in_batches(targets, measured, {})
        if self._checks_data:
            seen.input_map = input_map(
                self._model, self._population, self._batches, old, seen.batch
            )
        uncalled = dict(zip(self._uncalled, read(self._uncalled), strict=True))
        before = report_on(
            [*targets, *uncalled], [*old, *uncalled.values()], self._model, seen
        )
        causes = {layer.cause for layer in before.layers}
        # A start that is not yet forgotten may look like a factor, too.
        rescaled = seen.input_map if RESCALED_INPUTS in causes else None
        loss_before = loss_after = None
        if self._validation is not None:
            loss_before = self._validation.inference_loss(old)
            solution, loss_after = self._better(solution, old, progress)
        progress.end()
        residual = known(solution.residuals)
        is_nearer = (
            self._validation is not None  # Then the loss decides,
            or self._refine != "auto"  # or the user has decided,
            or bool(self._shrinkage)  # or the examples have, layer by layer.
            or residual is None
            or residual < max(RESIDUAL_LIMIT, before.max_lag)
        )
        committed = is_nearer and not _is_worse(loss_after, loss_before)
        saved = snapshot(targets)
        if committed:
            commit(targets, solution.statistics, reached, self._team)
        unreached = [
            *itertools.compress(targets, map(operator.not_, reached)),
            *self._uncalled,
        ]
        report = RecalibrationReport(
            before=before,
            residual=residual,
            samples=measured.samples,
            batches=measured.batches,
            passes=progress.passes,
            committed=committed,
            loss_before=loss_before,
            loss_after=loss_after,
            unreached=tuple(bn.path for bn in unreached),
            skipped=tuple(bn.path for bn in self._skipped),
            residuals=(*solution.residuals, *[None] * len(uncalled)),
            notes=self._notes(measured, residual, is_nearer, committed, rescaled),
            shrinkage=self._shrinkage,
            _undo=lambda: restore(saved),
        )
        if not is_nearer or rescaled is not None:
            warn(report.notes[0], BatchNormWarning)
        if show:
            print(report)
        return report

    def _solve(self, old: list[Statistics], progress: Progress) -> Solution:
        self._shrinkage = ()
        if self._prior is not None:
            examples = handful(self._batches, self._population.takes_any_batch)
            if examples is not None:
                return self._corrected(examples, old, progress)
        until = self._precision if self._tolerance is not None else None
        if self._refine != "auto":
            return by_passes(
                self._population,
                self._batches,
                old,
                self._refine,
                until=until,
                progress=progress,
            )
        return consistent(
            self._population,
            self._batches,
            old,
            limit=BRIEF_RESIDUAL if self._is_brief else RESIDUAL_LIMIT,
            until=until,
            grain=BRIEF_GRAIN if self._is_brief else 0,
            most=self._most,
            progress=progress,
        )

    def _corrected(
        self, examples: KeptBatches, old: list[Statistics], progress: Progress
    ) -> Solution:
        solution, found = corrected(self._population, examples, old, progress)
        self._shrinkage = tuple(
            Shrinkage(bn.path, *one[1:])
            for bn, one in zip(self._targets, found, strict=True)
            if one is not None
        )
        return solution

    @property
    def _most(self) -> int | None:
        """Largest sample if a part of the data may be enough; None for any size."""
        if self._is_brief:
            return self._brief_samples
        return None if self._tolerance is None else SHORT_SAMPLE

    def _precision(self) -> Precision:
        most = self._brief_samples if self._is_brief else None
        return Precision(self._targets, self._tolerance or 0.0, most)

    def _better(
        self, solution: Solution, old: list[Statistics], progress: Progress
    ) -> tuple[Solution, float | None]:
        """The better of consistent statistics and those of one pass, and their loss."""
        assert self._validation is not None
        loss = self._validation.inference_loss(solution.statistics)
        # With a single layer both are the same.
        by_passes_too = self._refine == "auto" and not self._shrinkage
        if by_passes_too and len(self._targets) > 1:
            read = self._batches.first(solution.measured.own_batches)
            by_batch = by_passes(
                self._population, read, old, refine=0, progress=progress
            )
            other = self._validation.inference_loss(by_batch.statistics)
            if other is not None and _is_worse(loss, (1 + SAME_LOSS) * other):
                left = residuals(self._population, read, by_batch.statistics, progress)
                return replace(by_batch, residuals=left), other
        return solution, loss

    def _notes(
        self,
        measured: Measurement,
        residual: float | None,
        is_nearer: bool,
        committed: bool,
        known: InputMap | None,
    ) -> tuple[str, ...]:
        notes = []
        if known is not None:
            done = (
                "The model is now right for data like these, and wrong for those of "
                "training. If that is not what you want, take it back by `undo()` of "
                "the report, and give"
                if committed
                else "Nothing was changed. Give"
            )
            notes.append(
                f"The data given differ from those of training by {known} in every "
                "channel: mapped back, they agree with what all layers stored. "
                f"{done} the data as training got them."
            )
        if not is_nearer:
            notes.append(
                "Nothing was changed: the new statistics would not be nearer to what "
                f"inference sees than the old ones. Received: a residual of "
                f"{residual:.3g}. Pass more data; or pass `validation_data` to decide "
                "by the loss."
            )
        if (measured.design_effect or 0.0) > GROUPED and self._validation is None:
            notes.append(
                "The batches are no random samples: their means differ as if each had "
                f"{measured.design_effect:.3g} times fewer samples. Statistics of all "
                "data together and statistics pooled batch by batch then differ, and "
                "which of them serve better depends on the model. Pass "
                "`validation_data`: both are tried, and the better are kept. Shuffled "
                "batches in training would serve better than either."
            )
        return tuple(notes)


def _brief_samples(batch_size: int, length: int | None) -> int:
    """The most samples that a validation reads, in whole steps of its reading."""
    size = max(1, batch_size)
    samples = max(BRIEF_SAMPLES, BRIEF_SHARE * batch_size * (length or 0))
    step = max(size, BRIEF_GRAIN // size * size)
    return math.ceil(samples / step) * step


def check_options(
    refine: Any, tolerance: Any, dropout: Any, verbose: Any, prior: Any = None
) -> None:
    """Raises a ValueError for values that `recalibrate` does not take."""
    if not (is_word(refine, "auto") or is_whole(refine, 0)):
        raise ValueError(
            "`refine` must be 'auto' or a number of further passes, 0 or more. "
            f"Received: refine={shown(refine)}."
        )
    if not (tolerance is None or is_positive(tolerance)):
        raise ValueError(
            "`tolerance` must be None or a positive standard error, in standard "
            f"deviations. Received: tolerance={shown(tolerance)}."
        )
    check_flag("dropout", dropout)
    if not (prior is None or is_word(prior, "stored")):
        raise ValueError(
            f"`prior` must be None or 'stored'. Received: prior={shown(prior)}."
        )
    others = [] if is_word(refine, "auto") else [f"refine={shown(refine)}"]
    others += [] if tolerance is None else [f"tolerance={shown(tolerance)}"]
    if prior is not None and others:
        raise ValueError(
            "`prior` cannot be combined with `refine` or `tolerance`: the examples "
            "decide how far to correct the statistics. Received: "
            f"prior={prior!r} with {' and '.join(others)}. Leave out `prior`, or all "
            "others."
        )
    check_verbose(verbose)


def _is_worse(after: float | None, before: float | None) -> bool:
    """Whether the loss has risen or become NaN."""
    if after is None or before is None:
        return False
    return after > before or (math.isnan(after) and not math.isnan(before))

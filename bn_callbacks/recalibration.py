"""Recalibrating a model's BN statistics, and auditing them."""

import contextlib
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np

from bn_callbacks.data import Batches, fits, open_specs
from bn_callbacks.layers import (
    BatchNormLayer,
    LayerSelection,
    assign,
    check_model,
    count_inputs,
    find,
    read,
    restore,
    runs_in_training_mode,
    snapshot,
    steps_made,
)
from bn_callbacks.population import Measurement, Population
from bn_callbacks.report import BatchNormReport, RecalibrationReport, layer_report
from bn_callbacks.statistics.diagnosis import Evidence
from bn_callbacks.statistics.lag import lag
from bn_callbacks.statistics.moments import Statistics

RESIDUAL_LIMIT = 1e-3
"""Lag in inference mode at which the fixed point is taken to hold."""

FEW_BATCHES = 4
"""Batches that tell whether a long pass for refinement is worth it."""


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
    verbose: int | Literal["auto"] = "auto",
) -> RecalibrationReport:
    """Gives BN layers the statistics that inference really sees ("Precise BN").

    Replaces `moving_mean` and `moving_variance` by the mean and (biased) variance
    of each layer's input over the data, pooled in float64 and weighted by the
    number of elements. A first pass lets BN layers normalise with the statistics of
    each batch (Wu & Johnson, 2021, arXiv 2105.07576); further passes let them
    normalise with the new statistics until each layer's input in inference mode
    has the moments that the layer stores. Everything else runs in inference mode.

    Nothing in the model changes until all is computed and finite, and nothing but
    the statistics changes then.

    Args:
        model: A built Keras model.
        x: Training data as `fit` takes them: arrays or a list, dict or tuple of
            arrays, `(x, y)` or `(x, y, sample_weight)`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator, whose batches are kept in
            memory if more than one pass is made. Of targets no use is made.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        tolerance: Stop the first pass when the standard error of every layer's
            statistics is below this, in standard deviations. Not yet available.
        refine: `"auto"`, or the number of further passes; 0 is the usual Precise
            BN in one pass.
        dropout: Whether dropout, noise and augmentation layers act as in training.
        layers: Which layers: `None` for those that `fit` would update; or names,
            paths, a regular expression, a predicate, or a list of these. A frozen
            layer is recalibrated only if it is named.
        validation_data: Data with targets. The model's loss on them is measured
            before and after, and the better statistics are kept.
        verbose: 0 is silent; 1, and `"auto"`, show progress and the result.

    Returns:
        A `RecalibrationReport`; its `undo()` gives the old statistics back.

    Raises:
        TypeError: `model` is not a Keras 3 model.
        ValueError: No BN layer to recalibrate, or data that are empty, endless, of a
            wrong structure or not finite.

    Example:
    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    >>> x = np.random.default_rng(0).normal(5, 2, (256, 4)).astype("float32")
    >>> report = recalibrate(model, x, verbose=0)
    >>> bool(np.allclose(model.layers[0].moving_mean, x.mean(0), atol=1e-4))
    True
    >>> report.undo()
    >>> model.layers[0].moving_mean.numpy().tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    check_model(model)
    batches = Batches(x, batch_size=batch_size, steps=steps, inputs=count_inputs(model))
    return Recalibration(
        model,
        batches,
        tolerance=tolerance,
        refine=refine,
        dropout=dropout,
        layers=layers,
        validation_data=validation_data,
    ).run(verbose)


@contextlib.contextmanager
def recalibrated(
    model: keras.Model, x: Any, **arguments: Any
) -> Iterator[RecalibrationReport]:
    """Recalibrates inside the `with` block; afterwards all is as before.

    Args:
        model: A built Keras model.
        x: Training data as `fit` takes them.
        **arguments: As `recalibrate` takes them.

    Returns:
        A context manager that gives the `RecalibrationReport`. The statistics from
        before are back when the block ends, bit for bit, also after an exception.

    Raises:
        TypeError: As `recalibrate`.
        ValueError: As `recalibrate`.

    Example:
    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    >>> with recalibrated(model, np.full((8, 4), 3.0), verbose=0):
    ...     print(model.layers[0].moving_mean.numpy().tolist())
    [3.0, 3.0, 3.0, 3.0]
    >>> model.layers[0].moving_mean.numpy().tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    check_model(model)
    saved = snapshot(find(model))
    try:
        yield recalibrate(model, x, **arguments)
    finally:
        restore(saved)


def audit(
    model: keras.Model,
    x: Any = None,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    layers: LayerSelection = None,
) -> BatchNormReport:
    """Holds a model's BN statistics against data, and changes nothing.

    Args:
        model: A built Keras model.
        x: Training data as `fit` takes them, or `None` to look at the stored
            statistics alone. Where they bring targets and the model is compiled,
            the loss in both modes is measured too.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        layers: Which layers, as `recalibrate` takes them; all by default.

    Returns:
        A `BatchNormReport`. A model without BN layers gives an empty one.

    Raises:
        TypeError: `model` is not a Keras 3 model.
        ValueError: Data that are empty, endless, of a wrong structure or not finite.

    Example:
    >>> import keras, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.BatchNormalization(epsilon=0.001)]
    ... )
    >>> report = audit(model, np.random.default_rng(0).normal(5, 1, (256, 4)))
    >>> round(report.max_lag, 1)
    5.0
    """
    check_model(model)
    found = find(model, layers)
    stored = read(found)
    if x is None or not found:
        return _report(found, stored, [None] * len(found), model)
    batches = Batches(x, batch_size=batch_size, steps=steps, inputs=count_inputs(model))
    has_loss = bool(model.compiled) and next(iter(batches))[1] is not None
    targets, _ = _split(model, found, batches)
    loss_batch = loss_inference = None
    seen: dict[BatchNormLayer, Statistics] = {}
    if _is_finite(stored):
        # Frozen layers, and those that never train, see only this side.
        inference = Population(model, found, loss=has_loss).measure(batches, stored)
        seen.update(zip(found, _statistics(inference, stored), strict=True))
        loss_inference = inference.loss
    elif has_loss:
        loss_inference = math.nan
    if targets or has_loss:
        batch = Population(model, targets, loss=has_loss).measure(batches)
        seen.update(zip(targets, _statistics(batch, read(targets)), strict=True))
        loss_batch = batch.loss
    return _report(
        found, stored, [seen.get(bn) for bn in found], model, loss_batch, loss_inference
    )


class Recalibration:
    """A recalibration that is set up once and may run often.

    Args:
        model: The model.
        batches: Training data.
        tolerance: As `recalibrate` takes it, and the rest too.
        refine: Further passes.
        dropout: Whether dropout is active.
        layers: Which layers.
        validation_data: Data to hold the result against.
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
    ) -> None:
        check_options(refine, tolerance)
        self._model = model
        self._refine = refine
        self._batches = batches
        self._targets, self._skipped = _targets(model, layers, batches)
        self._population = Population(model, self._targets, dropout=dropout)
        self._validation: Probe | None = None
        if validation_data is not None:
            self._validation = Probe(model, validation_data, self._targets)

    def run(self, verbose: int | Literal["auto"]) -> RecalibrationReport:
        """Measures, decides and writes, as `recalibrate` describes it."""
        show = 1 if verbose == "auto" else int(verbose)
        targets = self._targets
        first = self._population.measure(
            self._batches, target=self._batches.length, verbose=show
        )
        reached = [moments.count > 0 for moments in first.moments]
        if not any(reached):
            raise ValueError(
                "The data reach no BatchNormalization layer. Received: "
                f"{first.batches} batches with nothing in them that counts. Pass data "
                "that are not empty or masked throughout."
            )
        old = read(targets)
        before = _report(targets, old, _statistics(first, old), self._model)
        new, residual, passes = _refine(
            self._population, self._batches, first, old, self._refine, show
        )
        loss_before = loss_after = None
        if self._validation is not None:
            loss_before = self._validation.inference_loss(old)
            loss_after = self._validation.inference_loss(new)
        # `not >`, so that a loss that was NaN before does not count as better.
        committed = loss_before is None or not (loss_after or 0.0) > loss_before
        saved = snapshot(targets)
        if committed:
            written = [i for i, is_reached in enumerate(reached) if is_reached]
            assign([targets[i] for i in written], [new[i] for i in written])
        unreached = itertools.compress(targets, map(operator.not_, reached))
        report = RecalibrationReport(
            before=before,
            residual=residual,
            samples=first.samples,
            batches=first.batches,
            passes=passes,
            committed=committed,
            loss_before=loss_before,
            loss_after=loss_after,
            unreached=tuple(bn.path for bn in unreached),
            skipped=tuple(bn.path for bn in self._skipped),
            _undo=lambda: restore(saved),
        )
        if show:
            print(report)
        return report


class Probe:
    """A model's loss on a sample of data, in both modes of its BN layers.

    Args:
        model: A compiled model.
        data: Data with targets.
        layers: BN layers that change between the modes; by default all that are
            not frozen.

    Raises:
        ValueError: The data have no targets, or the model has no loss.
    """

    def __init__(
        self, model: keras.Model, data: Any, layers: list[BatchNormLayer] | None = None
    ) -> None:
        self._batches = Batches(data, inputs=count_inputs(model))
        has_targets = next(iter(self._batches))[1] is not None
        if not (model.compiled and has_targets):
            raise ValueError(
                "Measuring a loss needs data with targets and a compiled model. "
                f"Received: compiled={bool(model.compiled)}, targets={has_targets}. "
                "Pass (x, y), and compile the model with a loss."
            )
        if layers is None:
            layers = [bn for bn in find(model) if bn.trainable]
        self._layers = layers
        self._population = Population(model, layers, loss=True)

    def measure(self) -> tuple[float | None, float | None]:
        """The loss with batch statistics, and the loss in inference mode."""
        batch = self._population.measure(self._batches).loss
        return batch, self.inference_loss(read(self._layers))

    def inference_loss(self, statistics: list[Statistics]) -> float | None:
        """The loss if the layers stored these statistics."""
        if not _is_finite(statistics):
            return math.nan
        return self._population.measure(self._batches, statistics).loss


def check_options(refine: Any, tolerance: Any) -> None:
    """Raises a ValueError for values that `recalibrate` does not take."""
    is_number = isinstance(refine, int) and not isinstance(refine, bool)
    if refine != "auto" and not (is_number and refine >= 0):
        raise ValueError(
            "`refine` must be 'auto' or a number of further passes, 0 or more. "
            f"Received: refine={refine!r}."
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            "`tolerance` must be None or a positive standard error, in standard "
            f"deviations. Received: tolerance={tolerance!r}."
        )


def _targets(
    model: keras.Model, layers: LayerSelection, batches: Batches
) -> tuple[list[BatchNormLayer], list[BatchNormLayer]]:
    """The layers to recalibrate and those to leave alone."""
    found = find(model, layers)
    if not found:
        raise ValueError(
            "The model has no BatchNormalization layer to recalibrate. Received: "
            f"model={model.name!r}. There is nothing to do for it."
        )
    targets, skipped = _split(model, found, batches)
    if targets:
        return targets, skipped
    if not any(bn.trainable for bn in found):
        raise ValueError(
            "All BatchNormalization layers are frozen (`trainable=False`). Received: "
            f"{found[0].path} and {len(found) - 1} more. Name the layers to "
            f"recalibrate all the same, as in layers=[{found[0].path!r}]."
        )
    raise ValueError(
        "The model's own call never runs its BatchNormalization layers in training "
        "mode, so its weights have adapted to the statistics as they are, and "
        f"recalibration would harm. Received: {found[0].path} and {len(found) - 1} "
        "more. Pass `training` on to the layers in `call` and train again; or name "
        f"the layers, as in layers=[{found[0].path!r}], if you know better."
    )


def _split(
    model: keras.Model, found: list[BatchNormLayer], batches: Batches
) -> tuple[list[BatchNormLayer], list[BatchNormLayer]]:
    first = next(iter(batches))
    with fits(model.name, first[0], 0):
        is_on = runs_in_training_mode(model, found, open_specs(first[0]))
    chosen = [bn.named or on for bn, on in zip(found, is_on, strict=True)]
    targets = list(itertools.compress(found, chosen))
    return targets, [bn for bn in found if bn not in targets]


def _refine(
    population: Population,
    batches: Batches,
    first: Measurement,
    old: list[Statistics],
    refine: int | Literal["auto"],
    verbose: int,
) -> tuple[list[Statistics], float | None, int]:
    """Further passes. Returns statistics, what remains of lag, and the passes made."""
    layers = population.layers
    new = _statistics(first, old)
    if refine == 0:
        return new, None, 1
    length = first.batches

    def measure(statistics: list[Statistics]) -> list[Statistics]:
        result = population.measure(
            batches, statistics, target=batches.length, verbose=verbose
        )
        return _statistics(result, statistics)

    if refine != "auto":
        for _ in range(refine):
            new = measure(new)
        return new, _max_lag(layers, measure(new), new), 1 + refine

    if length >= 8 * FEW_BATCHES:
        few = list(itertools.islice(batches, FEW_BATCHES))
        by_batch = _statistics(population.measure(few), old)
        by_population = _statistics(population.measure(few, new), new)
        residual = _max_lag(layers, by_population, by_batch)
        if residual <= RESIDUAL_LIMIT / 10:
            return new, residual, 1

    best, best_residual, previous, passes = new, math.inf, new, 1
    # Layer k is exact after k passes, and one more pass shows it.
    while passes < len(layers) + 3:
        seen = measure(previous)
        passes += 1
        residual = _max_lag(layers, seen, previous)
        if residual < best_residual:
            best, best_residual = previous, residual
        # The input of the first layer depends on no statistics: where even that
        # changes, the data differ from pass to pass, and so much is noise.
        noise = _max_lag(layers[:1], seen[:1], new[:1])
        if residual <= max(RESIDUAL_LIMIT, 2 * noise):
            break
        previous = seen
    return best, best_residual, passes


def _max_lag(
    layers: Sequence[BatchNormLayer],
    batch: Sequence[Statistics],
    moving: Sequence[Statistics],
) -> float:
    pairs = zip(layers, batch, moving, strict=True)
    return max(
        (lag(seen, stored, bn.epsilon) for bn, seen, stored in pairs), default=0.0
    )


def _statistics(
    measured: Measurement, otherwise: Sequence[Statistics]
) -> list[Statistics]:
    """Measured statistics, or others for a layer that nothing reached."""
    return [
        moments.statistics if moments.count > 0 else other
        for moments, other in zip(measured.moments, otherwise, strict=True)
    ]


def _is_finite(statistics: Sequence[Statistics]) -> bool:
    return all(np.isfinite(part).all() for pair in statistics for part in pair)


def _report(
    layers: Sequence[BatchNormLayer],
    stored: Sequence[Statistics],
    seen: Sequence[Statistics | None],
    model: keras.Model,
    loss_batch: float | None = None,
    loss_inference: float | None = None,
) -> BatchNormReport:
    report = BatchNormReport(loss_batch=loss_batch, loss_inference=loss_inference)
    steps = steps_made(model)
    reports = []
    for bn, moving, batch in zip(layers, stored, seen, strict=True):
        start = bn.initial
        is_initial = all(map(np.array_equal, moving, start))
        evidence = Evidence(
            path=bn.path,
            momentum=bn.momentum,
            epsilon=bn.epsilon,
            moving=moving,
            batch=batch,
            trainable=bn.trainable,
            updates=steps * bn.calls if steps else None,
            start=start,
            is_still=bool(steps) and is_initial,
            is_initial=is_initial,
            loss_gap=report.loss_gap,
        )
        reports.append(layer_report(evidence))
    return dataclasses.replace(report, layers=tuple(reports))

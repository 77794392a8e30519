"""`measure` and `apply_statistics`: recalibrates with data that lie in many places."""

from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np

from bn_callbacks.arguments import check_flag, check_verbose, is_word, shown
from bn_callbacks.auditing import Seen, report_on
from bn_callbacks.layers import (
    BatchNormLayer,
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
from bn_callbacks.measuring.consistent import known, lags, storable
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Measurement, Population
from bn_callbacks.measuring.progress import Progress
from bn_callbacks.measuring.reach import targets_of
from bn_callbacks.report import RecalibrationReport
from bn_callbacks.statistics.moments import Moments, Statistics
from bn_callbacks.statistics.population import PopulationMoments


def measure(
    model: keras.Model,
    x: Any,
    *,
    statistics: PopulationMoments | Literal["stored"] | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    dropout: bool = False,
    layers: LayerSelection = None,
    verbose: int | Literal["auto"] = 0,
) -> PopulationMoments:
    """Measures the moments of each BN layer's input over a part of the data.

    For data in many places: each place measures its part with a copy of the model; you
    merge the moments, and `apply_statistics` writes the result into the model. A round
    is one pass over all parts. The first round is the usual Precise BN. For further
    rounds, pass the merged moments of the round before as `statistics`: `k` of them
    give the result of `recalibrate(..., refine=k)` with all data in one place. The
    model does not change.

    Args:
        model: A built Keras model; the same weights everywhere.
        x: This part of the training data, as `recalibrate` takes them.
        statistics: What layers normalise with: `None`, the default, for the statistics
            of each batch; the merged moments of the round before; or `"stored"` for the
            model's own.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        dropout: Whether dropout, noise and augmentation layers act as in training;
            `False` by default.
        layers: Which layers, as `recalibrate` takes them; by default those that `fit`
            would update.
        verbose: 0, the default, is silent; 1, and `"auto"`, show progress.

    Returns:
        The `PopulationMoments`, which can be merged and saved.

    Raises:
        TypeError: `model` is not a Keras 3 model, or `statistics` are no moments.
        ValueError: As `recalibrate`; or `statistics` belong to another model.

    Examples:
        >>> import keras, numpy as np
        >>> model = keras.Sequential(
        ...     [keras.Input((1,)), keras.layers.BatchNormalization(name="bn")]
        ... )
        >>> one, other = (measure(model, np.full((8, 1), v)) for v in (0.0, 10.0))
        >>> report = apply_statistics(model, one.merge(other))
        >>> model.layers[0].moving_variance.numpy().tolist()  # Not the mean of 0 and 0.
        [25.0]
    """
    check_model(model)
    _check_options(statistics, dropout, verbose)
    team = team_of(model)
    with team.agreed():
        batches = Batches(
            x, batch_size=batch_size, steps=steps, inputs=count_inputs(model)
        )
        targets, _, _ = targets_of(model, layers, batches)
        population = Population(model, targets, dropout=dropout)
        stored = read(targets)
        given = stored if is_word(statistics, "stored") else None
        if isinstance(statistics, PopulationMoments):
            own = _own(model, targets, statistics.moments)
            given = storable(targets, own, stored)
    batches.mix()
    population.share(batches)
    progress = Progress(bool(verbose) and team.is_chief, batches.length)
    progress.begin("measuring")
    measured = population.measure(batches, given, show=progress.show)
    progress.end()
    paths = _names(model, targets)
    return PopulationMoments(
        dict(zip(paths, measured.moments, strict=True)),
        None if given is None else dict(zip(paths, given, strict=True)),
        measured.samples,
        measured.batches,
    )


def apply_statistics(
    model: keras.Model, moments: PopulationMoments
) -> RecalibrationReport:
    """Writes the statistics that `measure` found into the BN layers of a model.

    It writes all layers or none, and changes nothing but the statistics. Layers that no
    data have reached keep theirs.

    Args:
        model: The model, or a copy of it.
        moments: The merged moments of all parts.

    Returns:
        A `RecalibrationReport`; its `undo()` restores the old statistics. A note says
        how far the last round has moved the statistics, to judge if another is worth
        its time.

    Raises:
        TypeError: `model` is not a Keras 3 model, or `moments` are not what `measure`
            returned.
        ValueError: The moments belong to another model, are empty, or exceed the range
            of the layers' dtype.
    """
    check_model(model)
    if not isinstance(moments, PopulationMoments):
        raise TypeError(
            "`moments` must be what `measure` returned. Received: "
            f"{type(moments).__name__}. Pass PopulationMoments, or load them with "
            "PopulationMoments.load."
        )
    found = find(model)
    named = zip(_names(model, found), found, strict=True)
    targets = [bn for name, bn in named if name in moments.moments]
    each = _own(model, targets, moments.moments)
    reached = [not one.is_empty for one in each]
    if not any(reached):
        raise ValueError(
            "There is nothing to apply. Received: moments of "
            f"{moments.samples} samples, none of which has reached a layer. Measure "
            "data that are not empty or masked throughout."
        )
    old = read(targets)
    measured = Measurement(
        each, None, moments.batches, moments.samples, moments.batches, np.zeros((0, 2))
    )
    seen = Seen()
    seen.in_batches(targets, measured, {})
    before = report_on(targets, old, model, seen)
    saved = snapshot(targets)
    commit(targets, storable(targets, each, old), reached, team_of(model))
    return RecalibrationReport(
        before=before,
        residual=None,
        samples=moments.samples,
        batches=moments.batches,
        passes=1,
        committed=True,
        unreached=tuple(
            bn.path for bn, is_in in zip(targets, reached, strict=True) if not is_in
        ),
        residuals=(None,) * len(targets),
        notes=(_note(targets, _names(model, targets), each, moments.given),),
        _undo=lambda: restore(saved),
    )


def _note(
    targets: list[BatchNormLayer],
    names: list[str],
    moments: list[Moments],
    given: Mapping[str, Statistics] | None,
) -> str:
    if given is None:
        return (
            "These are the statistics of a first round, in which layers normalise by "
            "batch. Another round, which measures with these (`statistics` of "
            "`measure`), brings them nearer to what inference sees."
        )
    moved = known(lags(targets, moments, [given[name] for name in names])) or 0.0
    return (
        f"The last round has moved the statistics by {moved:.2g} standard deviations "
        "at most. Another is worth its time while that is more than 0.01."
    )


def _check_options(statistics: Any, dropout: Any, verbose: Any) -> None:
    is_known = statistics is None or is_word(statistics, "stored")
    if not (is_known or isinstance(statistics, PopulationMoments)):
        raise TypeError(
            "`statistics` must be None, 'stored' or PopulationMoments. Received: "
            f"statistics={shown(statistics)}. Pass the merged moments of the round "
            "before."
        )
    check_flag("dropout", dropout)
    check_verbose(verbose)


def _names(model: keras.Model, layers: list[BatchNormLayer]) -> list[str]:
    """Names of layers without that of the model, which a copy may have changed."""
    return [bn.path.removeprefix(f"{model.name}/") for bn in layers]


def _own(
    model: keras.Model, targets: list[BatchNormLayer], moments: Mapping[str, Moments]
) -> list[Moments]:
    """The moments of each layer; raises an error if they belong to other layers."""
    names = _names(model, targets)
    mine = {name: bn.channels for name, bn in zip(names, targets, strict=True)}
    theirs = {name: len(one.mean) for name, one in moments.items()}
    if mine != theirs:
        name = min({*mine.items()} ^ {*theirs.items()})[0]
        raise ValueError(
            f"The moments are of another model, or of other layers. Received: {name} "
            f"of {theirs.get(name, 'no')} channels in the moments and of "
            f"{mine.get(name, 'no')} in the model. Layers are told apart by their "
            "names: load the same saved model everywhere, or name the layers."
        )
    return [moments[name] for name in names]

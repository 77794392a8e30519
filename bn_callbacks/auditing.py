"""Holding a model's BN statistics against data, or looking at them alone."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from bn_callbacks.layers import (
    BatchNormLayer,
    LayerSelection,
    check_model,
    count_inputs,
    find,
    read,
    read_replicas,
    steps_made,
    team_of,
)
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Measurement, Population
from bn_callbacks.measuring.reach import split
from bn_callbacks.report import BatchNormReport, layer_reports
from bn_callbacks.statistics.evidence import Evidence
from bn_callbacks.statistics.moments import Statistics, is_finite


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

    Examples:
        >>> import keras, numpy as np
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.BatchNormalization(epsilon=0.001)]
        ... )
        >>> report = audit(model, np.random.default_rng(0).normal(5, 1, (256, 4)))
        >>> 4.8 < report.max_lag < 5.2
        True
    """
    check_model(model)
    found = find(model, layers)
    stored = read(found)
    if x is None or not found:
        return report_on(found, stored, [None] * len(found), model)
    team = team_of(model)
    with team.agreed():
        batches = Batches(
            x, batch_size=batch_size, steps=steps, inputs=count_inputs(model)
        )
        has_loss = bool(model.compiled) and batches.peek()[1] is not None
        targets, *_ = split(model, found, batches)
        in_inference = Population(model, found, loss=has_loss)
        by_batch = Population(model, targets, loss=has_loss)
    in_inference.share(batches)
    loss_batch = loss_inference = None
    seen: dict[BatchNormLayer, Statistics] = {}
    # Replicas of other workers may store something else.
    if team.everywhere(is_finite(stored)):
        # Frozen layers, and those that never train, see only this side.
        inference = in_inference.measure(batches, stored)
        seen.update(seen_by(found, inference, stored))
        loss_inference = inference.loss
    elif has_loss:
        loss_inference = math.nan
    if targets or has_loss:
        batch = by_batch.measure(batches)
        seen.update(seen_by(targets, batch, read(targets)))
        loss_batch = batch.loss
    return report_on(
        found, stored, [seen.get(bn) for bn in found], model, loss_batch, loss_inference
    )


def report_on(
    layers: Sequence[BatchNormLayer],
    stored: Sequence[Statistics],
    seen: Sequence[Statistics | None],
    model: keras.Model,
    loss_batch: float | None = None,
    loss_inference: float | None = None,
) -> BatchNormReport:
    """A report on stored statistics, held against those seen in data, if any."""
    report = BatchNormReport(loss_batch=loss_batch, loss_inference=loss_inference)
    steps = steps_made(model)
    evidence = []
    replicas = read_replicas(model, layers)
    for bn, moving, batch, each in zip(layers, stored, seen, replicas, strict=True):
        start = bn.initial
        is_initial = all(map(np.array_equal, moving, start))
        evidence.append(
            Evidence(
                path=bn.path,
                momentum=bn.momentum,
                epsilon=bn.epsilon,
                moving=moving,
                batch=batch,
                trainable=bn.trainable,
                updates=steps * bn.calls if steps or is_initial else None,
                start=start,
                replicas=each,
                is_still=bool(steps) and is_initial,
                is_initial=is_initial,
                precision=bn.precision,
                has_mixed_calls=bn.calls > 1,
                loss_gap=report.loss_gap,
            )
        )
    return dataclasses.replace(report, layers=layer_reports(evidence))


def seen_by(
    layers: Sequence[BatchNormLayer],
    measured: Measurement,
    otherwise: Sequence[Statistics],
) -> dict[BatchNormLayer, Statistics]:
    """Measured statistics by layer, or others where nothing reached a layer."""
    return {
        bn: other if one.is_empty else one.statistics
        for bn, one, other in zip(layers, measured.moments, otherwise, strict=True)
    }

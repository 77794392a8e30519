"""`bn-callbacks inspect`: shows what the BN layers of a saved model store."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.auditing import audit
from bn_callbacks.cli.models import load
from bn_callbacks.cli.sources import open_data
from bn_callbacks.layers import BatchNormLayer, find, read
from bn_callbacks.names import printable
from bn_callbacks.report import BatchNormReport, LayerReport, plain, table
from bn_callbacks.statistics.anomalies import (
    FROZEN,
    NEGATIVE_VARIANCE,
    Anomaly,
    find_anomalies,
)
from bn_callbacks.statistics.causes import HEALTHY, NON_FINITE
from bn_callbacks.statistics.losses import GAP_LIMIT
from bn_callbacks.statistics.moments import Statistics

CERTAIN = (NON_FINITE, NEGATIVE_VARIANCE)
"""Suspicions that no data can clear."""

CLEAR = 0.5
"""Data clear a layer of all other suspicions if each channel's error is smaller, in
standard deviations."""


@dataclass(frozen=True)
class StoredLayer:
    """What a BN layer stores.

    Args:
        path: Its path in the model.
        channels: Number of its channels.
        momentum: The weight of the old value in an update.
        epsilon: The number that it adds to a variance.
        dtype: The dtype of its statistics.
        trainable: Whether it is not frozen.
        mean: The smallest and the largest finite moving mean.
        variance: The smallest and the largest finite moving variance.
        suspicions: What may be wrong with it.
    """

    path: str
    channels: int
    momentum: float
    epsilon: float
    dtype: str
    trainable: bool
    mean: tuple[float, float]
    variance: tuple[float, float]
    suspicions: tuple[Anomaly, ...]


def run(options: argparse.Namespace) -> int:
    """Prints the layers, and returns 1 if something is wrong with them."""
    model = load(options.model, options.custom_objects, is_trusted=options.unsafe)
    found = find(model, options.layers)
    layers = [
        describe(bn, stored) for bn, stored in zip(found, read(found), strict=True)
    ]
    report = None
    if options.data is not None:
        x, batch_size = open_data(options.data, model, options)
        report = audit(
            model, x, batch_size=batch_size, steps=options.steps, layers=options.layers
        )
    findings = find_faults(layers, report)
    if options.json:
        print(_as_json(options.model, layers, report, findings), file=options.out)
    else:
        print(_as_text(printable(options.model), layers, report, findings))
    return 1 if findings else 0


def describe(bn: BatchNormLayer, stored: Statistics) -> StoredLayer:
    """Describes a layer without data."""
    dtype = str(bn.layer.moving_mean.dtype)
    return StoredLayer(
        path=bn.path,
        channels=bn.channels,
        momentum=bn.momentum,
        epsilon=bn.epsilon,
        dtype=dtype,
        trainable=bn.trainable,
        mean=_range(stored.mean),
        variance=_range(stored.variance),
        suspicions=find_anomalies(
            stored,
            start=bn.initial,
            epsilon=bn.epsilon,
            dtype=dtype,
            trainable=bn.trainable,
        ),
    )


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    return float(finite.min()), float(finite.max())


def find_faults(
    layers: Sequence[StoredLayer], report: BatchNormReport | None
) -> dict[str, list[str]]:
    """Names what is wrong with each layer, by path, without the healthy layers.

    Each suspicion is a fault, except that a layer is frozen. With data, the cause is
    one too; and data clear a layer whose statistics fit them of most suspicions, such
    as dead channels, or the huge variance of raw inputs.

    Args:
        layers: The layers.
        report: The audit, if there are data.
    """
    judged = {layer.path: layer for layer in report.layers} if report else {}
    gap = report.loss_gap if report else None
    faults: dict[str, list[str]] = {}
    for layer in layers:
        verdict = judged.get(layer.path)
        is_cleared = verdict is not None and _is_clear(verdict, layer.channels, gap)
        names = [
            suspicion.name
            for suspicion in layer.suspicions
            if suspicion.name != FROZEN
            and (suspicion.name in CERTAIN or not is_cleared)
        ]
        if verdict is not None and verdict.cause not in (HEALTHY, *names):
            names.append(verdict.cause)
        if names:
            faults[layer.path] = names
    return faults


def _is_clear(verdict: LayerReport, channels: int, gap: float | None) -> bool:
    if verdict.cause != HEALTHY:
        return False
    if verdict.lag is None:
        # Nothing calls the layer, so its statistics do not matter.
        return True
    if gap is not None:
        return gap < GAP_LIMIT
    error = verdict.lag if verdict.residual is None else verdict.residual
    # The error is a mean over channels, which must not hide one bad channel.
    return bool(error * math.sqrt(channels) < CLEAR)


def _as_json(
    model: str,
    layers: Sequence[StoredLayer],
    report: BatchNormReport | None,
    findings: dict[str, list[str]],
) -> str:
    content = {
        "model": model,
        "healthy": not findings,
        "findings": findings,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "audit": report.to_dict() if report else None,
    }
    return json.dumps(plain(content), indent=2)


def _as_text(
    model: str,
    layers: Sequence[StoredLayer],
    report: BatchNormReport | None,
    findings: dict[str, list[str]],
) -> str:
    if not layers:
        return f"{model}: no BatchNormalization layers."
    headings = ["layer", "suspicious", "channels", "momentum", "epsilon"]
    rows = [[*headings, "moving mean", "moving variance"]]
    for layer in layers:
        names = ", ".join(suspicion.name for suspicion in layer.suspicions)
        figures = [f"{layer.momentum:g}", f"{layer.epsilon:g}"]
        ranges = [
            "{:.3g} .. {:.3g}".format(*ends) for ends in (layer.mean, layer.variance)
        ]
        rows.append([layer.path, names or "-", str(layer.channels), *figures, *ranges])
    parts = [table(rows)]
    if notes := _notes(layers):
        parts.append("\n".join(notes))
    if report is not None:
        parts.append(f"Against the data:\n\n{report}")
    verdict = f"{model}: nothing wrong with {_of(len(layers))}."
    if findings:
        verdict = f"{model}: findings in {len(findings)} of {_of(len(layers))}."
    return "\n\n".join([*parts, verdict])


def _of(count: int) -> str:
    return f"{count} BatchNormalization layer{'s' * (count != 1)}"


def _notes(layers: Sequence[StoredLayer]) -> list[str]:
    """Explains each kind of suspicion once, with the text of the first layer."""
    seen: dict[str, list[Any]] = {}
    for layer in layers:
        for suspicion in layer.suspicions:
            seen.setdefault(suspicion.name, []).append((layer.path, suspicion.text))
    notes = []
    for name, found in seen.items():
        path, text = found[0]
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        notes.append(f"{name}: {path}{others}: {text}")
    return notes

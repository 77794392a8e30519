"""The only place that builds `Evidence`.

It reads the settings from the layer; callers pass what training or data have shown.
`statistics/evidence.py` says what each part means.
"""

from typing import Any

import numpy as np

from bn_callbacks.layers import BatchNormLayer, OwnCall, own_call
from bn_callbacks.statistics.evidence import Evidence
from bn_callbacks.statistics.moments import Statistics


def evidence_of(
    bn: BatchNormLayer,
    moving: Statistics,
    *,
    began: Statistics | None = None,
    **seen: Any,
) -> Evidence:
    """Collects what is known of a layer.

    Args:
        bn: The layer.
        moving: What it stores.
        began: What it stored when watching began; `moving` by default.
        **seen: What training or data have shown, by the names of `Evidence`.
    """
    began = moving if began is None else began
    return Evidence(
        path=bn.path,
        momentum=bn.momentum,
        epsilon=bn.epsilon,
        moving=moving,
        trainable=bn.trainable,
        precision=bn.precision,
        is_opaque=own_call(bn.layer) is OwnCall.UNKNOWN,
        is_initial=all(map(np.array_equal, began, bn.initial)),
        **seen,
    )

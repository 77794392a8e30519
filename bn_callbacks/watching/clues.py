"""What a model gives away before the first training step, for free."""

from collections.abc import Sequence

import keras

from bn_callbacks.layers import (
    BatchNormLayer,
    Calls,
    is_stale,
    own_call,
    pinned_in_graph,
    replicas,
    takes_training,
    uses_ema,
)
from bn_callbacks.statistics.moving_average import (
    FORGOTTEN,
    start_weight,
    suggest_momentum,
)


def find_clues(
    model: keras.Model,
    layers: Sequence[BatchNormLayer],
    *,
    total_steps: int | None,
    is_recalibrated: bool,
    calls: Sequence[Calls],
) -> tuple[str, ...]:
    """Facts that may lead to trouble. None is a finding before training confirms it.

    Args:
        model: The model about to be trained.
        layers: Its BN layers.
        total_steps: Training steps of the whole `fit`, None if unknown.
        is_recalibrated: Whether a callback recalibrates at the end.
        calls: What a training step does with each layer, as far as it was seen.

    Returns:
        A sentence for each fact.
    """
    pinned = pinned_in_graph(model)
    updating = [bn for bn in layers if bn.trainable]
    counts = {bn: each.updates for bn, each in zip(layers, calls, strict=True)}
    slow = [
        bn
        for bn in updating
        if total_steps
        and bn.momentum < 1
        and start_weight(bn.momentum, total_steps * (counts[bn] or 1)) > FORGOTTEN
    ]
    facts = [
        (
            slow,
            "momentum {0.momentum:g} is large for the {1} steps of this fit "
            "(suggested: {2:.3g})",
        ),
        (
            [bn for bn in updating if bn.momentum == 1],
            "momentum 1 never updates the statistics",
        ),
        (
            [bn for bn in updating if bn.precision is not None],
            "statistics stored in less than float32 stall",
        ),
        (
            [bn for bn in updating if id(bn.layer) in pinned],
            "`training=False` in a functional graph is overridden by `fit`",
        ),
        (
            [bn for bn in layers if is_stale(model, bn)],
            "`trainable` was changed after `compile`; only another one makes it count",
        ),
        (
            [] if takes_training(model) else updating,
            "the model's `call` takes no `training`, so they run in inference mode",
        ),
        (
            [bn for bn in updating if (counts[bn] or 1) > 1],
            "called {3} times a step; one average serves all calls",
        ),
        (
            [bn for bn in updating if counts[bn] is None],
            "how often a training step updates them could not be seen, so updates are "
            "not counted, nothing is debiased, and a lag is not measured. Compile the "
            "model anew before `fit`, so that its step is traced under the monitor",
        ),
        (
            [bn for bn in updating if not own_call(bn.layer).takes_statistics],
            "a `call` of their own does something with `training=True` that cannot be "
            "given statistics, so the losses of a probe are not measured",
        ),
        (
            updating if uses_ema(model) and not is_recalibrated else [],
            "the optimizer will put averaged weights in at the end, which the "
            "statistics do not belong to: recalibrate",
        ),
        (
            [bn for bn in updating if replicas(model) > 1 and not bn.synchronized],
            "each replica keeps statistics of its own without `synchronized=True`",
        ),
    ]
    suggested = suggest_momentum(total_steps) if total_steps else 0.0
    return tuple(
        f"{_who(found, len(layers))}: "
        + text.format(
            found[0],
            total_steps,
            min(suggested, found[0].momentum),
            counts[found[0]],
        )
        for found, text in facts
        if found
    )


def _who(found: Sequence[BatchNormLayer], total: int) -> str:
    if len(found) == 1:
        return found[0].path
    return f"{len(found)} of {total} layers ({found[0].path}, …)"

"""Notes on a model that is about to be trained, shown as `note:` in the reports."""

from collections.abc import Sequence

import keras

from bn_callbacks.layers import (
    BatchNormLayer,
    Calls,
    is_trainable_stale,
    own_call,
    pinned_in_graph,
    takes_training,
    team_of,
    uses_ema,
)
from bn_callbacks.statistics.moving_average import (
    FORGOTTEN,
    start_weight,
    suggest_momentum,
)


def find_notes(
    model: keras.Model,
    layers: Sequence[BatchNormLayer],
    *,
    total_steps: int | None,
    is_recalibrated: bool,
    calls: Sequence[Calls],
) -> tuple[str, ...]:
    """Lists facts that may lead to trouble, or that limit what can be measured.

    None of them is a finding before the training confirms it.

    Args:
        model: The model about to be trained.
        layers: Its BN layers.
        total_steps: Training steps of the whole `fit`, None if unknown.
        is_recalibrated: Whether a callback recalibrates at the end.
        calls: How a training step calls each layer, as far as that was seen.

    Returns:
        A sentence for each fact.
    """
    pinned, has_replicas = pinned_in_graph(model), team_of(model).size > 1
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
            [bn for bn in layers if is_trainable_stale(model, bn)],
            "`trainable` was changed after `compile`; compile again to make it count",
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
            "not counted, nothing is debiased, and no lag is measured. Compile the "
            "model again before `fit`, so that the monitor sees its step traced",
        ),
        (
            [bn for bn in updating if not own_call(bn.layer).takes_statistics],
            "their own `call` does something with `training=True` for which statistics "
            "cannot be given, so the losses of a probe are not measured",
        ),
        (
            updating if uses_ema(model) and not is_recalibrated else [],
            "at the end the optimizer will put averaged weights into the model, to "
            "which the statistics do not belong: recalibrate",
        ),
        (
            [bn for bn in updating if not bn.synchronized] if has_replicas else [],
            "without `synchronized=True` each replica keeps statistics of its own",
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

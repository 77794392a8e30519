"""What to do about each cause, in a sentence or two."""

from bn_callbacks.statistics.causes import (
    CORRELATED_BATCHES,
    DRIFTING,
    INFERENCE_MODE,
    LOW_PRECISION,
    MIXED_CALLS,
    NOISY,
    NON_FINITE,
    NOT_UPDATING,
    OUTLIERS,
    REPLICAS_DIFFER,
    TINY_BATCH,
    UNEXPECTED_UPDATE,
    WARMING_UP,
    WEIGHTS_REPLACED,
)
from bn_callbacks.statistics.evidence import FORGOTTEN, Evidence, Figures
from bn_callbacks.statistics.moving_average import suggest_momentum, updates_to_forget


def suggested_momentum(seen: Evidence, figures: Figures, cause: str) -> float | None:
    """A momentum that would do better for this cause, or None."""
    if cause == WARMING_UP:
        rule = suggest_momentum(seen.total_updates or seen.updates or 1)
        return min(rule, seen.momentum)
    if cause in (NOISY, DRIFTING) and figures.stream is not None:
        # A larger one would not have forgotten the start when training ends.
        total = seen.total_updates
        largest = 0.999 if not total else min(0.999, FORGOTTEN ** (1 / total))
        best = figures.stream.best_momentum(largest)
        is_better = best > seen.momentum if cause == NOISY else best < seen.momentum
        return best if is_better else None
    return None


def advise(seen: Evidence, figures: Figures, cause: str, momentum: float | None) -> str:
    """The advice: what to do, with the numbers to do it with."""
    set_momentum = "" if momentum is None else f"set momentum={momentum:.3g}"
    if cause == WARMING_UP:
        needed = updates_to_forget(seen.momentum, FORGOTTEN)
        return (
            f"{figures.start_weight:.0%} of the start values is still in the moving "
            f"statistics: momentum {seen.momentum:g} needs {needed} updates to forget "
            f"them and has had {seen.updates}. Recalibrate before export "
            "(`recalibrate(model, x)` or `RecalibrateBatchNorm`), debias for free "
            f"(`DebiasBatchNorm`), or {set_momentum}."
        )
    if cause == DRIFTING:
        smaller = f", or {set_momentum}" if set_momentum else ""
        return (
            "The weights move faster than the moving statistics follow. Recalibrate "
            "before export and before validation (`recalibrate(model, x)` or "
            "`RecalibrateBatchNorm(x, when='validation')`), let the learning rate fall "
            f"towards the end{smaller}."
        )
    if cause == NOISY:
        larger = (
            f"{set_momentum[0].upper()}{set_momentum[1:]}, use" if momentum else "Use"
        )
        rest = ""
        if seen.last_batch_size and seen.batch_size:
            rest = (
                f" The last batch of an epoch has {seen.last_batch_size:.0f} examples "
                f"instead of {seen.batch_size:.0f} and weighs as much: drop it "
                "(`drop_remainder=True`)."
            )
        return (
            f"The moving statistics fluctuate by {figures.noise_part:.2g} standard "
            f"deviations from sampling alone: momentum {seen.momentum:g} averages too "
            f"few batches. {larger} larger batches, and recalibrate before export "
            f"(`recalibrate(model, x)`).{rest}"
        )
    if cause == CORRELATED_BATCHES:
        return (
            f"Batches are no random sample{_scatter(seen, figures)}. Shuffle the "
            "examples before batching (padding counts too: pass a mask); no momentum "
            "helps. Until then recalibrate over shuffled data "
            "(`recalibrate(model, x)`)."
        )
    if cause == TINY_BATCH:
        size = "so few" if seen.batch_size is None else f"{seen.batch_size:.0f}"
        return (
            f"Batches of {size} examples have no useful statistics, and recalibration "
            "cannot repair what was trained with them. Use larger batches, or another "
            "normaliser (`GroupNormalization`, `LayerNormalization`)."
        )
    if cause == OUTLIERS:
        return (
            "Rare extreme examples dominate the variance, which differs wildly from "
            "batch to batch. Clean or clip the data; recalibrate only then."
        )
    return _PLAIN_ADVICE.get(cause, "").format(
        fix="Set a momentum below 1. " if seen.momentum == 1 else ""
    )


def _scatter(seen: Evidence, figures: Figures) -> str:
    if figures.design_effect is None or seen.batch_size is None:
        return ""
    if figures.design_effect < 2:
        # Another layer proved it; this one's figure would belie the finding.
        return ""
    return (
        f": their means vary {figures.design_effect:.0f} times as much as those of "
        f"shuffled batches of {seen.batch_size:.0f}"
    )


_PLAIN_ADVICE = {
    INFERENCE_MODE: (
        "The statistics never changed in training, most likely since the layer ran in "
        "inference mode: pass `training` on to it, or freeze it with "
        "`layer.trainable = False`. Do not recalibrate: the weights have adapted to "
        "the statistics as they are."
    ),
    NOT_UPDATING: (
        "The layer trained on batch statistics, but its moving statistics never "
        "changed. {fix}Recalibrate before export (`recalibrate(model, x)`)."
    ),
    UNEXPECTED_UPDATE: (
        "The layer was meant to keep its statistics, yet training changes them: "
        "`trainable` is sure to count only after `compile`, and in `fit` a functional "
        "model overrides `training=False`. Set `layer.trainable = False`, then "
        "`compile`."
    ),
    MIXED_CALLS: (
        "One step calls the layer several times on inputs with different statistics, "
        "and one average is right for none of them. Use a layer for each, or "
        "concatenate the inputs into one batch; recalibration helps in part."
    ),
    WEIGHTS_REPLACED: (
        "The weights were replaced after the statistics were collected (averaged or "
        "restored weights). Recalibrate after the swap (`recalibrate(model, x)`, or "
        "`RecalibrateBatchNorm` as the last callback)."
    ),
    REPLICAS_DIFFER: (
        "Each replica keeps moving statistics of its own, and these differ, since the "
        "replicas see different data; a saved model holds the first replica's only. "
        "Use `BatchNormalization(synchronized=True)`, and recalibrate before export "
        "(`recalibrate(model, x)`), which gives all replicas the same."
    ),
    LOW_PRECISION: (
        "The statistics are stored in less than float32, where small updates are "
        "rounded away. Use a policy with float32 variables (such as 'mixed_bfloat16') "
        "and recalibrate (`recalibrate(model, x)`)."
    ),
    NON_FINITE: (
        "The moving statistics are NaN or infinite and stay so for good. Find the "
        "batch that did it, then `recalibrate(model, x)` heals the layer."
    ),
}

"""What the messages advise, as things to do to a case."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import kit
import numpy as np
import tensorflow as tf
from kit import Case, Run, compiled

from bn_callbacks import DebiasBatchNorm, RecalibrateBatchNorm, recalibrate
from bn_callbacks.layers import find, strategy

layers = keras.layers
BN = layers.BatchNormalization

Said = re.Match[str]


class Remedy(NamedTuple):
    """A remedy.

    Attributes:
        name: What it is.
        pattern: How advice offers it.
        follow: Trains a case as advised, given what the pattern has found.
        is_cure: Whether the loss must fall; else it must not rise.
    """

    name: str
    pattern: str
    follow: Callable[[Case, Said], Run]
    is_cure: bool = True


def halves(data: Any) -> tuple[Any, Any]:
    """The first and the second half of `(x, y)`."""
    half = len(data[1]) // 2
    return tuple(part[:half] for part in data), tuple(part[half:] for part in data)  # type: ignore[return-value]


def trained(case: Case, callbacks: Any = (), **changes: Any) -> Run:
    """A case, trained with other callbacks, data or options."""
    made = kit.build(case)
    made.fit(list(callbacks), **changes)
    return made


def with_momentum(case: Case, value: float) -> Run:
    assert value >= 0.5
    made = kit.build(case)
    for bn in find(made.model):
        bn.layer.momentum = value
    made.fit([])
    return made


class Falling(keras.callbacks.Callback):
    """Lets the learning rate fall to 0 in a straight line."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.first = float(self.model.optimizer.learning_rate)
        self.done, self.all = 0, self.params["steps"] * self.params["epochs"]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = self.first * (1 - self.done / self.all)
        self.done += 1


def with_callback(make: Callable[[Run], Any], **changes: Any) -> Any:
    def follow(case: Case, said: Said) -> Run:
        made = kit.build(case)
        made.fit([make(made)], **changes)
        return made

    return follow


def sample(run: Run) -> Any:
    """Inputs for recalibration."""
    return halves(run.probe)[0][0]


def recalibrated(case: Case, said: Said) -> Run:
    made = trained(case)
    recalibrate(made.model, sample(made), verbose=0)
    return made


def recalibrated_if_better(case: Case, said: Said) -> Run:
    made = trained(case)
    _, held_out = halves(made.probe)
    recalibrate(
        made.model,
        sample(made),
        batch_size=made.batch_size,
        validation_data=held_out,
        verbose=0,
    )
    return made


def before_each_validation(case: Case, said: Said) -> Run:
    made = kit.build(case)
    callback = RecalibrateBatchNorm(sample(made), when="validation")
    made.fit([callback], validation_data=halves(made.probe)[1])
    return made


def in_larger_batches(case: Case, said: Said) -> Run:
    return trained(case, batch_size=32 if case.expected == "tiny_batch" else 64)


def without_the_last_batch(case: Case, said: Said) -> Run:
    made = kit.build(case)
    x, y = made.fit.data
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1)
    data = data.batch(made.batch_size, drop_remainder=True)
    made.fit([], data=(data,), batch_size=None)
    return made


def compiled_anew(case: Case, said: Said) -> Run:
    return compiled_and_trained(kit.build(case))


def compiled_and_trained(run: Run) -> Run:
    compiled(run.model, run.model.optimizer, run.model.loss)
    run.fit([])
    return run


def on_another(run: Run, model: keras.Model) -> Run:
    """The same training of another model."""
    if not model.compiled:
        compiled_like(run.model, model)
    other = dataclasses.replace(run.fit, model=model)
    other([])
    return dataclasses.replace(run, model=model, fit=other)


def compiled_like(model: keras.Model, other: keras.Model) -> keras.Model:
    """The other model, compiled as this one is."""
    optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    return compiled(other, optimizer, model.loss)


def as_saved(model: keras.Model) -> keras.Model:
    """What somebody who loads the model gets: the first replica's values alone."""
    if strategy(model) is None:
        return model
    other = compiled_like(model, keras.models.clone_model(model))
    other.set_weights(model.get_weights())
    return other


def cloned(model: keras.Model, instead: Callable[[Any], Any]) -> keras.Model:
    """A new model like this one, with something else for each BN layer."""
    return keras.models.clone_model(
        model,
        clone_function=lambda layer: (
            instead(layer)
            if isinstance(layer, BN)
            else type(layer).from_config(layer.get_config())
        ),
    )


def in_place_of_bn(instead: Callable[[Any], Any]) -> Callable[[Case, Said], Run]:
    def follow(case: Case, said: Said) -> Run:
        made = kit.build(case)
        return on_another(made, cloned(made.model, instead))

    return follow


def changed(**config: Any) -> Callable[[Any], Any]:
    return lambda bn: BN.from_config(bn.get_config() | config)


def synchronized(case: Case, said: Said) -> Run:
    made = kit.build(case)
    with strategy(made.model).scope():
        other = cloned(made.model, changed(synchronized=True))
        compiled_like(made.model, other)
    return on_another(made, other)


REMEDIES = (
    Remedy(
        "momentum",
        r"[Ss]et momentum=([0-9.]*[0-9])",
        lambda case, said: with_momentum(case, float(said[1])),
    ),
    Remedy(
        "any momentum", "Set a momentum below 1", lambda c, _: with_momentum(c, 0.9)
    ),
    Remedy("debias", "`DebiasBatchNorm`", with_callback(lambda run: DebiasBatchNorm())),
    Remedy("shuffle", "Shuffle the examples", lambda c, _: trained(c, shuffle=True)),
    Remedy("larger batches", "[Uu]se larger batches", in_larger_batches),
    Remedy("drop", r"`drop_remainder=True`", without_the_last_batch),
    Remedy("compile", "then `compile`", compiled_anew),
    Remedy(
        "learning rate",
        "let the learning rate fall",
        with_callback(lambda run: Falling()),
    ),
    Remedy(
        "another normaliser",
        "`GroupNormalization`",
        in_place_of_bn(lambda bn: layers.GroupNormalization(1)),
    ),
    Remedy(
        "layer normalisation",
        "`LayerNormalization`",
        in_place_of_bn(lambda bn: layers.LayerNormalization()),
    ),
    Remedy(
        "float32", "'mixed_bfloat16'", in_place_of_bn(changed(dtype="mixed_bfloat16"))
    ),
    Remedy("synchronized", r"synchronized=True", synchronized),
    Remedy("recalibrate", r"`recalibrate\(model, x\)", recalibrated),
    Remedy(
        "recalibrate, measured",
        r"`recalibrate\(model, x, validation_data=",
        recalibrated_if_better,
        is_cure=False,
    ),
    Remedy(
        "recalibrate at the end",
        "`RecalibrateBatchNorm`",
        with_callback(lambda run: RecalibrateBatchNorm(sample(run))),
    ),
    Remedy(
        "recalibrate before validation", "when='validation'", before_each_validation
    ),
)


def clipped(case: Case, said: Said) -> Run:
    made = kit.build(case)
    x, y = made.fit.data
    made.fit([], data=(np.clip(x, *np.quantile(x, [0.005, 0.995], axis=0)), y))
    return made


def for_each_sensor(case: Case, said: Said) -> Run:
    """A layer for each of three inputs."""
    made = kit.build(case)
    inputs = keras.Input((3, 6))
    dense = layers.Dense(12, "tanh")
    parts = [dense(BN(momentum=0.98)(inputs[:, sensor])) for sensor in range(3)]
    z = layers.Dense(24, "relu")(layers.Concatenate()(parts))
    return on_another(made, keras.Model(inputs, layers.Dense(1)(z)))


def in_one_call(case: Case, said: Said) -> Run:
    """One layer, called once on all three inputs."""
    made = kit.build(case)
    inputs = keras.Input((3, 6))
    z = layers.Dense(12, "tanh")(BN(momentum=0.98)(inputs))
    z = layers.Dense(24, "relu")(layers.Flatten()(z))
    return on_another(made, keras.Model(inputs, layers.Dense(1)(z)))


def with_training(case: Case, said: Said) -> Run:
    """The step of Keras, which passes `training` on."""
    made = kit.build(case)
    return on_another(made, keras.Model(made.model.inputs[0], made.model.outputs[0]))


def frozen(case: Case, said: Said) -> Run:
    made = kit.build(case)
    for bn in find(made.model):
        bn.layer.trainable = False
    return compiled_and_trained(made)


SPECIAL = {
    "a_few_wild_rows": (Remedy("clip", "Clean, clip or regroup", clipped),),
    "one_layer_for_three_sensors": (
        Remedy("a layer for each", "Use a layer for each", for_each_sensor),
        Remedy("concatenate", "concatenate the inputs", in_one_call),
    ),
    "train_step_without_training": (
        Remedy("pass training on", "pass `training` on", with_training),
        Remedy("freeze", "or freeze it", frozen, is_cure=False),
    ),
}
"""What has to be done to one case in its own way."""

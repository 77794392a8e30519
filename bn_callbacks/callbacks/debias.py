"""`DebiasBatchNorm`: takes the start values out of the moving averages."""

import warnings
from typing import Any

import keras
import numpy as np

from bn_callbacks.layers import (
    Reader,
    assign,
    check_model,
    find,
    is_built,
    set_corrected,
    steps_per_execution,
    versions,
)
from bn_callbacks.report import BatchNormWarning
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import debias
from bn_callbacks.steps import StepCounter, announced_steps


class DebiasBatchNorm(keras.callbacks.Callback):
    """Debiases BN's moving averages before each validation and when training ends.

    After `t` updates the values that the averages began with still weigh `m^t`; this
    takes them out, `(moving − m^t·start) / (1 − m^t)`, as Adam does with its own
    averages (Kingma & Ba, 2015, arXiv 1412.6980). It costs nothing and needs no
    data. It cures `warming_up`, and does nothing for other causes.

    The averages go on from the debiased values. Of these, `m^t` is still the weight
    that a later debiasing takes out, so that the result at any time is the closed
    form over all batches since the start.

    A second `fit` with the same instance goes on where the first ended, unless the
    statistics have been written by others in between.

    Raises:
        BatchNormWarning: As a warning, where the number of training steps cannot be
            known, so that nothing can be debiased.

    Example:
    >>> import keras, numpy as np
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((4,)),
    ...         keras.layers.BatchNormalization(),
    ...         keras.layers.Dense(1),
    ...     ]
    ... )
    >>> model.compile("sgd", "mse")
    >>> x, y = np.full((320, 4), 3.0), np.ones((320, 1))
    >>> history = model.fit(x, y, verbose=0, callbacks=[DebiasBatchNorm()])
    >>> model.layers[0].moving_mean.numpy().round(4).tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_fitting = False
        self._reader: Reader | None = None
        self._anchor = np.zeros(0)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        check_model(self.model)
        self._is_fitting = True
        self._has_warned = False
        self._counter = StepCounter()
        set_corrected(self.model, True)
        if is_built(self.model):
            self._begin()

    def _begin(self) -> None:
        layers = find(self.model)
        reader = Reader(self.model, layers) if layers else None
        is_same = self._reader is not None and [
            bn.layer for bn in self._reader.layers
        ] == [bn.layer for bn in layers]
        if reader is None:
            self._reader = None
            return
        _, now = reader()
        if not (is_same and np.array_equal(now, self._anchor)):
            self._anchor = now
            self._weights = np.ones(len(layers))
        self._reader = reader
        self._steps: int | None = 0
        self._versions = versions(layers)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._counter.begin_epoch()

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._reader is None:
            return
        if not self._counter.has_begun:
            self._counter.set_origin(self._reader()[0])
        self._counter.begin_batch(batch)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._is_fitting:
            self._end_epoch()
            self._debias()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._end_epoch()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._is_fitting = False
        set_corrected(self.model, False)
        self._debias()

    def _end_epoch(self) -> None:
        if self._reader is None or not self._counter.has_begun:
            return
        made = self._counter.finish(
            self._reader()[0],
            announced_steps(self.params),
            steps_per_execution(self.model),
        )
        known = made is not None and self._steps is not None
        self._steps = self._steps + made if known else None  # type: ignore[operator]
        self._counter.begin_epoch()

    def _debias(self) -> None:
        if self._reader is None or self._steps == 0:
            return
        if self._steps is None:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    "DebiasBatchNorm cannot know how many steps were made, and leaves "
                    "the statistics as they are. Received: steps=None. Pass "
                    "`steps_per_epoch` to `fit`, or recalibrate instead.",
                    BatchNormWarning,
                    stacklevel=2,
                )
            return
        layers = self._reader.layers
        self._drop_foreign()
        _, now = self._reader()
        chosen, values = [], []
        for index, bn in enumerate(layers):
            self._weights[index] *= bn.momentum ** (self._steps * bn.calls)
            weight = float(self._weights[index])
            if weight == 1 or not bn.trainable:
                continue
            mean, second = (
                debias(value, start, weight)
                for value, start in zip(
                    self._reader.averages(now, index),
                    self._reader.averages(self._anchor, index),
                    strict=True,
                )
            )
            statistics = bn.statistics(np.stack([mean, second]))
            if all(np.isfinite(part).all() for part in statistics):
                chosen.append(bn)
                values.append(
                    Statistics(statistics.mean, np.maximum(statistics.variance, 0))
                )
        assign(chosen, values, in_training=False)
        self._anchor = self._reader()[1]
        self._versions = versions(layers)
        self._steps = 0

    def _drop_foreign(self) -> None:
        """What others have written is no start value to be taken out."""
        assert self._reader is not None
        current = versions(self._reader.layers)
        for index, version in enumerate(self._versions):
            if current[index] != version:
                self._weights[index] = 0.0

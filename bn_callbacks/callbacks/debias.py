"""`DebiasBatchNorm`: removes the start values from the moving averages."""

from typing import Any

from bn_callbacks.callbacks.base import BatchNormCallback
from bn_callbacks.callbacks.peers import peers_of
from bn_callbacks.layers import find, is_built
from bn_callbacks.report import BatchNormWarning
from bn_callbacks.warn import warn
from bn_callbacks.watching.start_values import StartValues
from bn_callbacks.watching.steps import StepCounter


class DebiasBatchNorm(BatchNormCallback):
    """Debiases BN's moving averages before each validation and when training ends.

    After `t` updates with momentum `m`, the start values still have the weight `m^t`.
    This callback removes them, `(moving − m^t·start) / (1 − m^t)`, as Adam does with
    its own averages (Kingma & Ba, 2015, arXiv 1412.6980). It costs nothing and needs
    no data. It cures `warming_up`, and does nothing for other causes.

    Training continues from the debiased values. The callback remembers their weight,
    so the result is at any time the weighted mean of all batches since the start.

    A second `fit` with the same instance continues where the first ended, unless
    something else has written the statistics in between.

    Raises:
        BatchNormWarning: As a warning, if the callback cannot count the training
            steps. It then leaves the statistics as they are.

    Examples:
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
        self._starts: StartValues | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._has_warned = self._has_news = False
        self._counter = StepCounter(self.model, self.params)
        before, self._starts = self._starts, None
        if is_built(self.model):
            self._starts = StartValues(self.model, find(self.model), before=before)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        peers_of(self.model).debiases = True
        self._counter.begin_epoch()

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        is_first = not self._counter.has_begun
        is_late = self._starts is None
        self._counter.begin_batch(batch)
        starts = self._find_starts()
        if starts is not None:
            if is_first:
                self._counter.observe(*starts.reread())
                starts.watch_calls()
            elif is_late or self._counter.needs_reading:
                self._counter.observe(*starts.read())

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._is_fitting:
            self._end_epoch()
            self._debias()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._end_epoch()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        self._debias()

    def _find_starts(self) -> StartValues | None:
        if self._starts is None and is_built(self.model):
            # The first step of training has built the model.
            self._starts = StartValues(self.model, find(self.model), is_late=True)
        return self._starts

    def _end_epoch(self) -> None:
        starts = self._find_starts()
        if starts is not None and self._counter.has_begun:
            starts.advance(self._counter.finish(*starts.read()))
            self._has_news = True
        self._counter.begin_epoch()

    def _debias(self) -> None:
        if self._starts is None or not self._has_news:
            return
        self._has_news = False
        self._starts.write_debiased()
        if not self._starts.is_known and not self._has_warned:
            self._has_warned = True
            warn(
                "DebiasBatchNorm cannot count the updates, and leaves the statistics "
                "as they are. Received: an unknown number of steps or of updates per "
                "step, or a count that would leave a negative variance. Pass "
                "`steps_per_epoch` to `fit`, or recalibrate instead.",
                BatchNormWarning,
            )

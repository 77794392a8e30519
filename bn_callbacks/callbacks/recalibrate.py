"""`RecalibrateBatchNorm`: recalibrates in `fit`."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import keras

from bn_callbacks.arguments import check_whole, is_word, shown
from bn_callbacks.callbacks.base import BatchNormCallback, say_nothing_to_do
from bn_callbacks.callbacks.peers import peers_of
from bn_callbacks.layers import (
    LayerSelection,
    count_inputs,
    find,
    give_back,
    is_built,
    iterations,
    leave_evaluations,
    lend,
    uses_ema,
    watch_evaluations,
)
from bn_callbacks.measuring.data import Batches
from bn_callbacks.recalibration import Recalibration, check_options
from bn_callbacks.report import RecalibrationReport


class RecalibrateBatchNorm(BatchNormCallback):
    """Recalibrates a model's BN statistics in `fit`, for export or validation.

    It does what `recalibrate` describes. Unfrozen BN layers train on the statistics of
    batches, so recalibrating does not disturb the training.

    List it after callbacks that exchange weights, such as
    `EarlyStopping(restore_best_weights=True)` and `SwapEMAWeights`: the weights that
    they restore at the end of training would overwrite the new statistics.

    Args:
        x: Training data as `fit` takes them.
        batch_size: Samples per batch of arrays; 32 by default.
        steps: Number of batches to use; all by default.
        tolerance: As in `recalibrate`; by default `"auto"`, which reads all data when
            training ends; for a validation and at an epoch's end it stops at a
            standard error of 0.01, or after 2,048 samples or a seventh of the data,
            whichever is more: at most about a tenth of an epoch's time from 20,000
            samples on. Arrays and `PyDataset`s are read in random order; shuffle
            datasets and generators yourself, or their first part is no sample of all.
        refine: As in `recalibrate`; `"auto"` by default.
        dropout: As in `recalibrate`; `False` by default.
        layers: As in `recalibrate`; by default the layers that `fit` updates.
        validation_data: As in `recalibrate`; none by default.
        when: `"train_end"`, the default: once, when training ends, after the optimizer
            has put averaged weights into the model. `"validation"`: for each validation
            too; after it the callback restores the moving averages, which continue
            undisturbed. `"epoch_end"`: at each epoch's end, after validation, so that
            checkpoints hold the new statistics, and once more when training ends.
        verbose: 0, the default, is silent; 1, and `"auto"`, show progress and results.

    Attributes:
        report: The last `RecalibrationReport`; None before the first.

    Raises:
        ValueError: An argument is none of those above, or `recalibrate` raises it.

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
        >>> x, y = np.random.default_rng(0).normal(5, 1, (320, 4)), np.ones((320, 1))
        >>> callback = RecalibrateBatchNorm(x)
        >>> history = model.fit(x, y, verbose=0, callbacks=[callback])
        >>> callback.report.committed
        True
    """

    _DATA = ("x", "validation_data")

    def __init__(
        self,
        x: Any,
        batch_size: int | None = None,
        steps: int | None = None,
        tolerance: float | Literal["auto"] | None = "auto",
        refine: int | Literal["auto"] = "auto",
        dropout: bool = False,
        layers: LayerSelection = None,
        validation_data: Any = None,
        when: Literal["train_end", "validation", "epoch_end"] = "train_end",
        verbose: int | Literal["auto"] = 0,
    ) -> None:
        super().__init__()
        if not is_word(when, "train_end", "validation", "epoch_end"):
            raise ValueError(
                "`when` must be 'train_end', 'validation' or 'epoch_end'. Received: "
                f"when={shown(when)}."
            )
        is_auto = is_word(tolerance, "auto")
        check_options(refine, None if is_auto else tolerance, dropout, verbose)
        check_whole("batch_size", batch_size)
        check_whole("steps", steps)
        self.x = x
        self.batch_size = batch_size
        self.steps = steps
        self.tolerance = tolerance
        self.refine = refine
        self.dropout = dropout
        self.layers = layers
        self.validation_data = validation_data
        self.when = when
        self.verbose = verbose
        self.report: RecalibrationReport | None = None
        self._batches: list[Batches] = []
        self._recalibrations: dict[bool, Recalibration] = {}
        self._has_nothing_to_do = False

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        # A user's own training loop may have ended without `on_test_end`.
        give_back(model, is_late=True)
        leave_evaluations(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self.report = None
        self._recalibrations = {}
        self._has_nothing_to_do = False
        if is_built(self.model):
            # Finds mistakes in the arguments before hours of training.
            self._prepare()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        peers_of(self.model).recalibrates = True
        if self.when == "validation":
            watch_evaluations(self.model)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._is_fitting and self.when == "validation":
            with lend(self.model):
                self._recalibrate(is_brief=True)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._is_fitting:
            give_back(self.model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self.when == "epoch_end":
            self._recalibrate(is_brief=True)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        leave_evaluations(self.model)
        # The last epoch's end did it, unless it read only a part of the data, or the
        # optimizer has put averaged weights in since.
        is_done = self.when == "epoch_end" and self.tolerance != "auto"
        if not is_done or uses_ema(self.model):
            self._recalibrate()
        self._recalibrations = {}

    def _copied(self, copied: Callable[[Any], Any]) -> BatchNormCallback:
        new = super()._copied(copied)
        if isinstance(self.x, Iterator) and isinstance(new, RecalibrateBatchNorm):
            # Copies share the batches, since a generator can be read only once.
            new._batches = self._batches
        return new

    def _prepare(self, is_brief: bool = False) -> Recalibration | None:
        """The recalibration; None for a model without BN layers."""
        is_brief = is_brief and self.tolerance == "auto"
        if is_brief not in self._recalibrations and not self._has_nothing_to_do:
            if not find(self.model):
                self._has_nothing_to_do = True
                say_nothing_to_do(self, "recalibrate")
                return None
            if not self._batches:
                # Kept, since a generator can be read only once.
                self._batches.append(
                    Batches(
                        self.x,
                        batch_size=self.batch_size,
                        steps=self.steps,
                        inputs=count_inputs(self.model),
                    )
                )
            self._recalibrations[is_brief] = Recalibration(
                self.model,
                self._batches[0],
                tolerance=None if self.tolerance == "auto" else self.tolerance,
                refine=self.refine,
                dropout=self.dropout,
                layers=self.layers,
                validation_data=self.validation_data,
                is_brief=is_brief,
            )
        return self._recalibrations.get(is_brief)

    def _recalibrate(self, is_brief: bool = False) -> None:
        recalibration = self._prepare(is_brief)
        if recalibration is None:
            return
        if self.verbose:
            print("\nRecalibrating BatchNormalization")
        self.report = recalibration.run(self.verbose)
        writer = peers_of(self.model).writer
        if writer is not None:
            writer.mark(self.report, iterations(self.model))

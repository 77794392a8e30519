"""What the callbacks of one `fit` let each other know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import keras

if TYPE_CHECKING:
    from bn_callbacks.tensorboard import ReportWriter


@dataclass(eq=False)
class Company:
    """The callbacks of this library that share a `fit`, whatever their order.

    All of them call `gather` in `on_train_begin`, which forgets the `fit` before,
    however it ended; they say what they do in `on_epoch_begin`.

    Args:
        recalibrates: Whether one recalibrates at the end.
        debiases: Whether one debiases at the end.
        writer: Where recalibrations leave a mark.
    """

    recalibrates: bool = False
    debiases: bool = False
    writer: ReportWriter | None = None


_companies: WeakKeyDictionary[keras.Model, Company] = WeakKeyDictionary()


def gather(model: keras.Model) -> None:
    """Begins anew: nothing is known of the others yet."""
    _companies[model] = Company()


def company(model: keras.Model) -> Company:
    """Those who share the `fit` of this model."""
    return _companies.setdefault(model, Company())

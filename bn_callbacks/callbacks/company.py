"""What the callbacks of one `fit` let each other know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakKeyDictionary, ref

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


@dataclass(eq=False)
class _List:
    """The callbacks of this library in one list, in its order."""

    members: list[ReferenceType[keras.callbacks.Callback]] = field(default_factory=list)
    is_complete: bool = False


_lists: WeakKeyDictionary[keras.Model, _List] = WeakKeyDictionary()


def enlist(model: keras.Model, callback: keras.callbacks.Callback) -> None:
    """Notes a callback that is given a model, as all of a list are before any hook."""
    current = _lists.get(model)
    if current is None or current.is_complete:
        current = _lists[model] = _List()
    current.members.append(ref(callback))


def complete_list(model: keras.Model) -> None:
    """Notes that all of a list have been given the model."""
    if model in _lists:
        _lists[model].is_complete = True


def listed(model: keras.Model) -> list[keras.callbacks.Callback]:
    """Those that were given the model together."""
    found = [member() for member in _lists.get(model, _List()).members]
    return [member for member in found if member is not None]

"""How the library's callbacks in one `fit` find out about each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakKeyDictionary, ref

import keras

if TYPE_CHECKING:
    from bn_callbacks.tensorboard import ReportWriter


@dataclass(eq=False)
class Peers:
    """What the library's callbacks in one `fit` do, whatever their order.

    Each of them calls `forget_peers` in `on_train_begin`, which drops what an earlier
    `fit` left, and says what it does in `on_epoch_begin`.

    Args:
        recalibrates: Whether one of them recalibrates at the end.
        debiases: Whether one of them debiases at the end.
        writer: Marks recalibrations in TensorBoard's files; None without a log
            directory.
    """

    recalibrates: bool = False
    debiases: bool = False
    writer: ReportWriter | None = None


_peers: WeakKeyDictionary[keras.Model, Peers] = WeakKeyDictionary()


def forget_peers(model: keras.Model) -> None:
    """Drops what the callbacks of an earlier `fit` said."""
    _peers[model] = Peers()


def peers_of(model: keras.Model) -> Peers:
    """What the callbacks in this model's `fit` do."""
    return _peers.setdefault(model, Peers())


@dataclass(eq=False)
class _List:
    """The library's callbacks in one list, in its order."""

    members: list[ReferenceType[keras.callbacks.Callback]] = field(default_factory=list)
    is_complete: bool = False


_lists: WeakKeyDictionary[keras.Model, _List] = WeakKeyDictionary()


def enlist(model: keras.Model, callback: keras.callbacks.Callback) -> None:
    """Notes that a callback got a model. All of a list get it before any hook runs."""
    current = _lists.get(model)
    if current is None or current.is_complete:
        current = _lists[model] = _List()
    current.members.append(ref(callback))


def complete_list(model: keras.Model) -> None:
    """Notes that all callbacks of a list have got the model."""
    if model in _lists:
        _lists[model].is_complete = True


def listed(model: keras.Model) -> list[keras.callbacks.Callback]:
    """The library's callbacks that got the model in the same list."""
    found = [member() for member in _lists.get(model, _List()).members]
    return [member for member in found if member is not None]

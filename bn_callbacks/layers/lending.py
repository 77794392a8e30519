"""Lends a model other statistics for one evaluation.

After an exception Keras calls neither `on_test_end` nor `on_train_end`. But `fit`
validates with `self.evaluate`, and a `finally` around that runs whatever happens
inside: in a hook, in the data, in the model, or on Ctrl-C.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np

from bn_callbacks.layers.find import find
from bn_callbacks.layers.state import Snapshot, restore, snapshot


class _Lender:
    """What is lent to one model.

    Attributes:
        depth: Number of nested calls of `evaluate` that are running.
        own: The model's own statistics, while it has others.
        lent: The others.
        lent_at: The depth of the call for which they were lent.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.own: Snapshot | None = None
        self.lent: Snapshot | None = None
        self.lent_at = 0


_lenders: WeakKeyDictionary[keras.Model, _Lender] = WeakKeyDictionary()


def watch_evaluations(model: keras.Model) -> None:
    """Makes every evaluation end with the statistics that it began with."""
    lender = _lenders.setdefault(model, _Lender())
    evaluate = model.evaluate
    if hasattr(evaluate, "instead_of"):
        return

    @functools.wraps(evaluate)
    def watched(*args: Any, **kwargs: Any) -> Any:
        lender.depth += 1
        try:
            return evaluate(*args, **kwargs)
        finally:
            try:
                _end(model, lender)
            except BaseException:
                # Ctrl-C may come here as well.
                _end(model, lender)
                raise

    # An attribute that has replaced the method before, if any.
    watched.instead_of = vars(model).get("evaluate")  # type: ignore[attr-defined]
    # Not by `setattr`: Keras would search the function for variables.
    vars(model)["evaluate"] = watched


def _end(model: keras.Model, lender: _Lender) -> None:
    if lender.lent_at >= lender.depth:
        give_back(model)
    lender.depth -= 1


def leave_evaluations(model: keras.Model) -> None:
    """Undoes `watch_evaluations`."""
    watched = vars(model).get("evaluate")
    if hasattr(watched, "instead_of"):
        del vars(model)["evaluate"]
        if watched.instead_of is not None:
            vars(model)["evaluate"] = watched.instead_of


@contextlib.contextmanager
def lend(model: keras.Model) -> Iterator[None]:
    """Lends what the block writes into the model, until `give_back`."""
    lender = _lenders.setdefault(model, _Lender())
    if lender.own is None:
        lender.lent_at = lender.depth
        lender.own = snapshot(find(model))
    yield
    lender.lent = snapshot(find(model))


def give_back(model: keras.Model, *, is_late: bool = False) -> None:
    """Restores what the model had before `lend`, unless that has been done.

    Args:
        model: The model.
        is_late: Whether the evaluation ended some time ago. Statistics that others have
            written since then stay.
    """
    lender = _lenders.get(model)
    if lender is None or lender.own is None:
        return
    if not is_late or _is_still(lender.lent):
        restore(lender.own)
    lender.own = lender.lent = None
    lender.lent_at = 0


def _is_still(saved: Snapshot | None) -> bool:
    return saved is not None and all(
        np.array_equal(part.numpy(), value, equal_nan=True)
        for part, value in saved.state
    )

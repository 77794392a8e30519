"""Lending a model other statistics for the length of one evaluation.

After an exception Keras calls no hook any more, neither `on_test_end` nor
`on_train_end`. But `fit` validates by `self.evaluate`, and a `finally` around that is
passed whatever happens inside: in a hook, in the data, in the model, or on Ctrl-C.
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
        depth: Calls of `evaluate` that run, one within the other.
        own: The model's own statistics, while others are in their place.
        lent: Those others.
        lent_at: The depth of the call that got the loan.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.own: Snapshot | None = None
        self.lent: Snapshot | None = None
        self.lent_at = 0


_lenders: WeakKeyDictionary[keras.Model, _Lender] = WeakKeyDictionary()


def watch_evaluations(model: keras.Model) -> None:
    """From now on, an evaluation ends with the statistics that it began with."""
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

    # What stood in the place of the method before, if anything did.
    watched.instead_of = vars(model).get("evaluate")  # type: ignore[attr-defined]
    # Past Keras, which would look for variables in whatever becomes an attribute.
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
    """What is written into the model inside is lent, until `give_back`."""
    lender = _lenders.setdefault(model, _Lender())
    if lender.own is None:
        lender.lent_at = lender.depth
        lender.own = snapshot(find(model))
    yield
    lender.lent = snapshot(find(model))


def give_back(model: keras.Model, *, is_late: bool = False) -> None:
    """Puts back what the model had before `lend`, if that has not been done yet.

    Args:
        model: The model.
        is_late: Whether the evaluation has ended some time ago, and others may have
            written statistics since then, which stay.
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

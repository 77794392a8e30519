"""The base class of the callbacks, which knows whether its own `fit` is running."""

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from bn_callbacks.arguments import shown
from bn_callbacks.callbacks.peers import complete_list, enlist, forget_peers, listed
from bn_callbacks.layers import check_keras, check_model, team_of
from bn_callbacks.report import BatchNormReport, BatchNormWarning
from bn_callbacks.warn import warn


class BatchNormCallback(keras.callbacks.Callback):
    """A callback that knows whether its own `fit` is running.

    `evaluate` and `predict` call these hooks too, and after an exception `fit` calls
    none. But Keras first gives the model to its callbacks each time: so `set_model`
    ends an earlier `fit`, however that went.

    A callback can be copied and pickled at any time. The copy has the same arguments
    and shares their data; it does not take over the state of a running `fit`.

    One instance serves one `fit` at a time.
    """

    _DATA: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[str, Any] | None = None
        self._is_fitting = False
        self._thread: int | None = None

    def set_model(self, model: keras.Model) -> None:
        if self._is_fitting and is_in_fit(self._thread):
            raise RuntimeError(
                f"This {type(self).__name__} already runs in a `fit` of another "
                f"thread. Received: a second `fit`, of model {model.name!r}. Give each "
                "`fit` a callback of its own, such as copy.deepcopy(callback)."
            )
        # Keras 2 calls this before any method that Keras 3's callbacks lack.
        check_keras(model)
        self._is_fitting = False
        super().set_model(model)
        enlist(model, self)

    def set_params(self, params: dict[str, Any]) -> None:
        super().set_params(params)
        if self.model is not None:
            complete_list(self.model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        check_model(self.model)
        forget_peers(self.model)
        together = listed(self.model)
        if together and together[0] is self:
            # Workers with different callbacks would wait for each other for ever.
            lines = [
                line for i, each in enumerate(together) for line in _lines(i, each)
            ]
            team_of(self.model).check_same("callbacks", lines)
        self._is_fitting = True
        self._thread = threading.get_ident()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._is_fitting = False

    def __getstate__(self) -> dict[str, Any]:
        private = _private_names(type(self))
        state = {name: v for name, v in vars(self).items() if name not in private}
        return {**state, "params": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # `__init__` of our own class: a subclass may take other arguments.
        ours = next(kind for kind in type(self).__mro__ if _is_ours(kind))
        names = list(inspect.signature(ours).parameters)
        self.__dict__.update(vars(ours(**{name: state[name] for name in names})))
        self.__dict__.update(state)

    def __copy__(self) -> "BatchNormCallback":
        return self._copied(lambda value: value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchNormCallback":
        return self._copied(lambda value: copy.deepcopy(value, memo))

    def _copied(self, copied: Callable[[Any], Any]) -> "BatchNormCallback":
        new = type(self).__new__(type(self))
        new.__setstate__(
            {
                name: value if name in self._DATA else copied(value)
                for name, value in self.__getstate__().items()
            }
        )
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        for name in self._DATA:
            data = getattr(self, name)
            if isinstance(data, (Iterator, tf.data.Dataset)):
                raise TypeError(
                    f"A {type(self).__name__} cannot be pickled with data that cannot. "
                    f"Received: {name} of type {type(data).__name__}. Pass arrays or a "
                    "keras.utils.PyDataset, or make the callback where it is used."
                )
        return super().__reduce_ex__(protocol)


_FREE = {"verbose", "max_charts"}
"""Arguments that only the chief uses, so that workers may differ in them."""


def _lines(index: int, callback: Any) -> Iterator[str]:
    """Lines that describe a callback; they must be equal on all workers."""
    ours = next(kind for kind in type(callback).__mro__ if _is_ours(kind))
    name = f"callback {index}, {type(callback).__name__}"
    yield name
    for argument in inspect.signature(ours).parameters:
        if argument not in _FREE:
            yield f"{name}: {argument}={_comparable(argument, callback)}"


def _comparable(argument: str, callback: Any) -> str:
    value = getattr(callback, argument)
    # Workers have their own data, and may have their own directories.
    if argument in (*callback._DATA, "log_dir") or callable(value):
        return "None" if value is None else "given"
    return shown(value)


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _private_names(kind: type) -> set[str]:
    """Private attributes of Keras' callbacks and ours, without those of a subclass."""
    functions = [
        function.__code__
        for each in kind.__mro__
        if _is_ours(each) or each.__module__.startswith("keras.")
        for function in vars(each).values()
        if inspect.isfunction(function)
    ]
    names = {name for code in functions for name in code.co_names}
    return {name for name in names if name.startswith("_")}


def is_in_fit(thread: int | None) -> bool:
    """Whether the thread is running a `fit` now, and is not the current one."""
    if thread is None or thread == threading.get_ident():
        return False
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "fit":
            return True
        frame = frame.f_back
    return False


def say_nothing_to_do(callback: BatchNormCallback, verb: str) -> None:
    """Prints that a model has no BN layer, which is no error: users try many models."""
    print(
        f"{type(callback).__name__}: model {callback.model.name!r} has no "
        f"BatchNormalization layer; there is nothing to {verb}."
    )


def warn_of_unknown(report: BatchNormReport, params: Mapping[str, Any] | None) -> None:
    """Warns that some layers could not be measured, and says why."""
    steps = (params or {}).get("steps")
    warn(
        f"{len(report.unknown)} of {len(report.layers)} BatchNormalization layers "
        "could not be measured in this epoch, and may lag: it is not known how many "
        f"training steps were made. Received: data that ended before steps={steps} "
        "were made. Pass `steps_per_epoch` that the data have, or use audit().",
        BatchNormWarning,
    )

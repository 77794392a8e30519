"""Observes how often one training step calls each BN layer.

In a graph of layers the calls could be counted, in a custom `train_step` they cannot:
SimCLR calls its encoder on two views, a GAN its discriminator on two kinds of pictures.
So this module watches the layers while the first step of a training is traced, or run
if it is not traced. Watching changes nothing that is computed.
"""

import contextlib
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf

from bn_callbacks.layers.facts import has_own_train_step
from bn_callbacks.layers.find import BatchNormLayer
from bn_callbacks.layers.own_call import OwnCall, own_call


@dataclass(frozen=True)
class Calls:
    """What one training step does with a BN layer; None for what was not seen.

    Args:
        updates: How often it updates the moving averages.
        is_called: Whether it calls the layer.
        trains: Whether a call uses the statistics of a batch.
    """

    updates: int | None
    is_called: bool | None = None
    trains: bool | None = None


STEP = "one_step_on_data"
"""What Keras calls the function that it traces for one training step."""


@dataclass(eq=False)
class _Tally:
    """The calls in one traced function, or of all that runs untraced."""

    graph: Any
    called: Counter[keras.layers.Layer] = field(default_factory=Counter)
    updated: Counter[keras.layers.Layer] = field(default_factory=Counter)
    told: set[keras.layers.Layer] = field(default_factory=set)
    unsure: set[keras.layers.Layer] = field(default_factory=set)


class CallWatch:
    """Watches a model's BN layers during its first training step.

    Args:
        model: The model in training.
        layers: Its BN layers.
    """

    def __init__(self, model: keras.Model, layers: Sequence[BatchNormLayer]) -> None:
        self._model = model
        self._layers = list(layers)
        self._thread = threading.current_thread()
        # The keys: name of the outermost function, and thread of the replica.
        self._tallies: dict[tuple[str, int], _Tally] = {}
        self.is_watching = False

    def begin(self) -> None:
        """Begins to watch, until `end`."""
        self._tallies.clear()
        self.is_watching = True
        for bn in self._layers:
            listeners = _listeners.setdefault(bn.layer, [])
            if not listeners:
                _replace(bn.layer, listeners)
            listeners.append(self)

    def end(self, steps: int) -> None:
        """Stops watching, and keeps what was seen for the next training.

        Args:
            steps: Steps made since `begin`.
        """
        self.is_watching = False
        for bn in self._layers:
            listeners = _listeners.get(bn.layer, [])
            if self in listeners:
                listeners.remove(self)
                if not listeners:
                    _restore(bn.layer)
        is_fit = any(name == STEP for name, _ in self._tallies)
        parts: dict[str, _Tally] = {}
        for (name, _), tally in self._tallies.items():
            if not is_fit or name == STEP:
                # All replicas do the same, each in its own thread: one is enough.
                parts.setdefault(name, tally)
        if not parts or not steps:
            return
        total = _Tally(None)
        for name, tally in parts.items():
            runs = steps if name == UNTRACED else 1
            for layer, count in tally.updated.items():
                total.updated[layer] += count // runs
                if count % runs:
                    total.unsure.add(layer)
            total.called.update(tally.called)
            total.unsure |= tally.unsure
            total.told |= tally.told
        function = getattr(self._model, "train_function", None) if is_fit else None
        _seen[self._model] = function, total

    def note(
        self, layer: keras.layers.Layer, is_update: bool, is_told: bool = False
    ) -> None:
        """Counts a call of the layer, or an update of its statistics.

        Args:
            layer: The layer.
            is_update: Whether it is an update.
            is_told: Whether the call has `training=True`.
        """
        if getattr(_own, "is_calling", False):
            return
        graphs = _graphs()
        root = next((each for each in graphs if each.name == STEP), None)
        if root is None:
            # Calls from other threads count only if they are replicas of `fit`.
            if threading.current_thread() is not self._thread:
                return
            root = graphs[-1] if graphs else None
        name = UNTRACED if root is None else root.name
        key = name, threading.get_ident()
        tally = self._tallies.get(key)
        if tally is None or tally.graph is not root:
            # TensorFlow traces a function again if the first trace made variables.
            if name == STEP:
                old = [k for k, v in self._tallies.items() if v.graph is not root]
                for each in (each for each in old if each[0] == STEP):
                    del self._tallies[each]
            self._tallies[key] = tally = _Tally(root)
        (tally.updated if is_update else tally.called)[layer] += 1
        if is_told:
            tally.told.add(layer)
        # In a loop or an inner function, one traced update may run several times.
        if is_update and graphs and graphs[0] is not root:
            tally.unsure.add(layer)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Inside, calls do not count: this library makes them, not a training."""
    before = getattr(_own, "is_calling", False)
    _own.is_calling = True
    try:
        yield
    finally:
        _own.is_calling = before


_own = threading.local()

_listeners: WeakKeyDictionary[keras.layers.Layer, list[CallWatch]] = WeakKeyDictionary()
_NAMES = {"call": False, "_moments": True}

COUNTING = "is_counting"
"""Marks a replacement of a method that only counts its calls."""


def _replace(layer: keras.layers.Layer, listeners: list[CallWatch]) -> None:
    """Replaces a layer's methods by counting ones, without `__setattr__`'s effects."""

    def counting(own: Callable[..., Any], is_update: bool) -> Callable[..., Any]:
        @functools.wraps(own)
        def counted(*args: Any, **kwargs: Any) -> Any:
            told = not is_update and _is_told(own, args, kwargs)
            for each in list(listeners):
                each.note(layer, is_update, told)
            return own(*args, **kwargs)

        setattr(counted, COUNTING, True)
        return counted

    for name, is_update in _NAMES.items():
        if name not in vars(layer):
            vars(layer)[name] = counting(getattr(layer, name), is_update)


def _is_told(call: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    given = inspect.signature(call).bind_partial(*args, **kwargs).arguments
    return given.get("training") is True


def _restore(layer: keras.layers.Layer) -> None:
    for name in _NAMES:
        if hasattr(vars(layer).get(name), COUNTING):
            del vars(layer)[name]


UNTRACED = ""
"""In place of a function's name, for what runs untraced."""


def _graphs() -> list[Any]:
    """The functions that are being traced, the innermost first."""
    graph: Any = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    graphs = []
    while getattr(graph, "outer_graph", None) is not None:
        graphs.append(graph)
        graph = graph.outer_graph
    return graphs


# For each model, its train function and what was seen when it was traced.
_seen: WeakKeyDictionary[keras.Model, tuple[Any, _Tally]] = WeakKeyDictionary()


def calls_of(model: keras.Model, layers: Sequence[BatchNormLayer]) -> list[Calls]:
    """What a training step does with each layer, as far as that was seen.

    If the step was traced before anything watched, calls are counted in the graph of
    layers; with a custom `train_step` they are unknown.
    """
    function, tally = _seen.get(model, (None, None))
    current = getattr(model, "train_function", None)
    if tally is None or function not in (None, current):
        is_own = has_own_train_step(model)
        return [Calls(None if is_own else bn.calls) for bn in layers]
    found = []
    for bn in layers:
        count = tally.updated[bn.layer]
        is_sure = bn.layer not in tally.unsure
        found.append(
            Calls(
                updates=(count or bn.calls) if is_sure else None,
                is_called=tally.called[bn.layer] > 0 or count > 0,
                trains=count > 0 or _trains_silently(bn, bn.layer in tally.told),
            )
        )
    return found


def _trains_silently(bn: BatchNormLayer, is_told: bool) -> bool | None:
    """Whether a layer uses the batch, but computes its statistics by itself."""
    kind = own_call(bn.layer)
    if kind in (OwnCall.ASKS, OwnCall.NEVER) or not (is_told and bn.trainable):
        return False
    return True if kind is OwnCall.ALIKE else None

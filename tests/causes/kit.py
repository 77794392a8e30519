"""What a case is, what the cases are built of, and how one is run and judged."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks import BatchNormLagWarning, BatchNormMonitor

Array = NDArray[Any]
Callbacks = list[keras.callbacks.Callback]


@dataclass(frozen=True)
class Run:
    """A compiled model, ready to be trained.

    Args:
        model: The model, after what training without the monitor came before.
        fit: Trains it with the callbacks given.
        probe: A sample `(x, y)` of the training data, in the order of training.
        batch_size: Examples in a batch of that training.
    """

    model: keras.Model
    fit: Callable[[Callbacks], Any]
    probe: tuple[Any, Any]
    batch_size: int = 32


@dataclass(frozen=True)
class Case:
    """A training that has one known trouble, or none.

    Args:
        name: What it is.
        expected: The cause that the monitor is to name; None for silence.
        held_back: Whether the diagnosis must not be tuned on it.
        build: Makes the model and the data.
        gap: Bounds of the loss gap on the training's own batches, which prove that
            the case is what it says; None where a gap says nothing.
        scored: False where no cause of ours fits, so that any answer will do.
        also: Other causes that are as right, where a mechanism is two at once.
    """

    name: str
    expected: str | None
    held_back: bool
    build: Callable[[], Run]
    gap: tuple[float, float] | None
    scored: bool = True
    also: tuple[str, ...] = ()


class Cases:
    """A list of cases that decorators add to."""

    def __init__(self) -> None:
        self._cases: list[Case] = []

    def __iter__(self) -> Iterator[Case]:
        return iter(self._cases)

    def problem(
        self,
        cause: str,
        gap: tuple[float, float] | None = (1.5, math.inf),
        *,
        held_back: bool = False,
        scored: bool = True,
    ) -> Callable[[Callable[[], Run]], Callable[[], Run]]:
        """Adds a training that suffers from `cause`."""
        return self._adder(cause, gap, held_back, scored)

    def silent(
        self, *, held_back: bool = False, gap: tuple[float, float] | None = (0, 1.4)
    ) -> Callable[[Callable[[], Run]], Callable[[], Run]]:
        """Adds a training in which nothing is wrong with BN."""
        return self._adder(None, gap, held_back, True)

    def _adder(
        self,
        cause: str | None,
        gap: tuple[float, float] | None,
        held_back: bool,
        scored: bool,
    ) -> Callable[[Callable[[], Run]], Callable[[], Run]]:
        def add(build: Callable[[], Run]) -> Callable[[], Run]:
            self._cases.append(
                Case(build.__name__, cause, held_back, build, gap, scored)
            )
            return build

        return add


@dataclass(frozen=True)
class Fitter:
    """`model.fit` with everything given but the callbacks, and what changes.

    Args:
        model: The model.
        data: What it is trained with, `(x, y)` or a dataset alone.
        options: All else.
    """

    model: keras.Model
    data: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(
        self, callbacks: Callbacks, data: tuple[Any, ...] | None = None, **changes: Any
    ) -> Any:
        """Trains the model, with other data or options if they are given."""
        given = self.data if data is None else data
        options = self.options | changes
        return self.model.fit(*given, callbacks=callbacks, verbose=0, **options)


def fitter(model: keras.Model, *data: Any, **options: Any) -> Fitter:
    """A `Fitter`, as `model.fit` takes its arguments."""
    return Fitter(model, data, options)


def compiled(
    model: keras.Model, optimizer: Any = "adam", loss: Any = "mse", **arguments: Any
) -> keras.Model:
    """The model, compiled without XLA, whose compilation takes longer than a case."""
    model.compile(optimizer, loss, jit_compile=False, **arguments)
    return model


def crossentropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(
    features: int, outputs: int = 1, width: int = 16, depth: int = 2, **bn: Any
) -> keras.Model:
    """Dense, BN, ReLU, as often as asked."""
    hidden = normed(*(keras.layers.Dense(width) for _ in range(depth)), **bn)
    return keras.Sequential(
        [keras.Input((features,)), *hidden, keras.layers.Dense(outputs)]
    )


def normed(*stack: Any, **bn: Any) -> list[Any]:
    """Each of the layers, with BN and ReLU behind it."""
    return [
        each
        for layer in stack
        for each in (
            layer,
            keras.layers.BatchNormalization(**bn),
            keras.layers.ReLU(),
        )
    ]


def convnet(
    outputs: int | None = 3, widths: tuple[int, ...] = (8, 12), **bn: Any
) -> keras.Model:
    """Convolutions of 8 by 8 pictures, with BN and ReLU; their mean; the outputs."""
    convolutions = [keras.layers.Conv2D(width, 3) for width in widths]
    mean = keras.layers.GlobalAveragePooling2D()
    head = [keras.layers.Dense(outputs)] if outputs else []
    stack = [keras.Input((8, 8, 1)), *normed(*convolutions, **bn), mean, *head]
    return keras.Sequential(stack)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def teacher(x: Array, outputs: int = 1, seed: int = 99) -> Array:
    """A smooth nonlinear function of the rows, with values of about unit variance."""
    draw = rng(seed)
    hidden = np.tanh(x @ draw.normal(size=(x.shape[-1], 12)) / np.sqrt(x.shape[-1]))
    return (hidden @ draw.normal(size=(12, outputs)) / 2).astype("float32")


def table(
    rows: int, features: int = 8, mean: float = 3.0, std: float = 2.0, seed: int = 0
) -> tuple[Array, Array]:
    """Rows of features that nobody has standardised, and a target to regress."""
    z = rng(seed).normal(size=(rows, features))
    return (mean + std * z).astype("float32"), teacher(z)


def blobs(
    rows: int,
    classes: int = 4,
    features: int = 10,
    spread: float = 1.0,
    mean: float = 0.0,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Gaussian classes, and their labels."""
    draw = rng(seed)
    centres = draw.normal(size=(classes, features)) * 2
    labels = draw.integers(classes, size=rows)
    x = mean + centres[labels] + spread * draw.normal(size=(rows, features))
    return x.astype("float32"), labels.astype("int32")


def pictures(
    rows: int,
    classes: int = 3,
    size: int = 8,
    noise: float = 0.7,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Stripes of a frequency for each class, at any phase, and noise; one channel."""
    draw = rng(seed)
    labels = draw.integers(classes, size=rows)
    grid = np.arange(size) / size
    phase = draw.uniform(0, 2 * np.pi, size=(rows, 1))
    wave = np.sin(2 * np.pi * (labels[:, None] + 1) * grid + phase)
    x = wave[:, None, :, None] + noise * draw.normal(size=(rows, size, size, 1))
    return x.astype("float32"), labels.astype("int32")


@dataclass(frozen=True)
class Outcome:
    """What the monitor said of a case.

    Args:
        causes: The causes it warned about, in order.
        gap: The loss gap it measured.
        lag: The largest lag it measured.
        seconds: What building and training took.
        messages: The warnings.
    """

    causes: tuple[str, ...]
    gap: float | None
    lag: float | None
    seconds: float
    messages: tuple[str, ...]

    def is_right(self, case: Case) -> bool:
        """Whether it is what the case asks for, with one false guess at most."""
        if not case.scored:
            return True
        if case.expected is None:
            return not self.causes
        is_named = any(cause in self.causes for cause in (case.expected, *case.also))
        return is_named and len(self.causes) <= 2


def build(case: Case) -> Run:
    """Builds a case as if nothing had been built before."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(7)
    return case.build()


def run(case: Case, has_probe: bool) -> Outcome:
    """Trains a case under the monitor."""
    return watched(case, [has_probe])[0]


def run_both(case: Case) -> tuple[Outcome, Outcome]:
    """Trains a case once, under two monitors: with a probe, and without."""
    with_probe, without = watched(case, [True, False])
    return with_probe, without


class Listening(BatchNormMonitor):
    """A monitor that keeps its warnings to itself."""

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self.messages: list[str] = getattr(self, "messages", [])

    def _tell(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super()._tell(*args, **kwargs)
        self.messages += [
            str(one.message)
            for one in caught
            if issubclass(one.category, BatchNormLagWarning)
        ]


def watched(case: Case, probes: list[bool]) -> list[Outcome]:
    """Trains a case under a monitor for each entry, with a probe or without."""
    start = time.perf_counter()
    made = build(case)
    monitors = [Listening(probe=made.probe if probe else None) for probe in probes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(list(monitors))
    seconds = (time.perf_counter() - start) / len(monitors)
    return [outcome(monitor, seconds) for monitor in monitors]


def outcome(monitor: Listening, seconds: float) -> Outcome:
    """What a monitor has said in a training."""
    found = [re.search(r"cause: (\w+)", text) for text in monitor.messages]
    causes = [match[1] for match in found if match]
    report = monitor.report
    return Outcome(
        tuple(dict.fromkeys(causes)),
        report.loss_gap if report else None,
        report.max_lag if report else None,
        seconds,
        tuple(monitor.messages),
    )

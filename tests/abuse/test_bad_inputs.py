"""Random bad inputs to every public function: a clear error of ours, each time."""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from garbage import anything, judge, structures
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from models import compiled, dense, normal, scatter

import bn_callbacks
from bn_callbacks import (
    BatchNormMonitor,
    DebiasBatchNorm,
    PopulationMoments,
    RecalibrateBatchNorm,
    apply_statistics,
    audit,
    measure,
    recalibrate,
    recalibrated,
    suggest_momentum,
)

X = normal(8, 6)
MOMENTS = PopulationMoments({}, None, 0, 0)

pytestmark = pytest.mark.filterwarnings("ignore")
"""What NumPy and TensorFlow say of some of these values is not the matter here."""


def fuzz(few: int) -> Callable[[Any], Any]:
    """`few` examples by default; 1,000 of `test_1000_…`."""

    def decorate(test: Any) -> Any:
        is_long = test.__name__.startswith("test_1000")
        return settings(
            max_examples=1000 if is_long else few,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(pytest.mark.slow(test) if is_long else test)

    return decorate


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return compiled(scatter(dense(2)))


def is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def is_whole(value: Any, least: int) -> bool:
    """A whole number, as Python or NumPy have them, or a float that is one."""
    if not is_real(value) or not (isinstance(value, int) or math.isfinite(value)):
        return False
    return value == int(value) and value >= least


def is_positive(value: Any) -> bool:
    return is_real(value) and value > 0


def is_text(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def is_flag(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def is_verbose(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto"
    return is_flag(value) or is_whole(value, 0)


# What each argument takes; anything else has to be refused.
OPTIONS: dict[str, Callable[[Any], bool]] = {
    "batch_size": lambda value: value is None or is_whole(value, 1),
    "steps": lambda value: value is None or value == 1,
    "tolerance": lambda value: value is None or is_positive(value),
    "refine": lambda value: is_text("auto")(value) or is_whole(value, 0),
    "dropout": is_flag,
    "verbose": is_verbose,
}
AUDIT = ("batch_size", "steps")
MONITOR: dict[str, Callable[[Any], bool]] = {
    "log_dir": lambda value: (
        value is None or hasattr(value, "__fspath__") or isinstance(value, (str, bytes))
    ),
    "update_freq": lambda value: is_text("auto", "batch")(value) or is_whole(value, 1),
    "threshold": is_positive,
    "on_lag": is_text("warn", "raise", "ignore"),
    "probe": lambda value: value is None or isinstance(value, tuple),
    "verbose": is_verbose,
}
CALLBACK: dict[str, Callable[[Any], bool]] = {
    name: OPTIONS[name] for name in ("tolerance", "refine", "dropout")
} | {
    "when": is_text("train_end", "validation", "epoch_end"),
    "verbose": is_verbose,
}


def one_bad(options: dict[str, Callable[[Any], bool]]) -> st.SearchStrategy[Any]:
    """The name of an argument and a value that it does not take."""

    @st.composite
    def pairs(draw: Any) -> tuple[str, Any]:
        name = draw(st.sampled_from(sorted(options)))
        value = draw(anything())
        try:
            is_fine = bool(options[name](value))
        except Exception:
            is_fine = False
        assume(not is_fine)
        return name, value

    return pairs()


def enter(context: Any) -> None:
    with context:
        pass


def check_options(model: keras.Model, bad: tuple[str, Any]) -> None:
    name, value = bad
    for act in (
        lambda: recalibrate(model, X, **{"verbose": 0, name: value}),
        lambda: enter(recalibrated(model, X, **{"verbose": 0, name: value})),
    ):
        judge(act)
    if name in AUDIT:
        judge(lambda: audit(model, X, **{name: value}))


@fuzz(40)
@given(one_bad(OPTIONS))
def test_options(model: keras.Model, bad: tuple[str, Any]) -> None:
    check_options(model, bad)


@fuzz(0)
@given(one_bad(OPTIONS))
def test_1000_options(model: keras.Model, bad: tuple[str, Any]) -> None:
    check_options(model, bad)


def check_layers(model: keras.Model, layers: Any) -> None:
    chosen = layers if isinstance(layers, list) else [layers]
    # What somebody's own predicate raises is theirs.
    assume(not any(callable(one) and not isinstance(one, type) for one in chosen))
    for act in (
        lambda: recalibrate(model, X, layers=layers, verbose=0).undo(),
        lambda: audit(model, layers=layers),
    ):
        judge(act, must_fail=False)


@fuzz(15)
@given(st.one_of(anything(), st.lists(anything(), max_size=3)))
def test_layers(model: keras.Model, layers: Any) -> None:
    check_layers(model, layers)


@fuzz(0)
@given(st.one_of(anything(), st.lists(anything(), max_size=3)))
def test_1000_layers(model: keras.Model, layers: Any) -> None:
    check_layers(model, layers)


def check_model(wrong: Any) -> None:
    judge(lambda: recalibrate(wrong, X, verbose=0))
    judge(lambda: enter(recalibrated(wrong, X)))
    judge(lambda: audit(wrong, X))
    judge(lambda: audit(wrong))
    judge(lambda: measure(wrong, X))
    judge(lambda: apply_statistics(wrong, MOMENTS))


@fuzz(20)
@given(anything())
def test_models(wrong: Any) -> None:
    check_model(wrong)


@fuzz(0)
@given(anything())
def test_1000_models(wrong: Any) -> None:
    check_model(wrong)


def check_data(model: keras.Model, x: Any, how: str) -> None:
    if how == "recalibrate":
        judge(lambda: recalibrate(model, x, steps=2, verbose=0).undo(), must_fail=False)
    elif how == "measure":
        judge(lambda: measure(model, x, steps=1), must_fail=False)
    elif how == "apply":
        judge(lambda: apply_statistics(model, x))
    elif how == "audit":
        judge(lambda: audit(model, x, steps=1), must_fail=False)
    else:
        judge(
            lambda: recalibrate(model, X, validation_data=x, verbose=0).undo(),
            must_fail=False,
        )


HOW = st.sampled_from(["recalibrate", "audit", "validation", "measure", "apply"])


@fuzz(25)
@given(structures(), HOW)
def test_data(model: keras.Model, x: Any, how: str) -> None:
    check_data(model, x, how)


@fuzz(0)
@given(structures(), HOW)
def test_1000_data(model: keras.Model, x: Any, how: str) -> None:
    check_data(model, x, how)


def check_callbacks(monitor: tuple[str, Any], recalibration: tuple[str, Any]) -> None:
    (name, value), (other, thing) = monitor, recalibration
    judge(lambda: BatchNormMonitor(**{name: value}))
    judge(lambda: RecalibrateBatchNorm(X, **{other: thing}))


@fuzz(40)
@given(one_bad(MONITOR), one_bad(CALLBACK))
def test_callbacks(monitor: Any, recalibration: Any) -> None:
    check_callbacks(monitor, recalibration)


@fuzz(0)
@given(one_bad(MONITOR), one_bad(CALLBACK))
def test_1000_callbacks(monitor: Any, recalibration: Any) -> None:
    check_callbacks(monitor, recalibration)


def check_fit(model: keras.Model, kind: str, value: Any) -> None:
    """What only the data or the model can show is refused as `fit` begins."""
    callback = {
        "x": lambda: RecalibrateBatchNorm(value),
        "validation_data": lambda: RecalibrateBatchNorm(X, validation_data=value),
        "layers": lambda: RecalibrateBatchNorm(X, layers=value),
        "steps": lambda: RecalibrateBatchNorm(X, steps=value),
        "watched": lambda: BatchNormMonitor(layers=value, on_lag="ignore"),
        "probe": lambda: BatchNormMonitor(probe=value, on_lag="ignore"),
    }[kind]
    weights = model.get_weights()
    judge(lambda: start(model, callback()), must_fail=False)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def start(model: keras.Model, callback: keras.callbacks.Callback) -> None:
    """As far as `fit` goes before the first batch."""
    callback.set_model(model)
    callback.set_params({"epochs": 1, "steps": 1})
    callback.on_train_begin()


KINDS = st.sampled_from(["x", "validation_data", "layers", "steps", "watched", "probe"])


@fuzz(25)
@given(KINDS, structures())
def test_callbacks_in_fit(model: keras.Model, kind: str, value: Any) -> None:
    check_fit(model, kind, value)


@fuzz(0)
@given(KINDS, structures())
def test_1000_callbacks_in_fit(model: keras.Model, kind: str, value: Any) -> None:
    check_fit(model, kind, value)


@fuzz(0)
@given(anything())
def test_1000_numbers_of_steps_to_suggest_a_momentum_for(steps: Any) -> None:
    if is_real(steps) and steps >= 1:
        assert 0 <= suggest_momentum(steps) < 1
    else:
        judge(lambda: suggest_momentum(steps))


@pytest.mark.parametrize(
    "callback", [BatchNormMonitor, DebiasBatchNorm, lambda: RecalibrateBatchNorm(X)]
)
def test_what_is_no_model_is_refused_in_fit(callback: Any) -> None:
    for wrong in (None, "model", keras.layers.Dense(2)):
        judge(lambda wrong=wrong: start(wrong, callback()))


def test_all_public_functions_are_fuzzed() -> None:
    functions = {
        name
        for name in bn_callbacks.__all__
        if inspect.isfunction(getattr(bn_callbacks, name))
        or issubclass(getattr(bn_callbacks, name), keras.callbacks.Callback)
    }
    source = inspect.getsource(inspect.getmodule(test_options))  # type: ignore[arg-type]
    body = source.partition("X = normal")[2]
    assert {name for name in functions if name not in body} == set()

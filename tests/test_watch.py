"""`BatchNormWatch`: what it refuses."""

from typing import Any

import keras
import pytest

from bn_callbacks import BatchNormWatch


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": -3},
        {"steps": "x"},
        {"epochs": 0},
        {"epochs": 1.5},
        {"threshold": -1},
        {"threshold": "big"},
    ],
    ids=str,
)
def test_wrong_arguments_are_told_by_name(model: Any, wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .* {name}={value!r}"):
        BatchNormWatch(model, **wrong)


def test_a_model_must_be_one() -> None:
    with pytest.raises(TypeError, match="`model` must be"):
        BatchNormWatch("model")  # type: ignore[arg-type]

"""Checks arguments of public functions, and shows wrong ones in messages."""

import numbers
from typing import Any

import numpy as np

MAX_SHOWN = 80


def shown(value: object) -> str:
    """A value as an error message shows it: its `repr`, cut if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def is_word(value: Any, *words: str) -> bool:
    """Whether it is one of these words; never compares anything but a string."""
    return isinstance(value, str) and value in words


def is_flag(value: Any) -> bool:
    """Whether it is True or False."""
    return isinstance(value, (bool, np.bool_))


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0."""
    return _is_number(value) and value > 0


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number, as 32 and 32.0 are, of at least so much."""
    if not _is_number(value):
        return False
    is_integral = isinstance(value, numbers.Integral)
    return (is_integral or float(value).is_integer()) and value >= least


def check_whole(name: str, value: Any) -> None:
    """Raises a ValueError unless it is None or a whole number of at least 1."""
    if value is not None and not is_whole(value, 1):
        raise ValueError(
            f"`{name}` must be a positive integer or None. Received: "
            f"{name}={shown(value)}."
        )


def check_flag(name: str, value: Any) -> None:
    """Raises a ValueError unless it is True or False."""
    if not is_flag(value):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={shown(value)}."
        )


def check_threshold(value: Any) -> None:
    """Raises a ValueError unless it is a positive number."""
    if not is_positive(value):
        raise ValueError(
            "`threshold` must be a positive number of standard deviations. "
            f"Received: threshold={shown(value)}."
        )


def check_verbose(value: Any) -> None:
    """Raises a ValueError unless it is what Keras takes as `verbose`."""
    if not (is_word(value, "auto") or is_flag(value) or is_whole(value, 0)):
        raise ValueError(
            f"`verbose` must be 0, 1 or 'auto'. Received: verbose={shown(value)}."
        )


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, numbers.Real) and not is_flag(value)
    return is_real and value == value  # NaN is not equal to itself.

"""Turns errors into one line that tells users of the command line what to do."""

import re

from bn_callbacks.installing import NotInstalledError
from bn_callbacks.names import said, shortened

LONGEST = 1000
"""Largest number of characters in a line; Keras' messages may fill pages."""

EXPECTED = (NotInstalledError, OSError, RuntimeError, TypeError, ValueError)
"""Errors of the library, Keras and the system, whose messages are for users."""

# Keyed by the names of their classes, since TensorFlow may not be imported yet.
REMEDIES = {
    "DataLossError": "The data are damaged: {}. Write them again.",
    "InvalidArgumentError": "The data cannot be read: {}. Check --data, and --features "
    "of TFRecord files.",
    "MemoryError": "Out of memory. Pass a smaller --batch-size.",
    "ResourceExhaustedError": "Out of memory: {}. Pass a smaller --batch-size.",
}

OPTIONS = {
    "batch_size": "--batch-size",
    "dropout": "--dropout",
    "layers": "--layers",
    "prior": "--prior",
    "refine": "--refine",
    "steps": "--steps",
    "tolerance": "--tolerance",
    "validation_data": "--validation",
    "x": "--data",
}
"""The option for each argument of the library's functions."""

_ARGUMENT = re.compile(rf"`({'|'.join(OPTIONS)})`")
_ASSIGNED = re.compile(rf"\b({'|'.join(OPTIONS)})=(?:\['([^']*)'\]|([\w'./-]*\w'?))")


class CommandError(RuntimeError):
    """A command cannot go on; the message tells the user why, and what to do."""


def text_of(error: BaseException) -> str:
    """An error's message, on one line and without a full stop, to put into another."""
    return _joined(error).rstrip(". ")


def one_line(error: BaseException) -> str:
    """The line that a user reads about an error that ends a command."""
    if isinstance(error, EXPECTED):
        return _joined(error)
    kind = type(error).__name__
    if kind in REMEDIES:
        return REMEDIES[kind].format(text_of(error))
    text = f"{kind}: {text_of(error)}".rstrip(": ")
    return f"{text}. Run it again with --debug for a traceback."


def with_options(text: str, has_validation: bool = False) -> str:
    """Replaces the library's arguments in a message by options.

    Args:
        text: The message.
        has_validation: Whether there are validation data. The library calls these `x`
            too.

    Examples:
        >>> with_options("`x` ran out of data. Received: steps=9. Pass fewer `steps`.")
        '--data ran out of data. Received: --steps 9. Pass fewer --steps.'
        >>> with_options("Name them, as in layers=['bn'], or leave batch_size out.")
        'Name them, as in --layers bn, or leave --batch-size out.'
    """
    names = {**OPTIONS, "x": "--data or --validation"} if has_validation else OPTIONS

    def assigned(match: re.Match[str]) -> str:
        name, one, other = match.groups()
        value = one if one is not None else other.strip("'")
        return f"no {names[name]}" if value == "None" else f"{names[name]} {value}"

    text = _ASSIGNED.sub(assigned, _ARGUMENT.sub(lambda m: names[m[1]], text))
    text = text.replace("batch_size", names["batch_size"])
    return text.replace("Pass (x, y)", "Pass data with targets")


def _joined(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return shortened(" ".join([said(error), *notes]), LONGEST)

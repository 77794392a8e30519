"""Errors as the user of a command line reads them: one line that says what to do."""

import re

from bn_callbacks.installing import NotInstalledError

LONGEST = 1000
"""Characters of a line; what Keras says may be pages."""

EXPECTED = (NotInstalledError, OSError, RuntimeError, TypeError, ValueError)
"""What the library, Keras and the operating system raise with a message for users."""

# By the names of their classes, since TensorFlow may not be there yet.
REMEDIES = {
    "DataLossError": "The data are damaged: {}. Write them again.",
    "InvalidArgumentError": "The data cannot be read: {}. Check --data, and --features "
    "of TFRecord files.",
    "MemoryError": "Out of memory. Pass a smaller --batch-size.",
    "ResourceExhaustedError": "Out of memory: {}. Pass a smaller --batch-size.",
}

# What the messages of TensorFlow say of graphs that the user has never seen.
_NOISE = re.compile(
    r"\x1b\[[0-9;]*m|"  # Colours.
    r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:\w+\]( name:)?|Traceback \(most recent .*",
    re.DOTALL,
)


class CommandError(RuntimeError):
    """A command cannot go on; the message tells the user why, and what to do."""


def text_of(error: BaseException) -> str:
    """What an error says, in one line and without a full stop, to go into another."""
    return _joined(error).rstrip(". ")


def one_line(error: BaseException) -> str:
    """What the user reads of an error that ends a command."""
    if isinstance(error, EXPECTED):
        return _joined(error)
    kind = type(error).__name__
    if kind in REMEDIES:
        return REMEDIES[kind].format(text_of(error))
    text = f"{kind}: {text_of(error)}".rstrip(": ")
    return f"{text}. Run it again with --debug for a traceback."


def _joined(error: BaseException) -> str:
    text = str(error)
    if text.startswith("in user code:"):  # The stack of a traced function comes first.
        text = re.split(r"\n\s+(?=\w*Error: )", text)[-1]
    notes = getattr(error, "__notes__", [])
    text = " ".join(_NOISE.sub("", " ".join([text, *notes])).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"

"""Errors as the user of a command line reads them: one line that says what to do."""

import re

LONGEST = 1000
"""Characters of a line; what Keras says may be pages."""

# What the messages of TensorFlow say of graphs that the user has never seen.
_NOISE = re.compile(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:\w+\]( name:)?")


class CommandError(Exception):
    """A command cannot go on; the message tells the user why, and what to do."""


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    notes = getattr(error, "__notes__", [])
    text = " ".join(_NOISE.sub("", " ".join([str(error), *notes])).split())
    if not isinstance(
        error, (CommandError, OSError, RuntimeError, TypeError, ValueError)
    ):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
        text += ". Run it again with --debug for the traceback."
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"

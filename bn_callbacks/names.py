"""Makes names from strangers' files safe to print."""

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    r"""A text in one line, without anything that acts on a terminal.

    Names of layers and files may come from strangers. Control characters, line breaks
    and marks that turn the direction of reading become escapes, as `repr` shows them.

    Examples:
        >>> printable("bn\n\x1b[2Kall layers are healthy")
        'bn\\n\\x1b[2Kall layers are healthy'
    """
    if text.isprintable():
        return text
    return "".join(
        each
        if each.isprintable()
        else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def said(error: BaseException) -> str:
    """What an error says, in one line, without the colours that Keras adds."""
    return printable(" ".join(_COLOUR.sub("", str(error)).split()))

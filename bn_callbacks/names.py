"""Makes strangers' texts fit to print: names in files, messages of other libraries."""

import re

# Colours, and what TensorFlow and Keras tell of graphs and stacks, which say nothing of
# the user's data.
_NOISE = re.compile(
    r"\x1b\[[0-9;]*m|Graph execution error:|"
    r"Detected at node .*? \(most recent call last\):|(?m:^ *File \"[^\n]*$)|"
    r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:\w+\]( name:)?|Traceback \(most recent .*",
    re.DOTALL,
)


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
    """What an error says, in one line, without colours, stacks and names in graphs."""
    text = str(error)
    if text.startswith("in user code:"):  # Begins with a stack of traced functions.
        text = re.split(r"\n\s+(?=\w*Error: )", text)[-1]
    return printable(" ".join(_NOISE.sub("", text).split()))


def shortened(text: str, most: int) -> str:
    """Cuts a long text after a sentence, or after a word if the sentence is too long.

    Args:
        text: The text, in one line.
        most: Largest number of characters, without the `…` of a text that is cut.

    Examples:
        >>> shortened("It failed. See line 3.", 30), shortened("It failed. Why?", 12)
        ('It failed. See line 3.', 'It failed. …')
        >>> shortened("something went wrong", 16)
        'something went …'
    """
    if len(text) <= most:
        return text
    ends = [found.end() for found in re.finditer(r"[.!?](?= )", text[: most + 1])]
    end = ends[-1] if ends else text.rfind(" ", 0, most + 1)
    return f"{text[:end]} …" if end > 0 else f"{text[:most]}…"

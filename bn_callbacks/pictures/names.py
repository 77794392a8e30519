"""Shortens names of layers for pictures, which have little room."""

import itertools
import re
from collections.abc import Sequence


def shorten(paths: Sequence[str], longest: int) -> list[str]:
    """Removes the first and last words that all names share, and cuts long names.

    Args:
        paths: Paths of layers.
        longest: Largest number of characters in a name.

    Examples:
        >>> shorten(["net/block_1/bn", "net/block_12/bn", "net/stem_bn"], 20)
        ['block_1', 'block_12', 'stem']
        >>> shorten(["net/block_1/bn", "net/block_12/bn"], 20), shorten(["a/bn"], 20)
        (['1', '12'], ['a/bn'])
    """
    # Words are at even places, their separators at odd ones.
    names = [re.split(r"([/_.-])", " ".join(path.split())) for path in paths]
    for _ in range(2 * (len(set(paths)) > 1)):  # From the beginning and from the end.
        names = [name[2 * _shared(names) :][::-1] for name in names]
    return [_cut("".join(name), longest) for name in names]


def _shared(names: Sequence[Sequence[str]]) -> int:
    """How many first words all names share, leaving each at least one more."""
    words = zip(*(name[:-1:2] for name in names), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, words))


def _cut(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    # The end tells layers apart more often than the beginning.
    end = longest * 2 // 3
    return f"{name[: longest - end - 1]}…{name[-end:]}"

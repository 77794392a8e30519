"""What pictures share: matplotlib, axes, and labels that do not overlap."""

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT_SIZE = 8
"""Size of a row's label, in points."""

ROW = 0.22
"""Height of a row, in inches, as long as the picture has room."""

MAX_LABEL = 40
"""Characters of a label at most."""


def matplotlib(module: str) -> Any:
    """A module of matplotlib.

    Args:
        module: Its name, such as `"pyplot"`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "Pictures need matplotlib, which is not installed. Install it with: "
            'python -m pip install "bn-callbacks[plot]"',
            name="matplotlib",
        ) from None


def height(rows: int, most: float) -> float:
    """Height, in inches, of so many rows, which become thinner where they must."""
    return min(max(rows, 4) * ROW, most)


def new_axes(rows: int) -> "Axes":
    """Axes in a new figure of pyplot, which a notebook shows by itself."""
    pyplot = matplotlib("pyplot")
    axes: Axes
    _, axes = pyplot.subplots(
        figsize=(9, height(rows, most=10) + 1.4), layout="constrained"
    )
    return axes


def label_rows(axes: "Axes", paths: Sequence[str], first: Iterable[int] = ()) -> None:
    """Names the rows `0, 1, …` of a picture, or as many as have room.

    Args:
        axes: The axes, with all else that they are to have.
        paths: The layers' paths.
        first: Rows in order of importance; the others follow as room is left.
    """
    names = shorten(paths)
    # Only then do axes have the height that title and legend leave.
    axes.figure.figure.draw_without_rendering()
    height = axes.get_window_extent().height / axes.figure.dpi
    rows = rows_with_room(len(names), height, first)
    labels = [names[row] for row in rows]
    # A dollar sign in a name begins no formula.
    axes.set_yticks(rows, labels, fontsize=FONT_SIZE, parse_math=False)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def rows_with_room(count: int, height: float, first: Iterable[int] = ()) -> list[int]:
    """Rows that can be labelled in axes of a height.

    Args:
        count: How many rows there are.
        height: Height of the axes in inches.
        first: Rows in order of importance.

    Returns:
        Rows in ascending order.
    """
    gap = math.ceil(1.3 * FONT_SIZE * max(count, 1) / (height * 72))
    return chosen_rows(count, max(gap, 1), first)


def chosen_rows(count: int, gap: int, first: Iterable[int] = ()) -> list[int]:
    """Rows that can be labelled without their labels touching each other.

    Args:
        count: How many rows there are.
        gap: Rows from one label to the next, at least.
        first: Rows in order of importance.

    Returns:
        Rows in ascending order.

    Example:
        >>> chosen_rows(10, 3, first=[4, 5])
        [0, 4, 9]
    """
    chosen: list[int] = []
    for row in (*first, *range(0, count, gap), count - 1):
        if all(abs(row - other) >= gap for other in chosen):
            chosen.append(row)
    return sorted(chosen) if count else []


def shorten(paths: Sequence[str]) -> list[str]:
    """Names for paths: without the folders that all share, long ones cut in the middle.

    Args:
        paths: Paths of layers.

    Example:
        >>> shorten(["net/block_1/bn", "net/block_2/bn"])
        ['block_1/bn', 'block_2/bn']
        >>> shorten(["net/bn"])
        ['net/bn']
    """
    split = [path.split("/") for path in paths]
    shared = 0
    if len(split) > 1:
        for parts in zip(*(path[:-1] for path in split), strict=False):
            if len(set(parts)) > 1:
                break
            shared += 1
    names = ["/".join(path[shared:]) for path in split]
    return [_cut(name) for name in names]


def _cut(name: str) -> str:
    name = " ".join(name.split())
    if len(name) <= MAX_LABEL:
        return name
    # The end tells layers apart more often than the beginning.
    end = MAX_LABEL * 2 // 3
    return f"{name[: MAX_LABEL - end - 1]}…{name[-end:]}"

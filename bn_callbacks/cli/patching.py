"""Replaces the moving statistics in a saved model, and no other byte.

Keras would save only what it has understood of a file, which may be less than it holds.
So this module finds the arrays of the statistics in the file and replaces their bytes.
"""

import contextlib
import copy
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.cli.errors import CommandError
from bn_callbacks.cli.writing import temporary_folder
from bn_callbacks.layers import find

WEIGHTS = "model.weights.h5"
"""The member of a .keras file that holds all arrays."""

Load = Callable[[Path], keras.Model]


class SavedStatistics:
    """Remembers the statistics that a model had when it was loaded.

    Args:
        source: The file that the model was loaded from.
        model: The model.
        load: Loads a file as the model was loaded.
    """

    def __init__(self, source: Path, model: keras.Model, load: Load) -> None:
        self._source = source
        self._model = model
        self._load = load
        self._old = _values(model)

    def write(self, path: Path) -> None:
        """Copies the file, with the statistics that the model has now.

        Args:
            path: The copy; its name must end in `.keras`.

        Raises:
            CommandError: The file does not hold the statistics as plain arrays, or
                the copy loads with other statistics.
        """
        new = _values(self._model)
        changed = [i for i, old in enumerate(self._old) if not _is_same(old, new[i])]
        with temporary_folder() as folder:
            weights = folder / "weights.h5"
            _extract(self._source, weights)
            places = self._find(changed, folder)
            _patch(weights, {places[i]: new[i] for i in changed})
            _copy_archive(self._source, path, weights)
        self._verify(path, new)

    def _find(self, wanted: Sequence[int], folder: Path) -> dict[int, str]:
        """Finds the arrays in the file from which Keras loads the variables.

        Versions of Keras name them differently, and a user's own layer may name them
        freely. So this writes a number into each possible array of a copy, and loads
        the copy: the variables then hold the numbers of their arrays.
        """
        if not wanted:
            return {}
        shapes = {self._old[i].shape for i in wanted}
        weights = folder / "marked.h5"
        _extract(self._source, weights)
        with h5py.File(weights) as file:
            names = [name for name, array in _arrays(file) if array.shape in shapes]
        # The dtypes of the variables hold all whole numbers up to this exactly.
        is_precise = all(self._old[i].dtype.itemsize >= 4 for i in wanted)
        base = 2**20 if is_precise else 2**7
        found = dict.fromkeys(wanted, 0)
        for unit in _powers(base, len(names)):
            marks = {name: 1 + i // unit % base for i, name in enumerate(names)}
            _patch(weights, marks)
            marked = folder / "marked.keras"
            _copy_archive(self._source, marked, weights)
            values = _values(self._load(marked))
            for i in wanted:
                mark = float(values[i].flat[0])
                if not 1 <= mark <= base or (values[i] != values[i].flat[0]).any():
                    raise self._unusual(f"a mark came back as {mark:g}")
                found[i] += unit * (int(mark) - 1)
        if max(found.values(), default=0) >= len(names) or len(
            set(found.values())
        ) < len(wanted):
            raise self._unusual("marks came back mixed up")
        return {i: names[place] for i, place in found.items()}

    def _verify(self, path: Path, wanted: Sequence[NDArray[Any]]) -> None:
        written = self._load(path)
        statistics = zip(_values(written), wanted, strict=True)
        weights = zip(
            written.trainable_variables, self._model.trainable_variables, strict=True
        )
        is_right = all(_is_same(*pair) for pair in statistics) and all(
            _is_same(*map(_value, pair)) for pair in weights
        )
        if not is_right:
            raise self._unusual("the copy loads with other values")

    def _unusual(self, what: str) -> CommandError:
        return CommandError(
            f"{self._source} does not hold the moving statistics as plain arrays, so "
            f"that they cannot be replaced in it. Received: {what}. In Python, "
            "bn_callbacks.recalibrate and model.save do it."
        )


def _values(model: keras.Model) -> list[NDArray[Any]]:
    return [_value(variable) for bn in find(model) for variable in bn.variables]


def _value(variable: Any) -> NDArray[Any]:
    return np.array(variable.value.numpy())


def _is_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are the same, bit for bit."""
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _powers(base: int, count: int) -> Iterator[int]:
    """1, base, base², …: one for each digit of the numbers below `count`."""
    digits = max(1, math.ceil(math.log(max(count, 1), base)))
    return (base**digit for digit in range(digits))


def _arrays(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """All arrays of floating-point numbers, with their names."""
    found: dict[str, h5py.Dataset] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and _dtype(item).kind in "fV":
            found[name] = item

    file.visititems(note)
    yield from found.items()


def _dtype(array: h5py.Dataset) -> np.dtype[Any]:
    """The dtype of an array; HDF5 stores bfloat16 as bytes, with an attribute."""
    name = array.attrs.get("dtype")
    if array.dtype.kind == "V" and isinstance(name, str):
        with contextlib.suppress(TypeError):
            return np.dtype(name)
    dtype: np.dtype[Any] = array.dtype
    return dtype


def _extract(archive: Path, path: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        if WEIGHTS not in members.namelist():
            raise CommandError(
                f"{archive} has its weights in another form than {WEIGHTS}. Load it in "
                "Python and save it again."
            )
        with members.open(WEIGHTS) as member, path.open("wb") as file:
            shutil.copyfileobj(member, file)


def _patch(path: Path, values: Mapping[str, Any]) -> None:
    """Overwrites arrays in an HDF5 file in place."""
    places: dict[int, bytes] = {}
    others: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        for name, value in values.items():
            array = file[name]
            content = np.broadcast_to(value, array.shape).astype(_dtype(array))
            offset = array.id.get_offset()
            if offset is None:  # In pieces, or compressed.
                others[name] = content.view(array.dtype)
            else:
                places[offset] = content.tobytes()
    with path.open("r+b") as binary:
        for offset, replaced in places.items():
            binary.seek(offset)
            binary.write(replaced)
    if others:
        with h5py.File(path, "r+") as file:
            for name, content in others.items():
                file[name][...] = content


def _copy_archive(source: Path, path: Path, weights: Path) -> None:
    """Copies a zip archive member by member, with other weights."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        new.comment = old.comment
        for member in old.infolist():
            opened: Any = old.open(member)
            if member.filename == WEIGHTS:
                opened = weights.open("rb")
            with opened as content, new.open(copy.copy(member), "w") as copied:
                shutil.copyfileobj(content, copied)

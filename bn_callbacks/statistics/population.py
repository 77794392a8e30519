"""The moments of a population, layer by layer: saved, loaded and merged exactly.

Parts of a population may be measured anywhere, by processes that know nothing of each
other. Their moments merge into those of the whole, in any order.
"""

from __future__ import annotations

import os
import secrets
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.statistics.moments import Moments, Statistics

FORMAT = 1
"""Number of the file format; other versions of this library may have another."""

MAX_ROWS = 30
"""Largest number of layers in a text."""


@dataclass(frozen=True, eq=False)
class PopulationMoments:
    """Count, mean and squared deviations of the input of each layer, by its path.

    `print` shows a table of the layers.

    Args:
        moments: The moments of each layer's input, per channel; counts of 0 where the
            data have not reached it.
        given: The statistics that each layer normalised with; None for those of each
            batch.
        samples: Number of samples read.
        batches: Number of batches read.

    Examples:
        >>> one = PopulationMoments({"bn": Moments.from_values([[1.0]])}, None, 1, 1)
        >>> two = PopulationMoments({"bn": Moments.from_values([[3.0]])}, None, 1, 1)
        >>> both = one.merge(two)
        >>> both.statistics["bn"]
        Statistics(mean=array([2.]), variance=array([1.]))
        >>> print(both)
        Moments of 1 BatchNormalization layer: 2 samples, 2 batches, normalised by batch
        layer  channels  values per channel  mean  variance
        bn            1                   2     2         1
    """

    moments: Mapping[str, Moments]
    given: Mapping[str, Statistics] | None
    samples: int
    batches: int

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Mean and biased variance of each layer; `nan` where nothing was counted."""
        return {path: one.statistics for path, one in self.moments.items()}

    def __str__(self) -> str:
        count = len(self.moments)
        how = "by batch" if self.given is None else "with given statistics"
        lines = [
            f"Moments of {count} BatchNormalization layer{'s' * (count != 1)}: "
            f"{self.samples:,} samples, {self.batches:,} batches, normalised {how}"
        ]
        rows = [["layer", "channels", "values per channel", "mean", "variance"]]
        for path, one in list(self.moments.items())[:MAX_ROWS]:
            # A file may come from a stranger.
            name = path if path.isprintable() else ascii(path)
            columns = one.count, one.mean, one.variance
            rows.append([name, str(len(one.count)), *map(_range, columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *cells in rows if count else []:
            figures = map(str.rjust, cells, widths[1:])
            lines.append("  ".join([name.ljust(widths[0]), *figures]))
        if count > MAX_ROWS:
            lines.append(f"… and {count - MAX_ROWS} more layers")
        return "\n".join(lines)

    def merge(self, other: PopulationMoments) -> PopulationMoments:
        """The moments of both parts of a population together.

        Args:
            other: Measured with the same model and the same statistics, over data that
                are not in this part.

        Returns:
            The moments of the whole (Chan, Golub and LeVeque, 1979). The order in which
            parts are merged changes only the rounding, by about 1e-12.

        Raises:
            TypeError: `other` is something else.
            ValueError: It has other layers, or was measured with other statistics.
        """
        if not isinstance(other, PopulationMoments):
            raise TypeError(
                "Only moments can be merged with moments. Received: "
                f"{type(other).__name__}. Pass what `measure` returned."
            )
        if _layout(self) != _layout(other):
            mine, theirs = set(_layout(self).items()), set(_layout(other).items())
            raise ValueError(
                "These moments are of different models. Received: one with, and one "
                f"without, {min(mine ^ theirs)[0]} of as many channels. Measure with "
                "the same model and the same `layers` everywhere."
            )
        if not _are_same(self.given, other.given):
            raise ValueError(
                "These moments were measured with different statistics. Received: "
                f"{_describe(self.given)} and {_describe(other.given)}. Merge only "
                "parts of one round, and pass the result to `measure` in the next."
            )
        return PopulationMoments(
            {path: m.merge(other.moments[path]) for path, m in self.moments.items()},
            self.given,
            self.samples + other.samples,
            self.batches + other.batches,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the moments as a `.npz` file, whole or not at all.

        Args:
            path: The file; an existing one is replaced.

        Raises:
            ValueError: The name does not end in `.npz`.
        """
        file = Path(path)
        if file.suffix != ".npz":
            raise ValueError(
                f"Moments are saved in .npz files. Received: path={str(path)!r}. Name "
                "a file that ends in .npz."
            )
        arrays = {
            "format": np.array(FORMAT),
            "paths": np.array(list(self.moments), dtype=np.str_),
            "channels": np.array(
                [len(one.mean) for one in self.moments.values()], np.int64
            ),
            "read": np.array([self.samples, self.batches], np.int64),
        }
        for name in ("count", "mean", "m2"):
            arrays[name] = _joined([getattr(m, name) for m in self.moments.values()])
        if self.given is not None:
            given = [self.given[path] for path in self.moments]
            arrays["given_mean"] = _joined([one.mean for one in given])
            arrays["given_variance"] = _joined([one.variance for one in given])
        new = file.with_name(f".{secrets.token_hex(8)}.npz")
        try:
            np.savez(new, **arrays)  # type: ignore[arg-type]
            os.replace(new, file)
        finally:
            new.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PopulationMoments:
        """Loads what `save` has saved. Nothing in the file is run.

        Args:
            path: The file.

        Returns:
            The moments.

        Raises:
            ValueError: The file is of another kind, or damaged.
            FileNotFoundError: There is no file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return cls._of(arrays)
        except (
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
            EOFError,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(
                f"{os.fspath(path)} holds no moments that can be read. Received: "
                f"{str(error) or type(error).__name__}. Pass a file that "
                "PopulationMoments.save or bn-callbacks measure wrote."
            ) from error

    @classmethod
    def _of(cls, arrays: Mapping[str, NDArray[np.generic]]) -> PopulationMoments:
        if int(arrays["format"]) != FORMAT:
            raise ValueError(f"format {arrays['format']} instead of {FORMAT}")
        paths = [str(path) for path in arrays["paths"]]
        sizes = [int(size) for size in arrays["channels"]]
        if len(set(paths)) != len(paths) or len(paths) != len(sizes):
            raise ValueError(f"{len(sizes)} layers of {len(set(paths))} names")
        if min(sizes, default=0) < 0:
            raise ValueError(f"a layer of {min(sizes)} channels")
        samples, batches = (int(number) for number in arrays["read"])
        names = ["count", "mean", "m2"]
        given = None
        if "given_mean" in arrays:
            names += ["given_mean", "given_variance"]
        columns = [_split(arrays[name], sizes, name) for name in names]
        moments = [Moments(*parts) for parts in zip(*columns[:3], strict=True)]
        for route, one in zip(paths, moments, strict=True):
            is_whole = (one.count >= 0) & (one.m2 >= 0) & np.isfinite(one.count)
            is_whole &= np.isfinite(one.mean) | (one.count == 0)
            if not (is_whole & np.isfinite(one.m2)).all():
                raise ValueError(f"values of {route} that are no moments")
        if len(columns) > 3:
            pairs = zip(*columns[3:], strict=True)
            given = {
                route: Statistics(*pair)
                for route, pair in zip(paths, pairs, strict=True)
            }
        return cls(dict(zip(paths, moments, strict=True)), given, samples, batches)


def _joined(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([np.zeros(0), *parts])


def _split(
    array: NDArray[np.generic], sizes: list[int], name: str
) -> list[NDArray[np.float64]]:
    if array.dtype != np.float64 or array.shape != (sum(sizes),):
        raise ValueError(f"{name} of shape {array.shape} and dtype {array.dtype}")
    return np.split(array, np.cumsum(sizes[:-1])) if sizes else []


def _layout(moments: PopulationMoments) -> dict[str, int]:
    return {path: len(one.mean) for path, one in moments.moments.items()}


def _are_same(
    one: Mapping[str, Statistics] | None, other: Mapping[str, Statistics] | None
) -> bool:
    if one is None or other is None:
        return one is other
    return all(
        np.array_equal(a, b, equal_nan=True)
        for path, pair in one.items()
        for a, b in zip(pair, other[path], strict=True)
    )


def _describe(given: Mapping[str, Statistics] | None) -> str:
    return "those of each batch" if given is None else "given ones"


def _range(values: NDArray[np.float64]) -> str:
    """The smallest and the largest finite value."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "-"
    low, high = (f"{end:.4g}" for end in (finite.min(), finite.max()))
    return low if low == high else f"{low} .. {high}"

"""`bn-callbacks merge`: merges the moments of several parts."""

import argparse
from functools import reduce
from pathlib import Path

from bn_callbacks.cli.errors import CommandError
from bn_callbacks.cli.writing import replacing
from bn_callbacks.names import printable
from bn_callbacks.statistics.population import PopulationMoments


def run(options: argparse.Namespace) -> int:
    """Merges and saves."""
    parts = [read_moments(name) for name in options.parts]
    merged = reduce(PopulationMoments.merge, parts)
    path = Path(options.output)
    with replacing(path, options.written) as new:
        merged.save(new)
    print(
        f"Merged {len(parts)} files of {merged.samples:,} samples "
        f"({merged.batches:,} batches).\nSaved {printable(str(path))}."
    )
    return 0


def read_moments(name: str) -> PopulationMoments:
    """Reads a file that `measure` or `merge` wrote.

    Raises:
        CommandError: The file is missing or cannot be read.
    """
    try:
        return PopulationMoments.load(name)
    except OSError as error:
        raise CommandError(
            f"Cannot read {name}: {error.strerror}. Pass a file that bn-callbacks "
            "measure or merge wrote."
        ) from error

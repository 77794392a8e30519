"""`bn-callbacks merge`: merges the moments of several parts."""

import argparse
import json
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
    done = f"Merged {len(parts)} files of"
    save(merged, options, done, {"parts": options.parts})
    return 0


def save(
    moments: PopulationMoments,
    options: argparse.Namespace,
    done: str,
    facts: dict[str, object],
) -> None:
    """Saves moments as the output, and prints what has been done.

    Args:
        moments: The moments.
        options: The command's options.
        done: The beginning of a sentence, which goes on with the number of samples.
        facts: What JSON says besides the moments and the output.
    """
    path = Path(options.output)
    with replacing(path, options.written) as new:
        moments.save(new)
    if options.json:
        content = {
            **facts,
            "layers": list(moments.moments),
            "samples": moments.samples,
            "batches": moments.batches,
            "output": str(path),
        }
        print(json.dumps(content, indent=2), file=options.out)
    else:
        print(
            f"{done} {moments.samples:,} samples ({moments.batches:,} batches).\n"
            f"Saved {printable(str(path))}."
        )


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

"""`bn-callbacks apply`: writes measured statistics into a saved model."""

import argparse
from pathlib import Path

import keras

from bn_callbacks.cli.merge import read_moments
from bn_callbacks.cli.models import load
from bn_callbacks.cli.patching import SavedStatistics
from bn_callbacks.cli.recalibrate import say_result
from bn_callbacks.cli.writing import replacing
from bn_callbacks.names import printable
from bn_callbacks.pooling import apply_statistics


def run(options: argparse.Namespace) -> int:
    """Applies and saves."""

    def load_again(path: Path) -> keras.Model:
        return load(path, options.custom_objects, is_trusted=options.unsafe)

    moments = read_moments(options.moments)
    source = Path(options.model)
    model = load_again(source)
    saved = SavedStatistics(source, model, load_again)
    report = apply_statistics(model, moments)
    path = source if options.in_place else Path(options.output)
    with replacing(path, options.written) as new:
        saved.write(new)
    if not options.json:
        print(f"Before:\n\n{report.before}\n\n{report}")
    say_result(report, options, f"Saved {printable(str(path))}.", {"output": str(path)})
    return 0

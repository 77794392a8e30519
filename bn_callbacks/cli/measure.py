"""`bn-callbacks measure`: saves the moments of a part of the data."""

import argparse
import json
from pathlib import Path

from bn_callbacks.cli.merge import read_moments
from bn_callbacks.cli.models import load
from bn_callbacks.cli.sources import open_data
from bn_callbacks.cli.writing import replacing
from bn_callbacks.names import printable
from bn_callbacks.pooling import measure


def run(options: argparse.Namespace) -> int:
    """Measures and saves."""
    before = None
    if options.statistics is not None:
        before = read_moments(options.statistics)
    model = load(options.model, options.custom_objects, is_trusted=options.unsafe)
    x, batch_size = open_data(options.data, model, options)
    moments = measure(
        model,
        x,
        statistics=before,
        batch_size=batch_size,
        steps=options.steps,
        dropout=options.dropout,
        layers=options.layers,
    )
    path = Path(options.output)
    with replacing(path, options.written) as new:
        moments.save(new)
    if options.json:
        content = {
            "model": options.model,
            "layers": list(moments.moments),
            "samples": moments.samples,
            "batches": moments.batches,
            "output": str(path),
        }
        print(json.dumps(content, indent=2), file=options.out)
    else:
        count = len(moments.moments)
        print(
            f"Measured {count} BatchNormalization layer{'s' * (count != 1)} over "
            f"{moments.samples:,} samples ({moments.batches:,} batches).\n"
            f"Saved {printable(str(path))}."
        )
    return 0

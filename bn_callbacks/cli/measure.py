"""`bn-callbacks measure`: saves the moments of a part of the data."""

import argparse

from bn_callbacks.cli.merge import read_moments, save
from bn_callbacks.cli.models import load
from bn_callbacks.cli.sources import open_data
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
    count = len(moments.moments)
    done = f"Measured {count} BatchNormalization layer{'s' * (count != 1)} over"
    save(moments, options, done, {"model": options.model})
    return 0

"""`bn-callbacks demo`."""

import argparse

from bn_callbacks import demo


def run(options: argparse.Namespace) -> int:
    """Runs the demo."""
    demo.run(options.log_dir, options.model, epochs=options.epochs, seed=options.seed)
    return 0

"""`bn-callbacks apply`: writes measured statistics into a saved model."""

import argparse

import keras

from bn_callbacks.cli.merge import read_moments
from bn_callbacks.cli.recalibrate import replace_statistics
from bn_callbacks.pooling import apply_statistics
from bn_callbacks.report import RecalibrationReport


def run(options: argparse.Namespace) -> int:
    """Applies and saves."""
    moments = read_moments(options.moments)

    def apply(model: keras.Model) -> RecalibrationReport:
        report = apply_statistics(model, moments)
        if not options.json:
            print(f"Before:\n\n{report.before}\n\n{report}")
        return report

    return replace_statistics(options, apply)

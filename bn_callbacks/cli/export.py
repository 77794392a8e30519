"""`bn-callbacks export`: makes a SavedModel of a saved model, for serving."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import tensorflow as tf

from bn_callbacks.cli.errors import text_of
from bn_callbacks.cli.models import load
from bn_callbacks.cli.recalibrate import recalibrate, say_result
from bn_callbacks.cli.serving import expect, export_saved_model, verify
from bn_callbacks.cli.writing import cannot_write, replacing
from bn_callbacks.names import printable


def run(options: argparse.Namespace) -> int:
    """Recalibrates, exports, verifies; returns 1 if the old statistics were better."""
    model = load(options.model, options.custom_objects, is_trusted=options.unsafe)
    report, batches = recalibrate(model, options)
    path = Path(options.output)
    done, facts = "", dict[str, Any](output=str(path), verified=None)
    if report.committed:
        # Computed before the export, which might change the model.
        expected = expect(model, batches)
        try:
            with replacing(path, options.written) as new:
                export_saved_model(model, new)
                proof = verify(new, expected)
        except tf.errors.OpError as error:
            raise cannot_write(path, text_of(error)) from error
        done = f"Exported to {printable(str(path))}. {proof}"
        facts["verified"] = dataclasses.asdict(proof)
    say_result(report, options, done, facts)
    return 0 if report.committed else 1

"""`bn-callbacks recalibrate`: gives a saved model the statistics of its data."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from bn_callbacks.cli.errors import with_options
from bn_callbacks.cli.models import load
from bn_callbacks.cli.patching import SavedStatistics
from bn_callbacks.cli.sources import open_data
from bn_callbacks.cli.writing import replacing
from bn_callbacks.layers import count_inputs
from bn_callbacks.measuring.data import Batches
from bn_callbacks.names import printable
from bn_callbacks.recalibration import Recalibration, check_options
from bn_callbacks.report import RecalibrationReport, plain


def run(options: argparse.Namespace) -> int:
    """Recalibrates and saves; returns 1 if the old statistics were better."""
    return replace_statistics(options, lambda model: recalibrate(model, options)[0])


def replace_statistics(
    options: argparse.Namespace, act: Callable[[keras.Model], RecalibrationReport]
) -> int:
    """Loads the model, and saves the statistics that `act` gives it.

    Args:
        options: The command's options.
        act: Changes the model's statistics, and prints its report if that is wanted.

    Returns:
        0 if they were saved, 1 if `act` has found the old ones to be better.
    """

    def load_again(path: Path) -> keras.Model:
        return load(path, options.custom_objects, is_trusted=options.unsafe)

    source = Path(options.model)
    model = load_again(source)
    saved = SavedStatistics(source, model, load_again)
    report = act(model)
    path = source if options.in_place else Path(options.output)
    if report.committed:
        with replacing(path, options.written) as new:
            saved.write(new)
    say_result(report, options, f"Saved {printable(str(path))}.", {"output": str(path)})
    return 0 if report.committed else 1


def recalibrate(
    model: keras.Model, options: argparse.Namespace
) -> tuple[RecalibrationReport, Batches]:
    """Recalibrates as the options say. Returns the report and the batches."""
    x, batch_size = open_data(options.data, model, options)
    batches = Batches(
        x, batch_size=batch_size, steps=options.steps, inputs=count_inputs(model)
    )
    check_options(options.refine, options.tolerance, options.dropout, 0, options.prior)
    validation = None
    if options.validation is not None:
        validation = open_data(options.validation, model, options).x
    recalibration = Recalibration(
        model,
        batches,
        tolerance=options.tolerance,
        refine=options.refine,
        dropout=options.dropout,
        layers=options.layers,
        validation_data=validation,
        prior=options.prior,
    )
    # Outside a terminal, Keras' progress bar would write endless lines.
    shows_bar = sys.stdout.isatty() and not options.json
    if not options.json and not shows_bar:
        names = f"{options.model} with {options.data}"
        print(f"Recalibrating {printable(names)}", flush=True)
    report = recalibration.run(1 if shows_bar else 0)
    if not options.json:
        before = f"Before:\n\n{report.before}\n"
        # With the bar, `run` has printed the report.
        print(before if shows_bar else f"\n{before}\n{with_options(str(report))}")
    return report, batches


def say_result(
    report: RecalibrationReport,
    options: argparse.Namespace,
    done: str,
    facts: dict[str, Any],
) -> None:
    """Prints the last line, or the whole result as JSON.

    Args:
        report: The report of the recalibration.
        options: The command's options.
        done: A sentence that says what was written.
        facts: The same for JSON. If nothing was written, each becomes None.
    """
    if options.json:
        if not report.committed:
            facts = dict.fromkeys(facts)
        content = {"model": options.model, **report.to_dict(), **facts}
        print(json.dumps(plain(content), indent=2), file=options.out)
    elif report.committed:
        print(done)
    else:
        print("Nothing was written: recalibration would raise the validation loss.")

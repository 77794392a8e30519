"""Defines the commands and their options, without heavy imports."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from bn_callbacks.names import printable
from bn_callbacks.version import __version__

DEMO_EPOCHS = 5
WIDTH = 79

DATA = (
    "a .npz or .npy file, a directory of images by class, a directory that "
    "tf.data.Dataset.save wrote, TFRecord files (with --features), or "
    "package.module:function, which returns a dataset"
)

FEATURES = (
    '{"inputs": {"image": {"shape": [28, 28, 1], "dtype": "float32"}}, '
    '"targets": {"label": {"shape": [], "dtype": "int64"}}}'
)
"""An example of what `--features` names."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments of a command; ends the process after --help or a mistake."""
    return _parser().parse_args(arguments)


class Command(NamedTuple):
    """A command.

    Args:
        summary: What it does, in the list of all commands.
        description: What it does, in its own help.
        examples: Its arguments in use, the most usual first.
        statuses: What its exit status means.
        options: Its arguments: what `add_argument` takes, by name.
    """

    summary: str
    description: str
    examples: tuple[str, ...]
    statuses: str
    options: dict[str, dict[str, Any]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # The argument may contain line breaks.
        line = printable(" ".join(message.split()))
        self.exit(2, f"{self.prog}: {line}. See {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    every = COMMANDS.items()
    examples = [f"{name} {command.examples[0]}" for name, command in every]
    parser = _Parser(
        prog="bn-callbacks",
        description=(
            "Watch and repair the moving statistics of BatchNormalization layers."
        ),
        epilog=_listed(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in every:
        examples = [f"{name} {example}" for example in command.examples]
        own = parsers.add_parser(
            name,
            help=command.summary,
            description=textwrap.fill(command.description, WIDTH),
            epilog=f"{_listed(examples)}\n\nexit status: {command.statuses}",
            # Keeps the line breaks of the examples.
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        target: Any = own
        if "--in-place" in command.options:
            target = own.add_mutually_exclusive_group(required=True)
        for option, settings in command.options.items():
            (target if option in _TARGET else own).add_argument(option, **settings)
    return parser


def _listed(examples: Sequence[str]) -> str:
    lines = [f"  bn-callbacks {example}" for example in examples]
    return "\n".join([f"example{'s' * (len(lines) > 1)}:", *lines])


def _model_path(text: str) -> str:
    if not text.endswith(".keras"):
        raise argparse.ArgumentTypeError(
            f"the name of the file must end in .keras. Received: {text}"
        )
    return text


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}. Received: {text}"
            )
        return int(text)

    return number


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number. Received: {text}")
    return value


def _refine(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else _at_least(0)(text)


def _flag(help_text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help_text}


def _layers(purpose: str) -> dict[str, dict[str, Any]]:
    text = f"name or path of a layer to {purpose}; may be repeated (default: all)"
    return {"--layers": {"metavar": "NAME", "action": "append", "help": text}}


_DEBUG = {"--debug": _flag("show the traceback of an error")}

_PRINTING = {"--json": _flag("print JSON instead of text"), **_DEBUG}

_MODEL: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL.keras", "help": "a saved Keras model"},
    "--custom-objects": {
        "metavar": "MODULE",
        "help": "module with the model's own layers, losses and so on",
    },
    "--unsafe": _flag(
        "run Python code in the file (Lambda layers); only if you trust it"
    ),
}

_DATA: dict[str, dict[str, Any]] = {
    "--data": {"metavar": "DATA", "required": True, "help": f"training data: {DATA}"},
    "--features": {
        "metavar": "SPEC.json",
        "help": f"what the examples of TFRecord files hold, as in {FEATURES}",
    },
    "--steps": {
        "metavar": "N",
        "type": _at_least(1),
        "help": "batches to read (default: all)",
    },
    "--batch-size": {
        "metavar": "N",
        "type": _at_least(1),
        "help": "samples a batch (default: 32, or as the data come)",
    },
}

_DROPOUT = {"--dropout": _flag("let dropout act as in training")}

_RECALIBRATION: dict[str, dict[str, Any]] = {
    **_MODEL,
    **_DATA,
    "--tolerance": {
        "metavar": "X",
        "type": _positive,
        "help": "stop reading when the statistics are precise to so many standard "
        "deviations (0.01 is plenty); needs shuffled data",
    },
    "--refine": {
        "metavar": "N",
        "type": _refine,
        "default": "auto",
        "help": "further passes over the data (default: as many as are needed)",
    },
    **_DROPOUT,
    "--prior": {
        "choices": ["stored"],
        "help": "with a handful of examples: correct the stored statistics by as much "
        "as the examples can tell",
    },
    "--validation": {
        "metavar": "DATA",
        "help": "data with targets, in the forms of --data, to choose better "
        "statistics",
    },
    **_layers("recalibrate, even a frozen one"),
    **_PRINTING,
}

_TARGET: dict[str, dict[str, Any]] = {
    "--output": {"metavar": "OUT.keras", "help": "file for the recalibrated model"},
    "--in-place": _flag("replace MODEL.keras itself"),
}

_MOMENTS: dict[str, dict[str, Any]] = {
    "--output": {
        "metavar": "OUT.npz",
        "required": True,
        "help": "file for the moments",
    },
    **_PRINTING,
}

COMMANDS = {
    "demo": Command(
        "train a network that predicts badly, find out why, and repair it",
        "Trains three Dense + BatchNormalization + ReLU layers on scikit-learn's "
        "digits, for too few steps for the default momentum; shows what "
        "BatchNormMonitor finds, and the losses as trained, debiased and recalibrated. "
        "Takes some ten seconds and needs bn-callbacks[demo]. Look at the result with: "
        "tensorboard --logdir logs/demo",
        ("--log-dir logs/demo --model digits.keras",),
        "0 done; 2 error",
        {
            "--log-dir": {
                "metavar": "DIR",
                "default": "logs/demo",
                "help": "directory for TensorBoard's files (default: %(default)s)",
            },
            "--model": {
                "metavar": "PATH",
                "type": _model_path,
                "help": "file for the recalibrated model (default: model.keras in "
                "--log-dir)",
            },
            "--epochs": {
                "metavar": "N",
                "type": _at_least(1),
                "default": DEMO_EPOCHS,
                "help": "epochs of 20 steps (default: %(default)s)",
            },
            "--seed": {
                "metavar": "N",
                "type": _at_least(0),
                "default": 0,
                "help": "seed of the weights and of the order (default: %(default)s)",
            },
            **_DEBUG,
        },
    ),
    "inspect": Command(
        "show the BatchNormalization layers of a saved model",
        "Shows what each BatchNormalization layer stores and what is suspicious about "
        "it; with --data also how far the statistics are from the data, and how this "
        "changes the loss. Changes nothing.",
        ("model.keras", "model.keras --data train.npz --json"),
        "0 healthy; 1 findings; 2 error",
        {
            **_MODEL,
            **_DATA,
            "--data": {**_DATA["--data"], "required": False},
            **_layers("look at"),
            **_PRINTING,
        },
    ),
    "recalibrate": Command(
        "give a saved model the statistics of its training data",
        "Replaces the moving statistics by those of the training data, as inference "
        "sees them, and saves the model. Nothing else in it changes.",
        (
            "model.keras --data train.npz --output new.keras",
            "model.keras --data train.npz --validation val.npz --in-place",
        ),
        "0 saved; 1 not saved: the validation loss would rise; 2 error",
        {**_RECALIBRATION, **_TARGET},
    ),
    "export": Command(
        "recalibrate a saved model and export it for serving",
        "Recalibrates, exports a SavedModel, loads it in another process with "
        "TensorFlow alone, and compares its outputs with those of the model. Removes "
        "an export that differs. MODEL.keras stays as it is.",
        ("model.keras --data train.npz --output serving/1",),
        "0 exported; 1 not exported: the validation loss would rise; 2 error",
        {
            **_RECALIBRATION,
            "--output": {
                "metavar": "DIR",
                "required": True,
                "help": "directory to make; it must not exist, or be empty",
            },
        },
    ),
    "measure": Command(
        "measure a part of the data, to be merged with others",
        "Measures count, mean and squared deviations of the input of each "
        "BatchNormalization layer, for data that are in many places. The model is not "
        "changed.",
        (
            "model.keras --data train.npz --output 1.npz",
            "model.keras --data train.npz --statistics 1.npz --output 2.npz",
        ),
        "0 saved; 2 error",
        {
            **_MODEL,
            **_DATA,
            "--statistics": {
                "metavar": "ALL.npz",
                "help": "the merged moments of the round before, with which layers "
                "normalise (default: with the statistics of each batch)",
            },
            **_DROPOUT,
            **_layers("measure, even a frozen one"),
            **_MOMENTS,
        },
    ),
    "merge": Command(
        "merge the moments of several parts of the data",
        "Merges moments exactly, in any order: the result is that of all data in one "
        "place.",
        ("part-1.npz part-2.npz --output all.npz",),
        "0 saved; 2 error",
        {
            "parts": {
                "metavar": "PART.npz",
                "nargs": "+",
                "help": "files that measure or merge wrote",
            },
            **_MOMENTS,
        },
    ),
    "apply": Command(
        "give a saved model the statistics that were measured in parts",
        "Replaces the moving statistics by those of merged moments, and saves the "
        "model. Nothing else in it changes.",
        ("model.keras --moments all.npz --output new.keras",),
        "0 saved; 2 error",
        {
            **_MODEL,
            "--moments": {
                "metavar": "ALL.npz",
                "required": True,
                "help": "the merged moments",
            },
            **_TARGET,
            **_PRINTING,
        },
    ),
}

"""Defines the commands and their options, without heavy imports."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from bn_callbacks.names import printable
from bn_callbacks.version import __version__

DEMO_EPOCHS = 5
WIDTH = 79

DATA = (
    "a .npz or .npy file, a directory of images by class, a directory that "
    "tf.data.Dataset.save wrote, TFRecord files (with --features), or "
    "package.module:function, which returns a dataset"
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments of a command; ends the process after --help or a mistake."""
    return _parser().parse_args(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # The argument may contain line breaks.
        line = printable(" ".join(message.split()))
        self.exit(2, f"{self.prog}: {line}. See {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bn-callbacks",
        description=(
            "Watch and repair the moving statistics of BatchNormalization layers."
        ),
        epilog=(
            "examples:\n"
            "  bn-callbacks demo --log-dir logs/demo\n"
            "  bn-callbacks inspect model.keras --data train.npz\n"
            "  bn-callbacks recalibrate model.keras --data train.npz --output new.keras"
            "\n  bn-callbacks export model.keras --data train.npz --output serving/1"
            "\n  bn-callbacks measure model.keras --data train.npz --output part-1.npz"
            "\n  bn-callbacks merge part-1.npz part-2.npz --output all.npz"
            "\n  bn-callbacks apply model.keras --moments all.npz --output new.keras"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    debug, model, data, recalibration = _debug(), _model(), _data(), _recalibration()

    _demo(commands, debug)
    command = _command(
        commands,
        "inspect",
        [model, data, debug],
        summary="show the BatchNormalization layers of a saved model",
        description=(
            "Shows what each BatchNormalization layer stores and what is suspicious "
            "about it; with --data also how far the statistics are from the data, and "
            "how this changes the loss. Changes nothing."
        ),
        epilog=(
            "examples:\n"
            "  bn-callbacks inspect model.keras\n"
            "  bn-callbacks inspect model.keras --data train.npz --json\n"
            "\n"
            "exit status: 0 healthy, 1 findings, 2 error"
        ),
    )
    command.add_argument("--data", metavar="DATA", help=f"training data: {DATA}")
    _layers(command, "look at")

    command = _command(
        commands,
        "recalibrate",
        [model, recalibration, data, debug],
        summary="give a saved model the statistics of its training data",
        description=(
            "Replaces the moving statistics by those of the training data, as "
            "inference sees them, and saves the model. Nothing else in it changes."
        ),
        epilog=(
            "examples:\n"
            "  bn-callbacks recalibrate model.keras --data train.npz --output new.keras"
            "\n"
            "  bn-callbacks recalibrate model.keras --data train.npz "
            "--validation val.npz --in-place\n"
            "\n"
            "exit status: 0 saved, 1 not saved, as the validation loss would rise, "
            "2 error"
        ),
    )
    _target(command)

    command = _command(
        commands,
        "export",
        [model, recalibration, data, debug],
        summary="recalibrate a saved model and export it for serving",
        description=(
            "Recalibrates, exports a SavedModel, loads it in another process with "
            "TensorFlow alone, and compares its outputs with those of the model. "
            "Removes an export that differs. MODEL.keras stays as it is."
        ),
        epilog=(
            "example:\n"
            "  bn-callbacks export model.keras --data train.npz --output serving/1\n"
            "\n"
            "exit status: 0 exported, 1 not exported, as the validation loss would "
            "rise, 2 error"
        ),
    )
    command.add_argument(
        "--output",
        metavar="DIR",
        required=True,
        help="directory to make; it must not exist, or be empty",
    )
    _in_parts(commands, model, data, debug)
    return parser


def _in_parts(
    commands: Any,
    model: argparse.ArgumentParser,
    data: argparse.ArgumentParser,
    debug: argparse.ArgumentParser,
) -> None:
    command = _command(
        commands,
        "measure",
        [model, data, debug],
        summary="measure a part of the data, to be merged with others",
        description=(
            "Measures count, mean and squared deviations of the input of each "
            "BatchNormalization layer, for data that are in many places. The model "
            "is not changed."
        ),
        epilog=(
            "examples:\n"
            "  bn-callbacks measure model.keras --data train.npz --output 1.npz\n"
            "  bn-callbacks measure model.keras --data train.npz --statistics 1.npz "
            "--output 2.npz"
        ),
    )
    command.add_argument(
        "--data", metavar="DATA", required=True, help=f"training data: {DATA}"
    )
    command.add_argument(
        "--statistics",
        metavar="ALL.npz",
        help=(
            "the merged moments of the round before, with which layers normalise "
            "(default: with the statistics of each batch)"
        ),
    )
    command.add_argument(
        "--dropout", action="store_true", help="let dropout act as in training"
    )
    _layers(command, "measure, even a frozen one")
    command.add_argument(
        "--output", metavar="OUT.npz", required=True, help="file for the moments"
    )

    command = _command(
        commands,
        "merge",
        [debug],
        summary="merge the moments of several parts of the data",
        description=(
            "Merges moments exactly, in any order: the result is that of all data in "
            "one place."
        ),
        epilog=(
            "example:\n  bn-callbacks merge part-1.npz part-2.npz --output all.npz"
        ),
    )
    command.add_argument(
        "parts", metavar="PART.npz", nargs="+", help="files that measure or merge wrote"
    )
    command.add_argument(
        "--output", metavar="OUT.npz", required=True, help="file for the moments"
    )

    command = _command(
        commands,
        "apply",
        [model, debug],
        summary="give a saved model the statistics that were measured in parts",
        description=(
            "Replaces the moving statistics by those of merged moments, and saves the "
            "model. Nothing else in it changes."
        ),
        epilog=(
            "example:\n"
            "  bn-callbacks apply model.keras --moments all.npz --output new.keras"
        ),
    )
    command.add_argument(
        "--moments", metavar="ALL.npz", required=True, help="the merged moments"
    )
    _target(command)


def _target(command: argparse.ArgumentParser) -> None:
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--output", metavar="OUT.keras", help="file for the recalibrated model"
    )
    target.add_argument(
        "--in-place", action="store_true", help="replace MODEL.keras itself"
    )


def _command(
    commands: Any,
    name: str,
    parents: Sequence[argparse.ArgumentParser],
    *,
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=parents,
        help=summary,
        description=textwrap.fill(description, WIDTH),
        epilog=epilog,
        # Keeps the line breaks of the examples.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _debug() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    return options


def _model() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument("model", metavar="MODEL.keras", help="a saved Keras model")
    options.add_argument(
        "--custom-objects",
        metavar="MODULE",
        help="module with the model's own layers, losses and so on",
    )
    options.add_argument(
        "--unsafe",
        action="store_true",
        help="run Python code in the file (Lambda layers); only if you trust it",
    )
    options.add_argument(
        "--json", action="store_true", help="print JSON instead of text"
    )
    return options


def _data() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument(
        "--features",
        metavar="SPEC.json",
        help=(
            "what the examples of TFRecord files hold, as in "
            '{"inputs": {"image": {"shape": [28, 28, 1], "dtype": "float32"}}, '
            '"targets": {"label": {"shape": [], "dtype": "int64"}}}'
        ),
    )
    options.add_argument(
        "--steps",
        metavar="N",
        type=_at_least(1),
        help="batches to read (default: all)",
    )
    options.add_argument(
        "--batch-size",
        metavar="N",
        type=_at_least(1),
        help="samples a batch (default: 32, or as the data come)",
    )
    return options


def _recalibration() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument(
        "--data", metavar="DATA", required=True, help=f"training data: {DATA}"
    )
    options.add_argument(
        "--tolerance",
        metavar="X",
        type=_positive,
        help=(
            "stop reading when the statistics are precise to so many standard "
            "deviations (0.01 is plenty); needs shuffled data"
        ),
    )
    options.add_argument(
        "--refine",
        metavar="N",
        type=_refine,
        default="auto",
        help="further passes over the data (default: as many as are needed)",
    )
    options.add_argument(
        "--dropout", action="store_true", help="let dropout act as in training"
    )
    options.add_argument(
        "--prior",
        choices=["stored"],
        help=(
            "with a handful of examples: correct the stored statistics by as much as "
            "the examples can tell"
        ),
    )
    options.add_argument(
        "--validation",
        metavar="DATA",
        help="data with targets, in the forms of --data, to choose better statistics",
    )
    _layers(options, "recalibrate, even a frozen one")
    return options


def _layers(options: argparse.ArgumentParser, purpose: str) -> None:
    options.add_argument(
        "--layers",
        metavar="NAME",
        action="append",
        help=f"name or path of a layer to {purpose}; may be repeated (default: all)",
    )


def _demo(commands: Any, debug: argparse.ArgumentParser) -> None:
    command = _command(
        commands,
        "demo",
        [debug],
        summary="train a network that predicts badly, find out why, and repair it",
        description=(
            "Trains three Dense + BatchNormalization + ReLU layers on scikit-learn's "
            "digits, for too few steps for the default momentum; shows what "
            "BatchNormMonitor finds, and the losses as trained, debiased and "
            "recalibrated. Takes some ten seconds and needs bn-callbacks[demo]."
        ),
        epilog=(
            "example:\n"
            "  bn-callbacks demo --log-dir logs/demo --model digits.keras\n"
            "  tensorboard --logdir logs/demo"
        ),
    )
    command.add_argument(
        "--log-dir",
        metavar="DIR",
        default="logs/demo",
        help="directory for TensorBoard's files (default: %(default)s)",
    )
    command.add_argument(
        "--model",
        metavar="PATH",
        type=_model_path,
        help="file for the recalibrated model (default: model.keras in --log-dir)",
    )
    command.add_argument(
        "--epochs",
        metavar="N",
        type=_at_least(1),
        default=DEMO_EPOCHS,
        help="epochs of 20 steps (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        metavar="N",
        type=_at_least(0),
        default=0,
        help="seed of the weights and of the order (default: %(default)s)",
    )


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

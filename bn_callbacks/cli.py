"""The command line, `bn-callbacks`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from bn_callbacks import demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command and its options; those of the process by default.

    Returns:
        The exit status: 0, or 2 after an error, of which one line on stderr tells.
    """
    options = _parser().parse_args(arguments)
    try:
        demo.run(
            options.log_dir, options.model, epochs=options.epochs, seed=options.seed
        )
    except (demo.DemoError, OSError) as error:
        print(f"bn-callbacks: {error}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bn-callbacks",
        description="Watch and repair the moving statistics of BatchNormalization.",
        epilog="example:\n  bn-callbacks demo --log-dir logs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "demo",
        help="train a network that predicts badly, find out why, and repair it",
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        default=demo.EPOCHS,
        help="epochs of 20 steps (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        metavar="N",
        type=_at_least(0),
        default=0,
        help="seed of the weights and of the order (default: %(default)s)",
    )
    return parser


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

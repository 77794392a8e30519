"""The command `bn-callbacks`."""

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from bn_callbacks.cli.ending import (
    Terminated,
    heeding_signals,
    lenient_streams,
    say,
)
from bn_callbacks.cli.errors import CommandError, one_line, with_options
from bn_callbacks.cli.options import parse
from bn_callbacks.cli.paths import check_paths
from bn_callbacks.installing import import_with_advice

ERROR = 2
INTERRUPTED = 130
"""The exit status that shells give a command that Ctrl-C has ended."""
SIGNALLED = 128
"""Shells add this to the number of any other signal."""


def program() -> NoReturn:
    """Runs the command of this process, then ends the process."""
    sys.exit(main(is_program=True))


def main(arguments: Sequence[str] | None = None, *, is_program: bool = False) -> int:
    """Runs a command.

    Args:
        arguments: The command and its options; those of the process by default.
        is_program: Whether the process ends with the command.

    Returns:
        The exit status: 0, or 1 for findings, 2 for an error (with one line on stderr),
        130 for Ctrl-C, 143 for SIGTERM. Once the output is written, it is 0 whatever
        happens next.
    """
    options = parse(arguments)
    options.written = []
    with heeding_signals(is_program=is_program), lenient_streams() as out:
        options.out = out
        status = _run(options)
        out.flush()
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            say(f"cannot write to stdout: {out.error.strerror}")
            status = status if options.written else ERROR
    return status


def _run(options: argparse.Namespace) -> int:
    try:
        # Wrong paths raise before TensorFlow takes seconds to import.
        check_paths(options)
        with _one_line_warnings(), _quiet_stdout(options):
            _import_tensorflow(options.debug)
            command = import_with_advice(f"{__name__}.{options.command}")
            status: int = command.run(options)
    except KeyboardInterrupt:
        return _stopped(options, "interrupted", INTERRUPTED)
    except Terminated as stop:
        return _stopped(options, str(stop), SIGNALLED + stop.number)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        text = one_line(error)
        if not isinstance(error, CommandError):  # The library names its arguments.
            text = with_options(text, bool(getattr(options, "validation", None)))
        if options.written:
            say(f"{options.written[-1]} was written. After that: {text}")
            return 0
        say(text)
        return ERROR
    return status


def _stopped(options: argparse.Namespace, how: str, status: int) -> int:
    """Message and exit status tell whether the output is on the disk."""
    if options.written:
        say(f"{how}, but {options.written[-1]} was written before, as a whole")
        return 0
    say(f"{how}, no output was written")
    return status


def _quiet_stdout(options: argparse.Namespace) -> Any:
    """With `--json`, sends what other code prints, such as user modules, to stderr."""
    if getattr(options, "json", False):
        return contextlib.redirect_stdout(sys.stderr)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *_: Any) -> None:
        say(f"note: {with_options(' '.join(str(message).split()))}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _import_tensorflow(is_loud: bool) -> None:
    """Imports TensorFlow without the lines about GPUs that its C++ code writes."""
    if is_loud or "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        import_with_advice("tensorflow")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

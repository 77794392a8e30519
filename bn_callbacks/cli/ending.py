"""Ends commands cleanly: after signals, and when nobody reads their output."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from bn_callbacks.names import printable

SIGNALS = ("SIGTERM", "SIGHUP")
"""Signals that containers, schedulers and closed terminals send."""


class Terminated(BaseException):
    """A signal has asked the process to end, as `kill` does.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"terminated by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def heeding_signals(*, is_program: bool = False) -> Iterator[None]:
    """Makes signals raise `Terminated`, where they would end the process at once.

    So the command can clean up. A signal that is ignored stays ignored.

    Args:
        is_program: Whether the process ends after the block. That takes a second, in
            which no signal may change the exit status.
    """
    before: dict[int, Any] = {}

    def end(number: int, _: Any) -> NoReturn:
        for each in before:  # A second signal must not disturb the cleaning up.
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        if is_program:
            before = dict.fromkeys([*before, signal.SIGINT], signal.SIG_IGN)
        for number, handler in before.items():
            signal.signal(number, handler)


class Stream:
    """A text stream whose errors do not end the command.

    It escapes what it cannot encode. When nobody reads it any more, as with
    `| head -1`, or when the disk is full, it drops the rest.

    Args:
        stream: The stream.

    Attributes:
        error: The error after which it drops everything; None before.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text if the stream still works."""
        if self.error is not None:
            return len(text)
        with self._failing():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(
                    text.encode(encoding, "backslashreplace").decode(encoding)
                )
        return len(text)

    def flush(self) -> None:
        """Flushes the stream if it still works."""
        if self.error is not None:
            return
        with self._failing():
            self._stream.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            # Python flushes once more at its end, and would print an error.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self._stream.fileno())
                os.close(nothing)


@contextlib.contextmanager
def lenient_streams() -> Iterator[Stream]:
    """Replaces stdout and stderr by a `Stream` each; gives that of stdout."""
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def say(message: str) -> None:
    """Prints a message to stderr, on one line whatever characters it has."""
    print(f"bn-callbacks: {printable(message)}", file=sys.stderr)

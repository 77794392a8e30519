"""How a command ends: signals, streams that nobody reads, and what is said of it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from bn_callbacks.names import printable

SIGNALS = ("SIGTERM", "SIGHUP")
"""What containers, schedulers and closed terminals send."""


class Terminated(BaseException):
    """The process has been asked to end, as by `kill`.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"terminated by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def heeding_signals(*, is_program: bool = False) -> Iterator[None]:
    """Signals that would end the process at once raise `Terminated` instead.

    So what is half done is cleaned up. A signal that somebody ignores stays ignored.

    Args:
        is_program: Whether nothing but the end of the process comes after the block:
            that takes a second, in which no signal is to change the exit status.
    """
    before: dict[int, Any] = {}

    def end(number: int, _: Any) -> NoReturn:
        for each in before:  # Cleaning up is not to be disturbed.
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
    """A stream of text that never ends the work that is told of on it.

    What it cannot encode it escapes. When nobody reads it any more, as behind
    `| head -1`, or its disk is full, the rest is dropped.

    Args:
        stream: The stream.

    Attributes:
        error: What has made it useless, if anything has.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, as far as that is possible."""
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
        """Passes on what was written."""
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
            # Python flushes at its end once more, and would complain.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self._stream.fileno())
                os.close(nothing)


@contextlib.contextmanager
def lenient_streams() -> Iterator[Stream]:
    """Puts a `Stream` before stdout and before stderr. Gives that of stdout."""
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def say(message: str) -> None:
    """Says something on stderr, in one line whatever is in it."""
    print(f"bn-callbacks: {printable(message)}", file=sys.stderr)

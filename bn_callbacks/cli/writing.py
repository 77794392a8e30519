"""Files and directories that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from bn_callbacks.cli.errors import CommandError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a new name beside `path`; what is written there then takes its place.

    It does so in one step, and only if the block has ended well and the disk holds all
    of it. Otherwise, after Ctrl-C too, `path` is as before and the new name is gone.

    Args:
        path: A file, which may exist, or a directory, which may exist if it is empty.

    Returns:
        A context manager that gives the new name, which ends as that of `path` does.

    Raises:
        CommandError: The disk is full, the directory read-only, or the like.
    """
    # Not the link, but the file that it leads to, is replaced.
    target = path.resolve()
    new = target.with_name(f".bn-callbacks-{secrets.token_hex(4)}{target.suffix}")
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield new
        if target.is_file():
            shutil.copymode(target, new)
        _flush(new)
        os.replace(new, target)
    except OSError as error:
        _remove(new, missing)
        raise cannot_write(path, str(error.strerror or error)) from error
    except BaseException:
        _remove(new, missing)
        raise
    for directory in {target.parent, *(parent.parent for parent in missing)}:
        _flush_entry(directory)


def cannot_write(path: Path, reason: str) -> CommandError:
    """The error when `replacing` has failed, for a reason without a full stop."""
    return CommandError(
        f"Cannot write {path}: {reason}. Nothing was left behind. Make room, or write "
        "to another place."
    )


def _flush(path: Path) -> None:
    """Waits until a file, or all in a directory, is on the disk."""
    if not path.is_dir():
        _flush_entry(path)
        return
    for directory, _, names in os.walk(path):
        for name in names:
            _flush_entry(Path(directory, name))
        _flush_entry(Path(directory))


def _flush_entry(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle to wait on.
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path, parents: Sequence[Path]) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    for parent in parents:
        with contextlib.suppress(OSError):  # Somebody else has put something there.
            parent.rmdir()

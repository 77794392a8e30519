"""Writes files and directories that appear whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bn_callbacks.cli.errors import CommandError

_PREFIX = "bn-callbacks-"
_TEMPORARY = re.compile(rf"\.?{_PREFIX}(?P<host>[0-9a-f]+)-(?P<process>\d+)-.*")

_ours: set[str] = set()
"""Temporary names in use by this process."""


@contextlib.contextmanager
def replacing(path: Path, written: list[Path] | None = None) -> Iterator[Path]:
    """Gives a new name beside `path`. What the block writes there then replaces `path`.

    This is one step, which happens only if the block ends well and all is on the disk.
    Otherwise, after Ctrl-C too, `path` is as before and the new file is removed. Until
    then nobody else can read it. The new file gets the owner, the mode and the extended
    attributes of the old one, as far as that is permitted.

    Args:
        path: A file, which may exist, or a directory, which may exist if it is empty.
        written: `path` is appended as soon as it is replaced, whatever happens next.

    Returns:
        A context manager that gives the new name, with the suffix of `path`.

    Raises:
        CommandError: The disk is full, the directory read-only, or the like.
    """
    # Replaces the file that a link points to, not the link.
    target = path.resolve()
    new = target.with_name(f".{_name()}{target.suffix}")
    missing = [parent for parent in target.parents if not parent.exists()]
    _ours.add(new.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        with _private() as mask:
            yield new
        _give_modes(new, target, mask)
        _flush(new)
        identity = new.stat().st_ino
        try:
            os.replace(new, target)
        finally:
            if written is not None and _is(target, identity):
                written.append(path)
    except OSError as error:
        _remove(new, missing)
        raise cannot_write(path, str(error.strerror or error)) from error
    except BaseException:
        _remove(new, missing)
        raise
    finally:
        _ours.discard(new.name)
    for directory in {target.parent, *(parent.parent for parent in missing)}:
        _flush_entry(directory)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Makes a folder that nobody else can read, and removes it after the block."""
    folder = Path(tempfile.gettempdir(), _name())
    _ours.add(folder.name)
    sweep(folder.parent)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _ours.discard(folder.name)


def sweep(directory: Path) -> None:
    """Removes files of our processes that died without cleaning up."""
    if os.name == "nt":  # `os.kill` with 0 would end a process there.
        return
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and path.name not in _ours and _is_left(path, match):
                _remove(path, [])


def cannot_write(path: Path, reason: str) -> CommandError:
    """Makes the error for a failed `replacing`; the reason has no full stop."""
    return CommandError(
        f"Cannot write {path}: {reason}. Nothing was left behind. Make room, or write "
        "to another place."
    )


def _name() -> str:
    return f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _host() -> str:
    name = os.uname().nodename if hasattr(os, "uname") else ""
    return f"{zlib.crc32(name.encode()):08x}"


def _is_left(path: Path, match: re.Match[str]) -> bool:
    if match["host"] != _host() or path.lstat().st_uid != os.geteuid():
        return False
    if int(match["process"]) == os.getpid():
        return True  # Left by an earlier process with our number, as in a container.
    try:
        os.kill(int(match["process"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def _private() -> Iterator[int]:
    """Makes new files readable by their owner only. Gives the mask from before."""
    mask = os.umask(0o077)
    try:
        yield mask
    finally:
        os.umask(mask)


def _give_modes(new: Path, target: Path, mask: int) -> None:
    """Sets the modes of the new files."""
    for directory, _, names in os.walk(new):
        for name in names:
            os.chmod(Path(directory, name), 0o666 & ~mask)
        os.chmod(directory, 0o777 & ~mask)
    if not new.is_dir():
        os.chmod(new, 0o666 & ~mask)
    if target.exists():
        _take_over(target, new)


def _take_over(target: Path, new: Path) -> None:
    """Copies owner, mode and extended attributes from the file that is replaced."""
    old, mine = target.stat(), new.stat()
    mode = stat.S_IMODE(old.st_mode)
    chown: Any = getattr(os, "chown", None)
    if chown is not None and (old.st_uid, old.st_gid) != (mine.st_uid, mine.st_gid):
        for owner in (old.st_uid, -1):
            with contextlib.suppress(OSError):
                chown(new, owner, old.st_gid)
                break
        if new.stat().st_gid != old.st_gid:
            # The new group must not get the rights of the old one.
            mode &= ~0o070 | (mode & 0o007) << 3
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):
            for name in os.listxattr(target):
                with contextlib.suppress(OSError):
                    os.setxattr(new, name, os.getxattr(target, name))
    os.chmod(new, mode)


def _is(path: Path, identity: int) -> bool:
    try:
        return path.stat().st_ino == identity
    except OSError:
        return False


def _flush(path: Path) -> None:
    """Waits until a file, or a directory with all its files, is on the disk."""
    if not path.is_dir():
        _flush_entry(path)
        return
    for directory, _, names in os.walk(path):
        for name in names:
            _flush_entry(Path(directory, name))
        _flush_entry(Path(directory))


def _flush_entry(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot flush a directory.
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path, parents: Sequence[Path]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    for parent in parents:
        with contextlib.suppress(OSError):  # Somebody else has put something there.
            parent.rmdir()

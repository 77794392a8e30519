"""Checks what a `.keras` file claims to hold, before it is unpacked."""

import zipfile
from pathlib import Path

from bn_callbacks.cli.errors import CommandError

MAX_TEXT = 2**28
"""Largest number of bytes of a model's description; no architecture needs more."""

MAX_EXPANSION = 200
"""The content may be so many times as large as the file; weights do not shrink more."""

ALWAYS_ALLOWED = 2**26
"""Content of so many bytes is allowed, however small the file is."""


def check_archive(path: Path) -> None:
    """Raises a CommandError for a file that is no model or would fill the memory.

    It trusts the sizes that members declare, since unpacking stops at these.
    """
    wanted = "Pass a file that model.save('model.keras') wrote."
    if not zipfile.is_zipfile(path):
        raise CommandError(
            f"{path} is damaged, or no .keras file: it is no zip archive. Copy or save "
            "it again."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CommandError(f"{path} is damaged: {error}. Save it again.") from error
    names = [member.filename for member in members]
    if "config.json" not in names:
        raise CommandError(f"There is no Keras model in {path}. {wanted}")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise CommandError(
            f"{path} holds {sorted(twice)[0]!r} more than once, and it is not clear "
            "which one counts: Keras never writes such a file. Save it again."
        )
    for member in members:
        if member.filename.endswith(".json") and member.file_size > MAX_TEXT:
            raise _absurd(path, member.filename, member.file_size, MAX_TEXT)
    total, size = sum(member.file_size for member in members), path.stat().st_size
    limit = max(MAX_EXPANSION * size, ALWAYS_ALLOWED)
    if total > limit:
        raise _absurd(path, f"{len(members)} members", total, limit)


def _absurd(path: Path, what: str, size: int, limit: int) -> CommandError:
    return CommandError(
        f"{path} is no ordinary model, and was not opened: {what} would unpack to "
        f"{size:,} bytes (limit: {limit:,}). If you trust where it comes from, load "
        "and save it in Python."
    )

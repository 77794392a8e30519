"""Checks the names of files and directories before anything is loaded."""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

from bn_callbacks.cli.archives import check_archive
from bn_callbacks.cli.errors import CommandError


def check_paths(options: argparse.Namespace) -> None:
    """Raises a CommandError for a MODEL or an output that cannot work."""
    if options.command == "demo":
        _check_log_dir(Path(options.log_dir))
        if options.model is not None:
            _check_file(Path(options.model))
        return
    if options.command in ("measure", "merge"):
        _check_file(Path(options.output), ".npz")
    if options.command == "merge":
        return
    model = Path(options.model)
    _check_model(model)
    if options.command in ("recalibrate", "apply"):
        _check_file(model if options.in_place else Path(options.output))
        output = None if options.in_place else Path(options.output)
        if output is not None and output.exists() and model.samefile(output):
            raise CommandError(
                f"{options.output} is the model itself. Name another file, or pass "
                "--in-place to replace it."
            )
    if options.command == "export":
        _check_new_directory(Path(options.output))


def _check_model(path: Path) -> None:
    wanted = "Pass a file that model.save('model.keras') wrote."
    if (path / "saved_model.pb").is_file():
        raise CommandError(
            f"{path} is a SavedModel: a graph for serving, whose layers cannot be told "
            "apart any more. Pass the .keras file that it was exported from."
        )
    if path.is_dir():
        raise CommandError(f"{path} is a directory. {wanted}")
    if not path.is_file():
        raise CommandError(f"There is no file {path}. {wanted}")
    if path.name.endswith((".weights.h5", ".weights.json")):
        raise CommandError(
            f"{path} holds weights only, not the model. In Python, build the model, "
            f"model.load_weights('{path.name}') and model.save('model.keras'); pass "
            "that."
        )
    if path.suffix in (".h5", ".hdf5"):
        raise CommandError(
            f"{path} is in the old HDF5 format, which older versions of Keras load "
            "without safe mode. If you trust it, convert it once in Python: "
            f"keras.models.load_model('{path.name}').save('model.keras')."
        )
    if path.suffix != ".keras":
        raise CommandError(f"{path} is no .keras file. {wanted}")
    if not os.access(path, os.R_OK):
        raise CommandError(
            f"{path} cannot be read: permission denied. Pass a copy that is yours."
        )
    check_archive(path)


def _check_log_dir(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise CommandError(f"{path} is no directory. Name one for TensorBoard's files.")
    _check_parent(path / "file")


def _check_file(path: Path, suffix: str = ".keras") -> None:
    if path.suffix != suffix:
        raise CommandError(
            f"The name of the output must end in {suffix}. Received: {path}"
        )
    target = path.resolve()
    if path.is_symlink() and target.suffix != suffix:
        raise CommandError(
            f"{path} is a link to {target}, whose name does not end in {suffix}. Name "
            "another file."
        )
    if path.is_dir():
        raise CommandError(f"{path} is a directory. Name a file.")
    if path.exists() and not path.is_file():
        raise CommandError(
            f"{path} is no file, but a pipe, a socket or a device, into which "
            "nothing can be saved. Name a file."
        )
    _check_mount(target)
    _check_parent(path)


def _check_new_directory(path: Path) -> None:
    target = path.resolve()
    if path.exists() and not path.is_dir():
        kind = "a file" if path.is_file() else "no directory"
        raise CommandError(f"{path} is {kind}. Name a directory to make.")
    if path.exists() and any(path.iterdir()):
        raise CommandError(
            f"{path} is not empty. Name a directory to make, such as the model's next "
            "version."
        )
    if target == Path.cwd() or target in Path.cwd().parents:
        raise CommandError(
            f"{path} is where this command runs, and cannot be replaced. Name a "
            "directory to make, such as serving/1."
        )
    _check_mount(target)
    _check_parent(path)


def _check_mount(path: Path) -> None:
    """Refuses a mount point, such as a container's volume, which cannot be replaced."""
    mounts = set()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
        mounts = {line.split()[4].replace("\\040", " ") for line in lines}
    if os.path.ismount(path) or str(path) in mounts:
        raise CommandError(
            f"{path} is a mount point, and cannot be replaced. Name something in a "
            "mounted directory."
        )


def _check_parent(path: Path) -> None:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise CommandError(
            f"{parent} is a file, not a directory for the output. Name another place."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(
            f"The directory {parent} is read-only. Choose another for the output."
        )
    try:
        # `os.access` lets root write anywhere, and does not check long names.
        with tempfile.NamedTemporaryFile(dir=parent, suffix=path.name[-200:]):
            pass
    except OSError as error:
        raise CommandError(
            f"Cannot write {path}: {error.strerror}. Name another place."
        ) from error

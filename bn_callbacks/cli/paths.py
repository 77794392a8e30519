"""What the names of files and directories give away before anything is loaded."""

import argparse
import os
import zipfile
from pathlib import Path

from bn_callbacks.cli.errors import CommandError


def check_paths(options: argparse.Namespace) -> None:
    """Raises a CommandError for a MODEL or an output that cannot work."""
    if options.command == "demo":
        return
    model = Path(options.model)
    _check_model(model)
    if options.command == "recalibrate":
        _check_file(model if options.in_place else Path(options.output))
        if not options.in_place and _are_same(model, Path(options.output)):
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
    if not zipfile.is_zipfile(path):
        raise CommandError(
            f"{path} is damaged, or no .keras file: it is no zip archive. Copy or save "
            "it again."
        )
    with zipfile.ZipFile(path) as archive:
        if "config.json" not in archive.namelist():
            raise CommandError(f"There is no Keras model in {path}. {wanted}")


def _check_file(path: Path) -> None:
    if path.suffix != ".keras":
        raise CommandError(
            f"The name of the output must end in .keras. Received: {path}"
        )
    if path.is_dir():
        raise CommandError(f"{path} is a directory. Name a file.")
    _check_parent(path)


def _check_new_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise CommandError(f"{path} is a file. Name a directory to make.")
    if path.exists() and any(path.iterdir()):
        raise CommandError(
            f"{path} is not empty. Name a directory to make, such as the model's next "
            "version."
        )
    _check_parent(path)


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


def _are_same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)

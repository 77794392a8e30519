"""Imports the user's modules that the command line names."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType

from bn_callbacks.cli.errors import CommandError, text_of


def _prefer(directory: str, name: str) -> None:
    """Imports a module from a directory, unless Python has one of the same name."""
    if name in sys.modules or name in sys.stdlib_module_names:
        return
    spec = importlib.machinery.PathFinder.find_spec(name, [directory])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise


def import_module(name: str) -> ModuleType:
    """Imports a module from the working directory, or an installed one.

    Raises:
        CommandError: There is no such module, or importing it fails.
    """
    here = os.getcwd()
    if here not in sys.path:
        # At the end, so that files here do not replace modules imported later.
        sys.path.append(here)
    try:
        _prefer(here, name.partition(".")[0])
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            hint = f" Leave out the .py: {name[:-3]}." if name.endswith(".py") else ""
            raise CommandError(
                f"There is no module {name!r} in {here} or on PYTHONPATH.{hint}"
            ) from error
        raise CommandError(
            f"The module {name!r} needs {error.name!r}, which is not installed. "
            "Install it where bn-callbacks is."
        ) from error
    except Exception as error:
        raise CommandError(
            f"Importing the module {name!r} raised {type(error).__name__}: "
            f"{text_of(error)}. Try it with: python -c 'import {name}'"
        ) from error

"""The user's own Python modules, named on the command line."""

import importlib
import os
import sys
from types import ModuleType

from bn_callbacks.cli.errors import CommandError, text_of


def import_module(name: str) -> ModuleType:
    """Imports a module, looked for where the command is run, too.

    Raises:
        CommandError: There is no such module, or it fails.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
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

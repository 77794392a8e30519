"""Shows the version of the package beside the name of the site."""

import runpy
from pathlib import Path
from typing import Any

VERSION = Path(__file__).parents[1] / "bn_callbacks" / "version.py"


def on_config(config: Any) -> Any:
    """What MkDocs calls once it has read mkdocs.yml."""
    version = runpy.run_path(str(VERSION))["__version__"]
    config.site_name = f"{config.site_name} {version}"
    return config

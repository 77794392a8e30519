"""The version, from which the package's metadata have it, too."""

__version__ = "0.1.0"

"""`python -m bn_callbacks`, the same as the command `bn-callbacks`."""

import os
import sys

# With `-m`, Python looks for modules in the working directory first. The files there
# are data: they must not be imported because they are named like a module.
if sys.path and os.path.abspath(sys.path[0]) == os.getcwd():
    del sys.path[0]

from bn_callbacks.cli import program

program()

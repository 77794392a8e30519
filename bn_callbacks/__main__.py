"""`python -m bn_callbacks`, the same as the command `bn-callbacks`."""

import os
import sys

# Of `-m` Python looks for all modules where the command is run, and there first. What
# lies there is data, and not to be imported because it is called like a module.
if sys.path and os.path.abspath(sys.path[0]) == os.getcwd():
    del sys.path[0]

from bn_callbacks.cli import program

program()

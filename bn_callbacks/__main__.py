"""`python -m bn_callbacks`, the same as the command `bn-callbacks`."""

import sys

from bn_callbacks.cli import main

sys.exit(main())

"""Makes the plain modules of this folder importable, for `import random_models`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

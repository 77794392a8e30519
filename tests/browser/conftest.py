"""Makes the plain modules of this folder importable, for `import tensorboard_page`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

"""Makes the scripts of this folder importable, for `import page`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

"""Where this checkout is."""

import os
from pathlib import Path

ROOT = Path(os.path.realpath(__file__)).parents[4]

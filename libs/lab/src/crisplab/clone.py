"""Where this checkout is, and where it puts what it runs: two checkouts on one machine never meet."""

import hashlib
import os
import shutil
from pathlib import Path

ROOT = Path(os.path.realpath(__file__)).parents[4]

SLOWNESS = float(os.environ.get("CRISP_LAB_SLOWNESS", "1"))
"""How many times slower than usual this machine is: what tests wait for gets so much longer (an emulated machine: 8)."""


def scratch(purpose: str) -> Path:
    """The folder of this checkout's demo or node. Not inside the checkout: sockets need short paths, and the gateway no root's home."""
    tag = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:8]
    return Path(f"/var/tmp/crisp-{purpose}-{tag}")


def remove(folder: Path) -> None:
    """Removes such a folder."""
    shutil.rmtree(folder, ignore_errors=True)

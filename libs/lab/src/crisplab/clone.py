"""The paths of this checkout and of what it runs; each checkout on a machine has its own."""

import hashlib
import os
from pathlib import Path

from servicekit.linux import trees

ROOT = Path(os.path.realpath(__file__)).parents[4]

SLOWNESS = float(os.environ.get("CRISP_LAB_SLOWNESS", "1"))
"""How many times slower than usual this machine is (8 if emulated); multiplies timeouts."""


def scratch(purpose: str) -> Path:
    """Returns the folder of this checkout's demo or node.

    It is outside the checkout, since paths of sockets must be short, and the gateway cannot enter
    root's home.
    """
    tag = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:8]
    return Path(f"/var/tmp/crisp-{purpose}-{tag}")


def remove(folder: Path) -> None:
    """Removes such a folder, as far as possible."""
    trees.remove_quietly(folder)

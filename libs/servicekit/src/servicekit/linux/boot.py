"""The current boot of the machine."""

from pathlib import Path


def boot_id() -> str:
    """Returns the id of this boot (random(4), boot_id).

    Processes, mounts and namespaces made under another boot id no longer exist.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

"""Which boot of the machine this is."""

from pathlib import Path


def boot_id() -> str:
    """This boot's id: processes, mounts and namespaces that were made under another one are gone (random(4), boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

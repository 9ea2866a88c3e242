"""The kernel's files of a cgroup, on version 1 and on version 2."""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
VERSION_2 = (ROOT / "cgroup.controllers").exists()


def kernels(cgroup: str, file: str) -> str:
    """Returns the text of a file such as `memory.max`, or on version 1 `CONTROLLER/FILE`."""
    controller, _, name = file.rpartition("/")
    return Path(f"{ROOT}/{controller}{cgroup}/{name}").read_text().strip()

"""What the kernel has in the files of a cgroup, on version 1 and on version 2."""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
VERSION_2 = (ROOT / "cgroup.controllers").exists()


def kernels(cgroup: str, file: str) -> str:
    """A file's text: `memory.max`, or on version 1 `CONTROLLER/FILE`."""
    controller, _, name = file.rpartition("/")
    return Path(f"{ROOT}/{controller}{cgroup}/{name}").read_text().strip()

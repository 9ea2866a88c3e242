"""docker-compose.yml on a real dockerd (Debian's), in network and mount namespaces of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crisplab import base_image, scratch


@pytest.mark.timeout(900)
def test_the_demos_pod_runs_on_services_in_containers() -> None:
    """The pod also outlives the restart of each service's container; its conmon is not in monitor-svc's cgroup."""
    base = base_image.tarball()
    with scratch.folder("compose") as folder:
        hybrid = Path("/sys/fs/cgroup/unified/cgroup.procs").exists()
        script = f"set -e; {'umount /sys/fs/cgroup/unified; ' if hybrid else ''}mount --make-rshared /; ip link set lo up; exec \"$@\""
        inside = Path(__file__).with_name("compose_inside.py")
        command = ["unshare", "--mount", "--net", "--propagation", "slave", "sh", "-c", script, "sh", sys.executable, str(inside), str(folder), str(base)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
        assert "the pod outlived" in finished.stdout
    assert str(folder) not in Path("/proc/self/mounts").read_text()

"""docker-compose.yml on Debian's dockerd, in network and mount namespaces of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crisplab import base_image, namespaces, scratch


@pytest.mark.timeout(900)
def test_the_demos_pod_runs_on_services_in_containers() -> None:
    """The pod also outlives a restart of each service's container.

    That shows that its conmon is not in monitor-svc's cgroup.
    """
    base = base_image.tarball()
    with scratch.folder("compose") as folder:
        cgroup = f"crisp-{folder.name.rpartition('-')[2]}"
        inside = Path(__file__).with_name("compose_inside.py")
        command = namespaces.private([sys.executable, str(inside), str(folder), str(base), cgroup], network=True)
        finished = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
        assert "the pod outlived" in finished.stdout
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    assert list(Path("/sys/fs/cgroup").glob(f"*/{cgroup}")) == []

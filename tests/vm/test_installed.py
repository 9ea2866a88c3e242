"""The installed crisp in the virtual machine: units and cgroups of systemd."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crisp_proto.cri import api_pb2 as cri
from crisplab import images, registry, scratch
from crisplab.cri import Cri, container_config, pod_config

pytestmark = pytest.mark.skipif(
    not Path("/root/vm.env").exists(), reason="runs in the machine that `make test-vm` makes"
)
SLEEP = ["sleep", "600"]
UNITS = ["crisp-image", "crisp-runtime", "crisp-net", "crisp-monitor", "crisp-gateway"]


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def client() -> Iterator[Cri]:
    with Cri("/run/crisp/cri.sock") as client:
        yield client


@pytest.fixture(scope="module")
def image(client: Cri) -> Iterator[str]:
    with scratch.folder("vm") as folder, registry.running(folder / "registry") as address:
        images.busybox_image().push(address, "test/busybox", "1")
        conf = Path("/etc/containers/registries.conf.d")
        conf.mkdir(parents=True, exist_ok=True)
        name = f"{address}/test/busybox:1"
        client.pull(name)
        yield name


def test_all_units_are_up_and_the_node_is_ready(client: Cri) -> None:
    for unit in UNITS:
        assert run("systemctl", "is-active", unit).strip() == "active"
    assert client.ready()
    assert client.runtime.RuntimeConfig(cri.RuntimeConfigRequest(), timeout=60).linux.cgroup_driver == cri.SYSTEMD


def test_a_pod_is_a_slice_and_its_containers_are_scopes(client: Cri, image: str, tmp_path: Path) -> None:
    config = pod_config("slice", log_directory=tmp_path)
    config.linux.resources.memory_limit_in_bytes = 256 << 20
    with client.pod(config) as pod:
        container = client.run(pod, container_config(image, SLEEP), config)
        slices, scope = f"crisp-crisp{pod}.slice", f"crisp-{container}.scope"
        assert run("systemctl", "is-active", slices, scope, f"crisp-conmon-{container}.scope").split() == ["active"] * 3
        assert run("systemctl", "show", "--property=MemoryMax", "--value", slices).strip() == str(256 << 20)
        folder = Path("/sys/fs/cgroup/crisp.slice") / slices / scope
        # crun makes another cgroup for the container within the scope, runc does not.
        assert len([pid for file in folder.rglob("cgroup.procs") for pid in file.read_text().split()]) == 1
    assert run("systemctl", "list-units", "--all", "--plain", "--no-legend", "crisp-crisp*", "crisp-conmon*") == ""


def test_containers_outlive_a_restart_of_every_unit(client: Cri, image: str, tmp_path: Path) -> None:
    config = pod_config("restart", log_directory=tmp_path)
    with client.pod(config) as pod:
        container = client.run(pod, container_config(image, SLEEP), config)
        for unit in UNITS:
            run("systemctl", "restart", unit)
        with Cri("/run/crisp/cri.sock") as after:
            assert after.status(container).state == cri.CONTAINER_RUNNING
            assert after.exec(container, "echo", "here", timeout=60).stdout == b"here\n"

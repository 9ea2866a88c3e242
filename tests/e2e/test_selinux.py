"""SELinux labels are enforced by a kernel that has SELinux.

Errors on a kernel without it are tested in test_lsm.py and test_bad_input.py.
`make test-vm VM="--selinux --drivers systemd -- tests/e2e/test_selinux.py"` runs these tests with
Debian's policy in permissive mode. They switch to enforcing only while a container tries things,
because the policy has no rules for the test node itself.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from expect import refused, wait_for, when
from traces import get
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node
from servicekit.linux.selinux import label_of

ENFORCE = Path("/sys/fs/selinux/enforce")
pytestmark = pytest.mark.skipif(
    not ENFORCE.exists(), reason="the kernel of this machine has no SELinux (make test-vm VM=--selinux has)"
)
LEVEL = "s0:c10,c20"
LABEL = f"system_u:object_r:container_file_t:{LEVEL}"
# Tries what it can read and write once a file tells it to.
TRY = (
    f"{when('/tmp/go')} for f in /etc/passwd /etc/resolv.conf /relabelled/x /foreign/x; do cat $f >/dev/null 2>&1 && echo read $f; done;"
    " for f in /new /dev/shm/new /relabelled/new /foreign/new; do touch $f 2>/dev/null && echo wrote $f; done; echo tried; exec sleep 600"
)


@contextlib.contextmanager
def enforcing() -> Iterator[None]:
    ENFORCE.write_text("1")
    try:
        yield
    finally:
        ENFORCE.write_text("0")


def denials() -> list[str]:
    """Returns what the kernel refused to containers, or would have in enforcing mode."""
    said = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in said if "avc:" in line and "container" in line][-40:]


def test_process_and_files_have_the_pods_label(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    labels = set()
    for _ in range(2):
        config = pod_config("labels", log_directory=tmp_path)
        with cri_client.pod(config) as pod:
            container = cri_client.run(pod, container_config(world.image, ["sleep", "600"]), config)
            process = cri_client.exec(container, "cat", "/proc/self/attr/current").stdout.decode().rstrip("\0\n")
            user, role, kind, level = process.split(":", 3)
            assert (user, role, kind) == ("system_u", "system_r", "container_t")
            assert level.startswith("s0:c")
            labels.add(level)
            root = f"/proc/{get(node, 'monitor-svc', f'/v1/monitors/{container}').json()['pid']}/root"
            for file in ("/", "/bin/busybox", "/etc/resolv.conf", "/etc/hosts", "/dev/shm"):
                assert label_of(root + file) == f"system_u:object_r:container_file_t:{level}", file
    assert len(labels) == 2  # each pod has its own categories


def test_a_container_reads_and_writes_its_own_and_nothing_else(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("tries", log_directory=tmp_path)
    config.linux.security_context.selinux_options.level = LEVEL
    for name in ("relabelled", "foreign"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
        (tmp_path / name / "x").write_text("x")
    mounts = [
        cri.Mount(host_path=str(tmp_path / "relabelled"), container_path="/relabelled", selinux_relabel=True),
        cri.Mount(host_path=str(tmp_path / "foreign"), container_path="/foreign"),
    ]
    foreign = label_of(tmp_path / "foreign")
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, ["sh", "-c", TRY], mounts=mounts), config)
        assert label_of(tmp_path / "relabelled/x") == LABEL
        assert label_of(tmp_path / "foreign") == foreign
        cri_client.exec(container, "touch", "/tmp/go")
        log = tmp_path / "main.log"
        with enforcing():
            try:
                wait_for(lambda: b"tried\n" in log.read_bytes())
            finally:
                print(*denials(), sep="\n")
        lines = [line.split(b" F ", 1)[1].decode() for line in log.read_bytes().splitlines()]
        assert lines == [
            *(f"read {path}" for path in ("/etc/passwd", "/etc/resolv.conf", "/relabelled/x")),
            *(f"wrote {path}" for path in ("/new", "/dev/shm/new", "/relabelled/new")),
            "tried",
        ]


def test_a_privileged_container_is_not_confined(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("privileged", log_directory=tmp_path)
    config.linux.security_context.privileged = True
    with cri_client.pod(config) as pod:
        linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(privileged=True))
        container = cri_client.run(pod, container_config(world.image, ["sleep", "600"], linux=linux), config)
        assert b":container_t:" not in cri_client.exec(container, "cat", "/proc/self/attr/current").stdout


def test_a_label_that_the_policy_does_not_know_is_named(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("unknown", log_directory=tmp_path)
    config.linux.security_context.selinux_options.level = "nonsense"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "nonsense"):
        cri_client.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config), timeout=60)
    config.linux.security_context.selinux_options.level = ""
    with cri_client.pod(config) as pod:
        linux = cri.LinuxContainerConfig(
            security_context=cri.LinuxContainerSecurityContext(selinux_options=cri.SELinuxOption(type="no_such_t"))
        )
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "no_such_t"):
            cri_client.run(pod, container_config(world.image, ["true"], linux=linux), config)

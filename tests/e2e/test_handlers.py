"""What a node's administrator configures for containers: handlers, OCI hooks, CDI devices.

Also limits of whole pods.
"""

import json
import subprocess
from functools import partial
from pathlib import Path

import grpc
import pytest
from cgroup_files import VERSION_2, kernels
from expect import error_of
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cgroups import cgroup_folders, remove_cgroup
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node, uses_systemd

SLEEP = ["sleep", "600"]


def test_a_handler_of_ones_own_with_hooks_and_cdi_devices(own_node: Node, world: World, tmp_path: Path) -> None:
    hooks, devices, root = (own_node.root / name for name in ("hooks", "cdi", "mine"))
    for folder in (hooks, devices):
        folder.mkdir(parents=True)
    marker = own_node.root / "hooked"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"cat > {marker}"]}
    (hooks / "mark.json").write_text(
        json.dumps(
            {"version": "1.0.0", "hook": hook, "when": {"annotations": {"^mark$": "yes"}}, "stages": ["createRuntime"]}
        )
    )
    edits = {"env": ["CDI=here"], "deviceNodes": [{"path": "/dev/mine", "hostPath": "/dev/null"}]}
    (devices / "vendor.json").write_text(
        json.dumps(
            {"cdiVersion": "1.0.0", "kind": "vendor.com/dev", "devices": [{"name": "one", "containerEdits": edits}]}
        )
    )
    own_node.settings = {"runtime": {"hooks_dirs": [str(hooks)], "cdi_dirs": [str(devices)], "default_handler": "mine"}}
    own_node.environment = {
        **own_node.environment,
        "CRISP_RUNTIME_HANDLERS": f'{{mine = {{path = "/usr/bin/crun", root = "{root}", default_annotations = {{given = "yes"}}}}}}',
    }
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        assert {
            handler.name for handler in client.runtime.Status(cri.StatusRequest(), timeout=60).runtime_handlers
        } == {"", "mine"}
        config = pod_config("mine", log_directory=tmp_path)
        with client.pod(config, "mine") as pod:
            wanted = container_config(world.image, SLEEP, annotations={"mark": "yes"})
            wanted.CDI_devices.add(name="vendor.com/dev=one")
            container = client.run(pod, wanted, config)
            assert (root / container).is_dir()
            assert json.loads(marker.read_text())["id"] == container
            assert (
                client.exec(
                    container, "sh", "-c", "echo $CDI; test -c /dev/mine && echo x > /dev/mine && echo device"
                ).stdout
                == b"here\ndevice\n"
            )
            marker.unlink()
            client.run(pod, container_config(world.image, SLEEP, name="plain"), config)
            assert not marker.exists()
            (hooks / "broken.json").write_text("{")
            code, message = error_of(
                lambda: client.create(pod, container_config(world.image, SLEEP, name="not"), config)
            )
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            assert "broken.json" in message


def test_containers_keep_the_runtime_that_made_them(own_node: Node, world: World, tmp_path: Path) -> None:
    """The default handler changes, and the old one is no longer in the settings.

    It still updates, starts and removes the containers that it made.
    """
    program = own_node.root / "old-crun"
    state = own_node.run / "runtime-svc/oci/old"

    def configure(handler: str, path: Path) -> None:
        own_node.settings = {
            "runtime": {"default_handler": handler},
            f"runtime.handlers.{handler}": {"path": str(path)},
        }
        own_node.configure()

    configure("old", program)
    program.symlink_to("/usr/bin/crun")
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        config = pod_config("kept", log_directory=tmp_path)
        pod = client.run_pod(config)
        running, created, last = (
            client.create(pod, container_config(world.image, SLEEP, name=name), config)
            for name in ("running", "created", "last")
        )
        client.start(running)
        configure("new", Path("/usr/bin/crun"))
        own_node.stop_service("runtime-svc")
        own_node.start_service("runtime-svc")
        less = cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        client.update(running, less)
        client.start(created)
        for container in (running, created):
            assert client.exec(container, "true").exit_code == 0
            assert client.status(container).state == cri.CONTAINER_RUNNING
            client.remove(container)
        assert [folder.name for folder in state.iterdir()] == [last]
        program.unlink()
        code, message = error_of(lambda: client.start(last))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert str(program) in message
        client.remove(last)  # teardown needs no runtime
        assert list(state.iterdir()) == []
        client.run(pod, container_config(world.image, SLEEP, name="anew"), config)
        client.remove_pod(pod)


def block_device() -> tuple[str, str]:
    """Returns path and number of a block device of this machine that can be throttled."""
    for disk in sorted(Path("/sys/block").iterdir()):
        if not disk.name.startswith(("loop", "ram", "zram", "sr", "fd")) and int((disk / "size").read_text()):
            return f"/dev/{disk.name}", (disk / "dev").read_text().strip()
    pytest.skip("this machine has no disk of its own whose input and output could be limited")


@pytest.mark.vm
def test_block_io_classes_are_limits_of_the_kernel(own_node: Node, world: World, tmp_path: Path) -> None:
    disk, number = block_device()
    own_node.settings = {
        "runtime.blockio_classes.slow.read_bytes": {f'"{disk}"': 1 << 20},
        "runtime.blockio_classes.slow.write_operations": {f'"{disk}"': 500},
        "runtime.blockio_classes.slower.read_bytes": {f'"{disk}"': 1 << 19},
        "runtime.blockio_classes.nowhere.read_bytes": {'"/dev/none"': 1},
    }
    own_node.start()
    block_io, rdt = "blockio.resources.beta.kubernetes.io", "rdt.resources.beta.kubernetes.io"
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        for handler in ("crun", "runc"):
            annotations = {f"{block_io}/pod": "slow", f"{block_io}/container.db": "slower"}
            config = pod_config("throttled", log_directory=tmp_path, annotations=annotations)
            with client.pod(config, handler) as pod:
                for name, bytes_read, writes in (("web", 1 << 20, 500), ("db", 1 << 19, None)):
                    container = client.run(pod, container_config(world.image, SLEEP, name=name), config)
                    files = {"io.max": f"{number} rbps={bytes_read} wbps=max riops=max wiops={writes or 'max'}"}
                    if not VERSION_2:
                        files = {
                            "blkio/blkio.throttle.read_bps_device": f"{number} {bytes_read}",
                            "blkio/blkio.throttle.write_iops_device": f"{number} {writes}" if writes else "",
                        }
                    for file, expected in files.items():
                        assert (
                            client.exec(container, "cat", f"/sys/fs/cgroup/{file}").stdout.decode().strip() == expected
                        )
        for annotation, name, code, said in (
            (block_io, "fast", grpc.StatusCode.INVALID_ARGUMENT, "'fast' is not configured (runtime.blockio_classes)"),
            (block_io, "nowhere", grpc.StatusCode.FAILED_PRECONDITION, "/dev/none"),
            (
                rdt,
                "gold",
                grpc.StatusCode.FAILED_PRECONDITION,
                "/sys/fs/resctrl/gold must exist, on a processor that has RDT",
            ),
        ):
            config = pod_config("wrong", log_directory=tmp_path, annotations={f"{annotation}/pod": name})
            with client.pod(config) as pod:
                found, message = error_of(partial(client.create, pod, container_config(world.image, SLEEP), config))
            assert found == code
            assert said in message


def pod_memory(node: Node, pod: str) -> int:
    """Returns the memory limit of a pod's cgroup in bytes, as the kernel has it."""
    return int(kernels(node.names.pod_cgroup(pod), "memory.max" if VERSION_2 else "memory/memory.limit_in_bytes"))


@pytest.mark.vm
def test_a_pods_own_limits_and_their_change(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    config = pod_config("limited", log_directory=tmp_path)
    config.linux.resources.memory_limit_in_bytes = 128 << 20
    config.linux.overhead.memory_limit_in_bytes = 16 << 20
    with cri_client.pod(config) as pod:
        assert pod_memory(node, pod) == 144 << 20
        cri_client.run(pod, container_config(world.image, SLEEP), config)
        cri_client.update_pod(pod, resources=cri.LinuxContainerResources(memory_limit_in_bytes=256 << 20))
        assert pod_memory(node, pod) == 272 << 20
        cri_client.update_pod(pod, overhead=cri.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
        assert pod_memory(node, pod) == 288 << 20
        code, message = error_of(
            lambda: cri_client.update_pod(pod, resources=cri.LinuxContainerResources(memory_limit_in_bytes=-5))
        )
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "memory_limit_in_bytes" in message
        assert pod_memory(node, pod) == 288 << 20
    code, _ = error_of(lambda: cri_client.update_pod("f" * 64))
    assert code == grpc.StatusCode.NOT_FOUND


@pytest.mark.vm
@pytest.mark.skipif(uses_systemd(), reason="systemd's slices are systemd's; the parent here is a cgroup of our own")
def test_a_pod_may_be_told_of_more_processor_than_its_parent_has_yet(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    """At a resize kubelet calls crisp before it raises the limit of the pod's cgroup.

    On version 1 the kernel refuses to give a child more than its parent.
    """
    parent = f"{node.names.cgroup}/resized"
    config = pod_config("resized", log_directory=tmp_path)
    config.linux.cgroup_parent = parent
    config.linux.resources.MergeFrom(cri.LinuxContainerResources(cpu_period=100_000, cpu_quota=20_000))
    try:
        with cri_client.pod(config) as pod:
            limit_processor(parent, 20_000)
            more = cri.LinuxContainerResources(cpu_period=100_000, cpu_quota=30_000)
            cri_client.update_pod(pod, resources=more)
            limit_processor(parent, 30_000)
            linux = cri.LinuxContainerConfig(resources=more)
            container = cri_client.run(pod, container_config(world.image, SLEEP, linux=linux), config)
            assert cri_client.status(container).resources.linux.cpu_quota == 30_000
    finally:
        for folder in cgroup_folders(parent):
            remove_cgroup(folder)


@pytest.mark.vm
@pytest.mark.skipif(not uses_systemd(), reason="slices are systemd's; this node's driver is cgroupfs")
def test_a_slice_may_be_given_by_its_path(cri_client: Cri, node: Node, tmp_path: Path) -> None:
    """kubelet gives the path; other tests give the name, as crictl's manuals do."""
    prefix = node.names.cgroup_parent.removesuffix(".slice")
    config = pod_config("sliced", log_directory=tmp_path)
    config.linux.cgroup_parent = f"/{prefix}.slice/{prefix}-kubepods.slice"
    try:
        with cri_client.pod(config) as pod:
            assert (
                Path("/sys/fs/cgroup") / config.linux.cgroup_parent[1:] / f"{prefix}-kubepods-crisp{pod}.slice"
            ).is_dir()
    finally:  # the test made the parent, so the test removes it
        subprocess.run(["systemctl", "stop", f"{prefix}-kubepods.slice"], check=True)


def limit_processor(cgroup: str, quota: int) -> None:
    """Gives a cgroup `quota` of each 100,000 microseconds."""
    for folder in cgroup_folders(cgroup):
        for name, value in (("cpu.max", f"{quota} 100000"), ("cpu.cfs_quota_us", str(quota))):
            if (folder / name).exists():
                (folder / name).write_text(value)

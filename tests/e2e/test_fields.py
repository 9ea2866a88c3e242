"""Effects of fields of PodSandboxConfig and ContainerConfig that other tests do not use.

See docs/cri-fields.md.
"""

import os
import stat
import subprocess
from functools import partial
from pathlib import Path

import grpc
import pytest
from cgroup_files import ROOT, VERSION_2, kernels
from expect import NO_FOLDERS, error_of, exited, wait_for
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SLEEP = ["sleep", "600"]


def test_what_means_the_pause_container_changes_no_container(cri_client: Cri, world: World, tmp_path: Path) -> None:
    """crisp has no pause container, so its user, files and profiles apply to no container.

    None of them has to exist.
    """
    config = pod_config("paused", log_directory=tmp_path)
    security = config.linux.security_context
    security.run_as_user.value, security.run_as_group.value = 1000, 1000
    security.supplemental_groups.append(2000)
    security.supplemental_groups_policy = cri.Strict
    security.readonly_rootfs = True
    for profile in (security.seccomp, security.apparmor):
        profile.profile_type, profile.localhost_ref = cri.SecurityProfile.Localhost, "none"
    security.seccomp_profile_path = "localhost/none"
    security.namespace_options.target_id = "none"
    config.windows.security_context.run_as_username = "nobody"
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        said = cri_client.exec(
            container, "sh", "-c", "id -u; id -G; touch /writable && echo written; grep Seccomp: /proc/self/status"
        )
        assert said.stdout.decode().split() == ["0", "0", "written", "Seccomp:", "0"]


def test_sysctls_hold_in_the_pod_alone(cri_client: Cri, world: World, tmp_path: Path) -> None:
    wanted = {
        "kernel.shm_rmid_forced": "1",
        "kernel/msgmax": "9000",
        "kernel.sem": "300\t32000\t100\t128",
        "fs.mqueue.msg_max": "20",
        "kernel.domainname": "example.org",
        "net.ipv4.ip_local_port_range": "2000\t3000",
    }
    paths = [Path("/proc/sys", *name.replace("/", ".").split(".")) for name in wanted]
    before = [path.read_text() for path in paths]
    config = pod_config("tuned", log_directory=tmp_path)
    config.linux.sysctls.update(wanted)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        inside = cri_client.exec(container, "cat", *map(str, paths)).stdout.decode().splitlines()
        assert inside == list(wanted.values())
        assert [path.read_text() for path in paths] == before


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_mounts_propagate_as_asked(cri_client: Cri, node: Node, world: World, tmp_path: Path, handler: str) -> None:
    """Later mounts propagate in the directions of the mount's mode.

    A mount on the node below the source is seen in the container with rslave and rshared. A mount
    in the container is seen on the node with rshared.
    """
    source = node.root / f"propagation-{handler}"
    for name in ("later", "inside"):
        (source / name).mkdir(parents=True)
    later = str(source / "later")
    config = pod_config("spread", log_directory=tmp_path)
    config.linux.security_context.privileged = True
    wanted = container_config(world.image, SLEEP)
    wanted.linux.security_context.privileged = True
    modes = {
        "/private": cri.PROPAGATION_PRIVATE,
        "/slave": cri.PROPAGATION_HOST_TO_CONTAINER,
        "/shared": cri.PROPAGATION_BIDIRECTIONAL,
    }
    for path, mode in modes.items():
        wanted.mounts.add(host_path=str(source), container_path=path, propagation=mode)
    with cri_client.pod(config, handler) as pod:
        container = cri_client.run(pod, wanted, config)
        subprocess.run([*node.enter(), "mount", "-t", "tmpfs", "later", later], check=True)
        try:
            subprocess.run([*node.enter(), "touch", f"{later}/seen"], check=True)
            seen = [
                path for path in modes if cri_client.exec(container, "test", "-e", f"{path}/later/seen").exit_code == 0
            ]
            assert seen == ["/slave", "/shared"]
        finally:
            subprocess.run([*node.enter(), "umount", later], check=True)
        for path in ("/private", "/slave", "/shared"):
            assert cri_client.exec(container, "sh", "-c", f"mount -t tmpfs {path[1:]} {path}/inside").exit_code == 0
        mounted = subprocess.run(
            [*node.enter(), "cat", "/proc/self/mounts"], capture_output=True, text=True, check=True
        ).stdout
        assert [line.split()[0] for line in mounted.splitlines() if line.split()[1] == str(source / "inside")] == [
            "shared"
        ]
        assert cri_client.exec(container, "umount", "/shared/inside").exit_code == 0


def test_propagation_needs_a_source_that_propagates(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    """A source without propagation is refused, as is a source whose name is not UTF-8.

    The name of any other mount need not be UTF-8.
    """
    alone, strange, link = node.root / "alone", os.fsencode(node.root) + b"/strange-\xff", node.root / "link"
    link.symlink_to(os.fsdecode(strange))
    for folder in (os.fsencode(alone), strange):
        os.mkdir(folder)
        subprocess.run([*node.enter(), "mount", "-t", "tmpfs", "--make-private", "alone", folder], check=True)
    config = pod_config("alone", log_directory=tmp_path)
    try:
        with cri_client.pod(config) as pod:
            for source, mode, expected, said in (
                (alone, cri.PROPAGATION_HOST_TO_CONTAINER, grpc.StatusCode.FAILED_PRECONDITION, "mount --make-rshared"),
                (alone, cri.PROPAGATION_BIDIRECTIONAL, grpc.StatusCode.FAILED_PRECONDITION, "mount --make-rshared"),
                (link, cri.PROPAGATION_PRIVATE, grpc.StatusCode.INVALID_ARGUMENT, "no UTF-8"),
            ):
                wanted = container_config(world.image, SLEEP)
                wanted.mounts.add(
                    host_path=str(tmp_path), container_path="/fine", propagation=cri.PROPAGATION_HOST_TO_CONTAINER
                )
                wanted.mounts.add(host_path=str(source), container_path="/x", propagation=mode)
                code, message = error_of(partial(cri_client.create, pod, wanted, config))
                assert code == expected
                assert "mounts[1]" in message
                assert said in message
    finally:
        for folder in (os.fsencode(alone), strange):
            subprocess.run([*node.enter(), "umount", folder], check=True)


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_mount_options_are_the_mounts(cri_client: Cri, world: World, tmp_path: Path, handler: str) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "tool").chmod(0o755)
    config = pod_config("options", log_directory=tmp_path)
    wanted = container_config(world.image, SLEEP)
    wanted.mounts.add(host_path=str(tmp_path), container_path="/plain")
    wanted.mounts.add(host_path=str(tmp_path), container_path="/strict", mount_options=["noexec", "nosuid"])
    with cri_client.pod(config, handler) as pod:
        container = cri_client.run(pod, wanted, config)
        assert cri_client.exec(container, "sh", "-c", "/plain/tool").stdout == b"ran\n"
        assert b"ermission denied" in cri_client.exec(container, "sh", "-c", "/strict/tool").stderr
        mounts = [
            line.split() for line in cri_client.exec(container, "cat", "/proc/mounts").stdout.decode().splitlines()
        ]
        assert {"noexec", "nosuid"} <= set(
            next(options for _, target, _, options, *_ in mounts if target == "/strict").split(",")
        )


def test_devices_are_there_with_the_access_that_was_asked_for(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    folder = node.root / "devices"
    (folder / "deep").mkdir(parents=True)
    loop_control, fuse = (10, 237), (10, 229)
    for name, number in (("control", loop_control), ("deep/full", (1, 7))):
        os.mknod(folder / name, 0o666 | stat.S_IFCHR, os.makedev(*number))
    config = pod_config("devices", log_directory=tmp_path)
    wanted = container_config(world.image, SLEEP)
    wanted.devices.add(host_path=str(folder / "control"), container_path="/dev/mine", permissions="r")
    wanted.devices.add(host_path=str(folder / "deep"), container_path="/dev/many", permissions="rw")
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, wanted, config)

        def said(script: str) -> str:
            finished = cri_client.exec(container, "sh", "-c", script)
            return (finished.stdout + finished.stderr).decode()

        assert "not permitted" not in said("exec 3< /dev/mine")  # whatever the driver answers
        assert "not permitted" in said("exec 3> /dev/mine")
        assert said("find /dev/many -type c | sort").split() == ["/dev/many/full"]
        assert "No space left" in said("echo > /dev/many/full")
        assert "not permitted" in said(f"mknod /more c {fuse[0]} {fuse[1]}; exec 3< /more"), (
            "a device that was not asked for"
        )


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_limits_of_every_kind_are_the_kernels(cri_client: Cri, world: World, tmp_path: Path, handler: str) -> None:
    """The kernel's files are read inside the container, where its own cgroup is mounted."""
    config = pod_config("limited", log_directory=tmp_path)
    wanted = container_config(world.image, SLEEP)
    wanted.linux.resources.MergeFrom(
        cri.LinuxContainerResources(
            oom_score_adj=321,
            cpuset_cpus="0",
            cpuset_mems="0",
            memory_limit_in_bytes=64 << 20,
            memory_swap_limit_in_bytes=96 << 20,
        )
    )
    wanted.linux.resources.hugepage_limits.add(page_size="2MB", limit=4 << 20)
    files = {"cpuset/cpuset.cpus": "0", "cpuset/cpuset.mems": "0", "memory/memory.memsw.limit_in_bytes": str(96 << 20)}
    if Path("/sys/fs/cgroup/hugetlb").exists():
        files["hugetlb/hugetlb.2MB.limit_in_bytes"] = str(4 << 20)
    if VERSION_2:
        files = {
            "cpuset.cpus": "0",
            "cpuset.mems": "0",
            "memory.swap.max": str(32 << 20),
            "hugetlb.2MB.max": str(4 << 20),
        }
        files = {
            name: value for name, value in files.items() if not name.startswith("hugetlb") or _has_controller("hugetlb")
        }
        wanted.linux.resources.unified.update({"memory.high": str(48 << 20), "pids.max": "77"})
        files |= {"memory.high": str(48 << 20), "pids.max": "77"}
    with cri_client.pod(config, handler) as pod:
        container = cri_client.run(pod, wanted, config)
        said = cri_client.exec(
            container, "sh", "-c", "cd /sys/fs/cgroup && cat /proc/1/oom_score_adj " + " ".join(files)
        )
        assert said.stdout.decode().split() == ["321", *files.values()], said.stderr
        shown = cri_client.status(container).resources.linux
        assert (shown.oom_score_adj, shown.cpuset_cpus, shown.cpuset_mems) == (321, "0", "0")
        swap = "memory.swap.max" if VERSION_2 else "memory/memory.memsw.limit_in_bytes"
        for new, version_2, version_1 in (  # limited together, then changed one by one
            (cri.LinuxContainerResources(memory_limit_in_bytes=80 << 20), 16 << 20, 96 << 20),
            (cri.LinuxContainerResources(memory_swap_limit_in_bytes=128 << 20), 48 << 20, 128 << 20),
            (cri.LinuxContainerResources(memory_swap_limit_in_bytes=88 << 20), 8 << 20, 88 << 20),
        ):
            cri_client.update(container, new)
            assert int(cri_client.exec(container, "cat", f"/sys/fs/cgroup/{swap}").stdout) == (
                version_2 if VERSION_2 else version_1
            )
        new = cri.LinuxContainerResources(oom_score_adj=432)
        cri_client.update(container, new)
        assert cri_client.exec(container, "cat", "/proc/1/oom_score_adj").stdout == b"432\n"
        if not VERSION_2:
            wanted.metadata.name = "unified"
            wanted.linux.resources.unified["memory.high"] = "max"
            code, message = error_of(lambda: cri_client.create(pod, wanted, config))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert "linux.resources.unified needs cgroup version 2" in message


def _has_controller(name: str) -> bool:
    return name in (ROOT / "cgroup.controllers").read_text().split()


@pytest.mark.vm
def test_limits_of_every_kind_are_the_pods(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    """linux.overhead is added to linux.resources; the OOM score is the pause process's."""
    config = pod_config("whole", log_directory=tmp_path)
    config.linux.security_context.namespace_options.pid = cri.POD
    config.linux.resources.MergeFrom(
        cri.LinuxContainerResources(
            oom_score_adj=123,
            cpuset_cpus="0",
            cpuset_mems="0",
            memory_limit_in_bytes=64 << 20,
            memory_swap_limit_in_bytes=96 << 20,
        )
    )
    config.linux.resources.hugepage_limits.add(page_size="2MB", limit=4 << 20)
    config.linux.overhead.MergeFrom(cri.LinuxContainerResources(memory_limit_in_bytes=8 << 20))
    config.linux.overhead.hugepage_limits.add(page_size="2MB", limit=2 << 20)
    files = {"cpuset/cpuset.cpus": "0", "cpuset/cpuset.mems": "0", "memory/memory.memsw.limit_in_bytes": str(104 << 20)}
    if Path("/sys/fs/cgroup/hugetlb").exists():
        files["hugetlb/hugetlb.2MB.limit_in_bytes"] = str(6 << 20)
    if VERSION_2:
        files = {
            "cpuset.cpus": "0",
            "cpuset.mems": "0",
            "memory.swap.max": str(32 << 20),
            "pids.max": "88",
            "memory.high": str(60 << 20),
        }
        config.linux.resources.unified.update({"memory.high": str(60 << 20), "memory.oom.group": "1"})
        config.linux.overhead.unified["pids.max"] = "88"
        files |= {"memory.oom.group": "0"} | ({"hugetlb.2MB.max": str(6 << 20)} if _has_controller("hugetlb") else {})
    with cri_client.pod(config) as pod:
        linux = cri.LinuxContainerConfig()
        linux.security_context.namespace_options.pid = cri.POD
        container = cri_client.run(pod, container_config(world.image, SLEEP, linux=linux), config)
        cgroup = node.names.pod_cgroup(pod)
        assert {file: kernels(cgroup, file) for file in files} == files
        allowed = cri_client.exec(container, "grep", "Cpus_allowed_list", "/proc/self/status").stdout
        assert allowed.split() == [b"Cpus_allowed_list:", b"0"], "a container is within its pod"
        assert cri_client.exec(container, "cat", "/proc/1/oom_score_adj").stdout == b"123\n", (
            "process 1 is the pause process"
        )
        more = cri.LinuxContainerResources(
            oom_score_adj=456, memory_limit_in_bytes=128 << 20, memory_swap_limit_in_bytes=256 << 20
        )
        cri_client.update_pod(pod, resources=more)
        files = (
            {"memory.swap.max": str(128 << 20)} if VERSION_2 else {"memory/memory.memsw.limit_in_bytes": str(264 << 20)}
        )
        assert {file: kernels(cgroup, file) for file in files} == files
        assert cri_client.exec(container, "cat", "/proc/1/oom_score_adj").stdout == b"456\n"
        less = cri.LinuxContainerResources(memory_limit_in_bytes=16 << 20)  # fields that are not given stay
        cri_client.update_pod(pod, overhead=less)
        files = {"memory.max": str(144 << 20)} if VERSION_2 else {"memory/memory.limit_in_bytes": str(144 << 20)}
        assert {file: kernels(cgroup, file) for file in files} == files


def test_what_is_said_is_told_again(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("told", log_directory=tmp_path, annotations={"pod": "yes"})
    config.metadata.attempt = 3
    wanted = container_config("", SLEEP, annotations={"container": "yes"})
    wanted.metadata.attempt = 4
    wanted.image.image_ref = world.busybox.id
    wanted.image.user_specified_image = world.image
    wanted.image.runtime_handler = "none"
    wanted.image.annotations["why"] = "told"
    wanted.windows.security_context.run_as_username = "nobody"
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, wanted, config)
        of_pod, status = cri_client.pod_status(pod), cri_client.status(container)
        assert (of_pod.metadata, dict(of_pod.annotations)) == (config.metadata, {"pod": "yes"})
        assert (status.metadata, dict(status.annotations)) == (wanted.metadata, {"container": "yes"})
        assert (status.image.image, dict(status.image.annotations), status.image_ref) == (
            world.image,
            {"why": "told"},
            world.busybox.id,
        )
        assert cri_client.pods(id=pod)[0].metadata == config.metadata
        assert cri_client.containers(id=container)[0].metadata == wanted.metadata


def test_the_requests_stop_signal_comes_before_the_images(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("signal", log_directory=tmp_path)
    script = "trap 'exit 10' TERM; trap 'exit 11' USR1; touch /ready; while :; do sleep 0.05; done"
    with cri_client.pod(config) as pod:
        for signal, code in ((cri.SIGNAL_RUNTIME_DEFAULT, 10), (cri.SIGNAL_SIGUSR1, 11)):
            wanted = container_config(world.image, ["sh", "-c", script], name=f"signal{signal}", stop_signal=signal)
            container = cri_client.run(pod, wanted, config)
            wait_for(lambda name=container: cri_client.exec(name, "test", "-e", "/ready").exit_code == 0)  # type: ignore[misc]
            assert cri_client.status(container).stop_signal == (signal or cri.SIGNAL_SIGTERM)
            cri_client.stop(container, timeout=20)
            assert wait_for(partial(exited, cri_client, container)).exit_code == code


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_a_localhost_seccomp_profile_is_enforced(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, handler: str
) -> None:
    """The profile is given by the current field and by the deprecated one."""
    profile = node.root / "no-folders.json"
    profile.write_text(NO_FOLDERS)
    today = cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref=str(profile))
    config = pod_config("profile", log_directory=tmp_path)
    with cri_client.pod(config, handler) as pod:
        for name, fields in (("today", {"seccomp": today}), ("old", {"seccomp_profile_path": f"localhost/{profile}"})):
            wanted = container_config(world.image, SLEEP, name=name)
            wanted.linux.security_context.MergeFrom(cri.LinuxContainerSecurityContext(**fields))
            container = cri_client.run(pod, wanted, config)
            said = cri_client.exec(container, "sh", "-c", "mkdir /x; touch /y && echo file")
            assert b"not supported" in said.stderr
            assert said.stdout == b"file\n"

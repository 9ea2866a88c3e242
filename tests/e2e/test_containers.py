"""Effects of a container's configuration, seen inside the container and in the kernel's files."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cgroup_files import VERSION_2, kernels
from expect import code_of, error_of, exited, log_lines, output_of, wait_for
from traces import traces
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SLEEP = ["sleep", "600"]


def run_once(client: Cri, world: World, logs: Path, command: list[str], **more: Any) -> tuple[int, str]:
    """Runs a command in a pod of its own and returns its exit code and standard output."""
    config = pod_config("once", log_directory=logs)
    with client.pod(config) as pod:
        container = client.run(pod, container_config(world.image, command, **more), config)
        status = wait_for(partial(exited, client, container))
        text = output_of(logs / "main.log")
    return status.exit_code, text


DEFAULT_SECCOMP = cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault)


def security(**fields: Any) -> cri.LinuxContainerConfig:
    """Returns a Linux configuration with this security context."""
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**fields))


def test_command_args_env_and_cwd(cri_client: Cri, world: World, tmp_path: Path) -> None:
    envs = [cri.KeyValue(key="ASKED", value=b"a b"), cri.KeyValue(key="FROM_IMAGE", value=b"no")]
    code, text = run_once(
        cri_client,
        world,
        tmp_path,
        ["sh"],
        args=["-c", "pwd; echo $ASKED $FROM_IMAGE $HOME $HOSTNAME; exit 7"],
        envs=envs,
        working_dir="/var/run",
    )
    assert code == 7
    assert text.splitlines() == ["/var/run", "a b no /root once"]


def test_user_and_groups(cri_client: Cri, world: World, tmp_path: Path) -> None:
    linux = security(
        run_as_user=cri.Int64Value(value=33), run_as_group=cri.Int64Value(value=100), supplemental_groups=[1234]
    )
    code, text = run_once(cri_client, world, tmp_path, ["id"], linux=linux)
    assert (code, text) == (0, "uid=33(www-data) gid=100(users) groups=100(users),1234")
    code, text = run_once(cri_client, world, tmp_path / "2", ["id", "-un"], linux=security(run_as_username="nobody"))
    assert (code, text) == (0, "nobody")


def test_capabilities_seccomp_and_no_new_privs(cri_client: Cri, world: World, tmp_path: Path) -> None:
    shown = ["sh", "-c", "grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status | tr -d '\\t'"]
    _, text = run_once(cri_client, world, tmp_path / "1", shown, linux=security(seccomp=DEFAULT_SECCOMP))
    assert text.splitlines() == ["CapEff:00000000a80425fb", "NoNewPrivs:0", "Seccomp:2"]
    linux = security(
        capabilities=cri.Capability(drop_capabilities=["ALL"], add_capabilities=["NET_RAW"]),
        no_new_privs=True,
        seccomp=DEFAULT_SECCOMP,
    )
    _, text = run_once(cri_client, world, tmp_path / "2", shown, linux=linux)
    assert text.splitlines() == ["CapEff:0000000000002000", "NoNewPrivs:1", "Seccomp:2"]
    linux = security(seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.Unconfined))
    _, text = run_once(cri_client, world, tmp_path / "3", shown, linux=linux)
    assert text.splitlines()[-1] == "Seccomp:0"


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_the_default_seccomp_profile_forbids_and_allows(
    cri_client: Cri, world: World, tmp_path: Path, handler: str
) -> None:
    config = pod_config("seccomp", log_directory=tmp_path)
    with cri_client.pod(config, handler) as pod:
        unconfined = cri.SecurityProfile(profile_type=cri.SecurityProfile.Unconfined)
        container, free = (
            cri_client.run(pod, container_config(world.image, SLEEP, name, linux=security(seccomp=profile)), config)
            for name, profile in (("default", DEFAULT_SECCOMP), ("free", unconfined))
        )
        # A new user namespace needs no capability, so that only the profile can forbid it.
        assert cri_client.exec(free, "unshare", "-U", "true").exit_code == 0
        assert cri_client.exec(container, "unshare", "-U", "true").exit_code != 0
        assert cri_client.exec(container, "unshare", "-n", "true").exit_code != 0
        assert cri_client.exec(container, "sh", "-c", "echo fine | cat").stdout == b"fine\n"
        assert b"Seccomp:\t2" in cri_client.exec(container, "cat", "/proc/self/status").stdout


def test_masked_and_readonly_paths_and_a_readonly_root(cri_client: Cri, world: World, tmp_path: Path) -> None:
    script = "cat /proc/timer_list | wc -c; cat /etc/passwd | wc -c; echo x > /proc/sys/kernel/hostname || echo refused; touch /x || echo readonly"
    assert Path("/proc/timer_list").read_text(), "this machine's own file is empty, so the test would show nothing"
    # kubelet sends these for procMount: Default, and empty lists for procMount: Unmasked.
    linux = security(readonly_rootfs=True, masked_paths=["/proc/timer_list"], readonly_paths=["/proc/sys"])
    code, text = run_once(cri_client, world, tmp_path / "default", ["sh", "-c", script], linux=linux)
    assert (code, text.splitlines()[0], text.splitlines()[2:]) == (0, "0", ["refused", "readonly"])
    linux = security(masked_paths=["/etc/passwd"], readonly_paths=["/var"])
    code, text = run_once(
        cri_client,
        world,
        tmp_path / "own",
        ["sh", "-c", "cat /etc/passwd | wc -c; touch /var/x || echo refused"],
        linux=linux,
    )
    assert (code, text.splitlines()) == (0, ["0", "refused"])


def test_a_privileged_container_needs_a_privileged_pod_and_sees_devices(
    cri_client: Cri, world: World, tmp_path: Path
) -> None:
    plain = pod_config("plain", log_directory=tmp_path)
    with cri_client.pod(plain) as pod:
        code, message = error_of(
            lambda: cri_client.create(pod, container_config(world.image, SLEEP, linux=security(privileged=True)), plain)
        )
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "privileged" in message
    sandbox = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    config = pod_config("mighty", log_directory=tmp_path, linux=sandbox)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP, linux=security(privileged=True)), config)
        status = cri_client.exec(container, "cat", "/proc/self/status").stdout
        assert b"Seccomp:\t0" in status
        assert (
            cri_client.exec(
                container, "sh", "-c", "echo x > /sys/kernel/uevent_seqnum 2>&1; mount -t tmpfs none /home"
            ).exit_code
            == 0
        )


@pytest.mark.vm
def test_limits_are_in_the_kernel_and_can_be_changed(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    resources = cri.LinuxContainerResources(
        cpu_shares=512, cpu_quota=50_000, cpu_period=100_000, memory_limit_in_bytes=64 << 20
    )
    config = pod_config("limits", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(
            pod, container_config(world.image, SLEEP, linux=cri.LinuxContainerConfig(resources=resources)), config
        )
        assert limits(node, pod, container) == (kept(512), 50_000, 64 << 20)
        new = cri.LinuxContainerResources(cpu_shares=1024, memory_limit_in_bytes=128 << 20)
        cri_client.update(container, new)
        assert limits(node, pod, container) == (kept(1024), 50_000, 128 << 20)
        shown = cri_client.status(container).resources.linux
        assert (shown.cpu_shares, shown.cpu_quota, shown.memory_limit_in_bytes) == (1024, 50_000, 128 << 20)
        no_quota = cri.LinuxContainerResources(cpu_quota=-1)
        cri_client.update(container, no_quota)
        assert limits(node, pod, container) == (kept(1024), -1, 128 << 20)


def kept(shares: int) -> int:
    """Returns the shares that remain when OCI runtimes convert them to version 2's weight."""
    if not VERSION_2:
        return shares
    return round(2 + (shares - 2) * 9999 // 262142 * 262142 / 9999)


def limits(node: Node, pod: str, container: str) -> tuple[int, int, int]:
    """Returns CPU shares, quota in µs and memory in bytes as the kernel has them.

    The weight of version 2 is converted back into shares.
    """
    cgroup = node.names.container_cgroup(pod, container)
    if VERSION_2:
        quota = int(kernels(cgroup, "cpu.max").split()[0].replace("max", "-1"))
        return (
            round(2 + (int(kernels(cgroup, "cpu.weight")) - 1) * 262142 / 9999),
            quota,
            int(kernels(cgroup, "memory.max")),
        )
    shares, quota, memory = (
        int(kernels(cgroup, file))
        for file in ("cpu/cpu.shares", "cpu/cpu.cfs_quota_us", "memory/memory.limit_in_bytes")
    )
    return shares, quota, memory


EAT = "dd if=/dev/zero of=/dev/null bs=200M count=1"
LITTLE_MEMORY = cri.LinuxContainerResources(memory_limit_in_bytes=24 << 20, memory_swap_limit_in_bytes=24 << 20)


@pytest.mark.parametrize("limited", ["container", "pod"])
def test_running_out_of_memory_is_reported(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, limited: str
) -> None:
    config, linux = pod_config("hungry", log_directory=tmp_path), cri.LinuxContainerConfig()
    (linux if limited == "container" else config.linux).resources.MergeFrom(LITTLE_MEMORY)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, ["sh", "-c", EAT], linux=linux), config)
        status = wait_for(partial(exited, cri_client, container))
        assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert not Path(
        f"/proc/{node.service_pid('monitor-svc')}/cwd/oom"
    ).exists()  # conmon makes this file in its working directory


def test_running_out_of_memory_is_reported_though_conmon_missed_it(
    own_node: Node, world: World, tmp_path: Path
) -> None:
    """conmon misses an OOM kill when systemd has removed the cgroup before it looks.

    The conmon of this test writes its report into a folder that nobody reads.
    """
    monitor, elsewhere = tmp_path / "conmon", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monitor.write_text(f'#!/bin/bash\ncd {elsewhere}; exec conmon "$@" --persist-dir {elsewhere}\n')
    monitor.chmod(0o755)
    own_node.settings = {"runtime": {"default_handler": "mine"}}
    own_node.environment = {
        **own_node.environment,
        "CRISP_RUNTIME_HANDLERS": f'{{mine = {{path = "/usr/bin/crun", monitor = "{monitor}"}}}}',
    }
    own_node.start()
    config, linux = pod_config("hungry", log_directory=tmp_path), cri.LinuxContainerConfig(resources=LITTLE_MEMORY)
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        with client.pod(config) as pod:
            for name, script, reason in (("hungry", EAT, "OOMKilled"), ("killed", "exit 137", "Error")):
                container = client.run(
                    pod, container_config(world.image, ["sh", "-c", script], name, linux=linux), config
                )
                status = wait_for(partial(exited, client, container))
                assert (status.exit_code, status.reason) == (137, reason)
    assert (elsewhere / "exit").exists()  # conmon ran; whether it saw the cgroup is chance


@pytest.mark.vm
def test_mounts(cri_client: Cri, world: World, tmp_path: Path) -> None:
    host = tmp_path / "data"
    host.mkdir()
    (host / "file").write_text("from the host")
    mounts = [
        cri.Mount(container_path="/data", host_path=str(host)),
        cri.Mount(container_path="/fixed", host_path=str(host), readonly=True),
        cri.Mount(container_path="/made", host_path=str(tmp_path / "not/there/yet")),
        cri.Mount(container_path="/etc/hosts", host_path=str(host / "file"), readonly=True),
    ]
    script = (
        "cat /data/file; echo; echo new > /data/new; echo x > /fixed/x || echo readonly; ls -d /made; cat /etc/hosts"
    )
    code, text = run_once(cri_client, world, tmp_path / "logs", ["sh", "-c", script], mounts=mounts)
    assert (code, text.splitlines()) == (0, ["from the host", "readonly", "/made", "from the host"])
    assert (host / "new").read_text() == "new\n"
    assert (tmp_path / "not/there/yet").is_dir()


def test_a_link_in_the_image_does_not_lead_a_mount_out_of_it(cri_client: Cri, world: World, tmp_path: Path) -> None:
    layer = images.busybox_layer()
    layer.symlink("/escape", "/../../../../../../etc")
    images.build([layer.finish()], {"Cmd": ["sh"]}).push(world.registry, "test/escape", "1")
    reference = f"{world.registry}/test/escape:1"
    cri_client.pull(reference)
    (tmp_path / "in").mkdir()
    config = pod_config("escape", log_directory=tmp_path)
    mount = cri.Mount(container_path="/escape/crisp-escape", host_path=str(tmp_path / "in"))
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(reference, SLEEP, mounts=[mount]), config)
        assert cri_client.exec(container, "ls", "-d", "/etc/crisp-escape").exit_code == 0
        assert not Path("/etc/crisp-escape").exists()
    cri_client.remove_image(reference)


def test_dns_and_hostname(cri_client: Cri, world: World, tmp_path: Path) -> None:
    dns = cri.DNSConfig(servers=["10.9.8.7"], searches=["a.example", "b.example"], options=["ndots:3"])
    config = pod_config("named", log_directory=tmp_path, dns_config=dns)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        text = cri_client.exec(container, "cat", "/etc/resolv.conf").stdout.decode()
        assert text.splitlines() == ["nameserver 10.9.8.7", "search a.example b.example", "options ndots:3"]
        assert cri_client.exec(container, "hostname").stdout == b"named\n"
        hosts = cri_client.exec(container, "cat", "/etc/hosts").stdout.decode()
        assert f"{cri_client.pod_status(pod).network.ip}\tnamed" in hosts


def test_exec_past_its_timeout_is_killed_with_its_children(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("slow", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        begun = time.monotonic()
        assert (
            code_of(lambda: cri_client.exec(container, "sh", "-c", "sleep 123 & sleep 321", timeout=1))
            == grpc.StatusCode.DEADLINE_EXCEEDED
        )
        assert time.monotonic() - begun < 8
        wait_for(lambda: not {b"sleep 123", b"sleep 321"} & commands(cri_client, container))


def commands(client: Cri, container: str) -> set[bytes]:
    """Returns the command lines of all processes in a container."""
    found = set(client.exec(container, "ps", "-o", "args").stdout.splitlines())
    assert b"sleep 600" in found, "ps itself failed"
    return found


def test_exec_runs_as_the_containers_user_in_its_folder_with_its_variables(
    cri_client: Cri, world: World, tmp_path: Path
) -> None:
    linux = security(run_as_user=cri.Int64Value(value=33), supplemental_groups=[1234])
    container = container_config(
        world.image, SLEEP, linux=linux, working_dir="/var", envs=[cri.KeyValue(key="K", value=b"v")]
    )
    config = pod_config("execs", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        output = cri_client.exec(
            cri_client.run(pod, container, config), "sh", "-c", "id -u; id -G; pwd; echo $K"
        ).stdout.decode()
    assert output.splitlines() == ["33", "33 1234", "/var", "v"]


def test_exec_needs_a_running_container_and_a_program(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("exec", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        code, message = error_of(lambda: cri_client.exec(container, "/no/such/program"))
        assert code == grpc.StatusCode.UNKNOWN
        assert "/no/such/program" in message
        cri_client.stop(container)
        assert code_of(lambda: cri_client.exec(container, "true")) == grpc.StatusCode.FAILED_PRECONDITION
        assert code_of(lambda: cri_client.exec("0" * 64, "true")) == grpc.StatusCode.NOT_FOUND


def test_stop_sends_the_signal_first_and_kills_after_the_grace_time(
    cri_client: Cri, world: World, tmp_path: Path
) -> None:
    config = pod_config("stop", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        polite = cri_client.run(
            pod,
            container_config(
                world.image, ["sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done"], name="polite"
            ),
            config,
        )
        deaf = cri_client.run(
            pod,
            container_config(
                world.image, ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"], name="deaf"
            ),
            config,
        )
        for name in ("polite", "deaf"):
            wait_for(partial(log_lines, tmp_path / f"{name}.log"))
        cri_client.stop(polite, timeout=20)
        assert cri_client.status(polite).exit_code == 5
        begun = time.monotonic()
        cri_client.stop(deaf, timeout=1)
        assert 0.9 < time.monotonic() - begun < 8
        assert cri_client.status(deaf).exit_code == 137


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_a_program_that_is_not_there_fails_the_create_and_leaves_nothing(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, handler: str
) -> None:
    config = pod_config("absent", log_directory=tmp_path)
    with cri_client.pod(config, handler) as pod:
        before = traces(node)
        code, message = error_of(
            lambda: cri_client.create(pod, container_config(world.image, ["/no/such/program"]), config)
        )
        assert code == grpc.StatusCode.UNKNOWN
        assert "/no/such/program" in message
        assert cri_client.containers() == []
        assert traces(node) == before


def test_a_container_starts_only_once(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("once", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        assert code_of(lambda: cri_client.start(container)) == grpc.StatusCode.FAILED_PRECONDITION


def processor_time(node: Node, pod: str, container: str) -> int:
    """Returns the kernel's count of a container's processor time in nanoseconds."""
    cgroup = node.names.container_cgroup(pod, container)
    if not VERSION_2:
        return int(kernels(cgroup, "cpuacct/cpuacct.usage"))
    usage = next(line for line in kernels(cgroup, "cpu.stat").splitlines() if line.startswith("usage_usec"))
    return int(usage.split()[1]) * 1000


def test_statistics_agree_with_the_kernel(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    config = pod_config("stats", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        script = "dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo done; sleep 600"
        container = cri_client.run(pod, container_config(world.image, ["sh", "-c", script]), config)
        wait_for(lambda: log_lines(tmp_path / "main.log"))
        before = processor_time(node, pod, container)
        stats = cri_client.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=container), timeout=20).stats
        assert stats.cpu.usage_core_nano_seconds.value > 10_000_000
        assert before <= stats.cpu.usage_core_nano_seconds.value <= processor_time(node, pod, container)
        assert 0 < stats.memory.working_set_bytes.value < 64 << 20
        assert stats.writable_layer.used_bytes.value >= 3 << 20
        listed = cri_client.runtime.ListContainerStats(cri.ListContainerStatsRequest(), timeout=20).stats
        assert container in {entry.attributes.id for entry in listed}
        whole = cri_client.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod), timeout=20).stats
        assert whole.linux.process.process_count.value >= 2
        assert whole.linux.network.default_interface.name == "eth0"
        assert whole.linux.cpu.usage_core_nano_seconds.value >= stats.cpu.usage_core_nano_seconds.value
        assert [entry.attributes.id for entry in whole.linux.containers] == [container]
        usage = cri_client.image.ImageFsInfo(cri.ImageFsInfoRequest(), timeout=20)
        assert usage.image_filesystems[0].used_bytes.value > 100_000
        assert usage.image_filesystems[0].fs_id.mountpoint.startswith(str(node.root))

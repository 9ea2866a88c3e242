"""Namespaces of pods and containers, seen in the node's /proc and from inside."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from expect import error_of, wait_for
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SLEEP = ["sleep", "600"]
FIRST_ID, IDS = 1 << 20, 65536
KINDS = ("net", "ipc", "uts", "pid", "user", "mnt")


def namespaces(client: Cri, container: str) -> dict[str, str]:
    """Returns the namespaces of a container's process as the kernel names them."""
    pid = process_of(client, container)
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in KINDS}


def process_of(client: Cri, container: str) -> int:
    """Returns the PID of a container's first process."""
    response = client.runtime.ContainerStatus(
        cri.ContainerStatusRequest(container_id=container, verbose=True), timeout=20
    )
    return int(json.loads(response.info["info"])["pid"])


def options(**modes: Any) -> cri.NamespaceOption:
    return cri.NamespaceOption(**{"network": cri.POD, "pid": cri.CONTAINER, "ipc": cri.POD, **modes})


def linux(choice: cri.NamespaceOption) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=choice))


def pod_linux(choice: cri.NamespaceOption) -> cri.LinuxPodSandboxConfig:
    return cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=choice))


def own_users(mode: "cri.NamespaceMode.ValueType" = cri.POD, **more: object) -> cri.NamespaceOption:
    mapping = cri.IDMapping(host_id=FIRST_ID, container_id=0, length=IDS)
    choice = options()
    choice.userns_options.CopyFrom(cri.UserNamespace(mode=mode, uids=[mapping], gids=[mapping]))
    for name, value in more.items():
        setattr(choice, name, value)
    return choice


def test_each_mode_gives_the_namespace_it_names(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("modes", log_directory=tmp_path, linux=pod_linux(options(pid=cri.POD)))
    host = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}
    with cri_client.pod(config) as pod:
        shared = [
            namespaces(
                cri_client,
                cri_client.run(
                    pod, container_config(world.image, SLEEP, name=name, linux=linux(options(pid=cri.POD))), config
                ),
            )
            for name in ("one", "two")
        ]
        own = namespaces(
            cri_client,
            cri_client.run(
                pod, container_config(world.image, SLEEP, name="own", linux=linux(options(ipc=cri.CONTAINER))), config
            ),
        )
        node = namespaces(
            cri_client,
            cri_client.run(
                pod,
                container_config(world.image, SLEEP, name="node", linux=linux(options(pid=cri.NODE, ipc=cri.NODE))),
                config,
            ),
        )
    for kind in ("net", "ipc", "uts", "pid"):
        assert shared[0][kind] == shared[1][kind] != host[kind]
    assert own["net"] == shared[0]["net"]
    assert own["ipc"] not in (shared[0]["ipc"], host["ipc"])
    assert own["pid"] not in (shared[0]["pid"], host["pid"])
    assert (node["pid"], node["ipc"], node["net"]) == (host["pid"], host["ipc"], shared[0]["net"])
    assert {found["user"] for found in (*shared, own, node)} == {host["user"]}


def test_a_container_may_be_in_anothers_pid_namespace(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("target", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        target = cri_client.run(pod, container_config(world.image, name="web"), config)
        debug = cri_client.run(
            pod,
            container_config(world.image, SLEEP, name="debug", linux=linux(options(pid=cri.TARGET, target_id=target))),
            config,
        )
        assert namespaces(cri_client, debug)["pid"] == namespaces(cri_client, target)["pid"]
        assert b"httpd" in cri_client.exec(debug, "ps").stdout
        status = cri_client.status(target)
        cri_client.remove(debug)
        assert cri_client.status(target) == status


def test_a_target_must_run_in_the_same_pod(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config, other_config = (
        pod_config("one", log_directory=tmp_path / "1"),
        pod_config("two", log_directory=tmp_path / "2"),
    )
    with cri_client.pod(config) as pod, cri_client.pod(other_config) as other_pod:
        other = cri_client.run(other_pod, container_config(world.image, SLEEP), other_config)
        created = cri_client.create(pod, container_config(world.image, SLEEP, name="created"), config)

        def refused(target: str) -> tuple[grpc.StatusCode, str]:
            wanted = container_config(
                world.image, SLEEP, name="debug", linux=linux(options(pid=cri.TARGET, target_id=target))
            )
            return error_of(lambda: cri_client.create(pod, wanted, config))

        assert refused(other)[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert "target_id" in refused(other)[1]
        assert refused(created)[0] == grpc.StatusCode.FAILED_PRECONDITION
        assert refused("f" * 64)[0] == grpc.StatusCode.NOT_FOUND
        assert refused("")[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_zombies_of_a_shared_pid_namespace_are_reaped(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("zombies", log_directory=tmp_path, linux=pod_linux(options(pid=cri.POD)))
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP, linux=linux(options(pid=cri.POD))), config)
        cri_client.exec(container, "sh", "-c", "(sleep 0.1 & ) ; true")

        def processes() -> bytes:
            found = cri_client.exec(container, "ps").stdout
            assert b"sleep 600" in found, "ps itself failed"
            return found

        wait_for(lambda: b"[sleep]" not in (found := processes()) and b"sleep 0.1" not in found)


def test_a_pod_with_a_user_namespace(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    """Root inside is an unprivileged user outside, and the node sees the mapped ids.

    Image, volumes, network, sysctls and writes work.
    """
    volume = tmp_path / "volume"
    volume.mkdir()
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(0o755)
    (volume / "file").write_text("text")
    os.chown(volume / "file", 33, 33)
    config = pod_config("users", log_directory=tmp_path, linux=pod_linux(own_users()))
    config.linux.sysctls.update({"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80"})
    with cri_client.pod(config) as pod:
        mapping = cri.IDMapping(host_id=FIRST_ID, container_id=0, length=IDS)
        container = container_config(world.image, linux=linux(own_users()))
        container.mounts.add(
            host_path=str(volume), container_path="/volume", uidMappings=[mapping], gidMappings=[mapping]
        )
        web = cri_client.run(pod, container, config)
        pid = process_of(cri_client, web)
        assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", str(FIRST_ID), str(IDS)]
        assert os.stat(f"/proc/{pid}").st_uid == FIRST_ID

        def run(*command: str) -> str:
            result = cri_client.exec(web, *command)
            assert result.exit_code == 0, result.stderr
            return result.stdout.decode()

        assert run("id", "-u").strip() == "0"
        assert run("stat", "-c", "%u", "/bin/busybox").strip() == "0"
        assert run("stat", "-c", "%u", "/volume/file").strip() == "33"
        assert run("sh", "-c", "echo x > /volume/new; echo y > /written; stat -c %u /written").strip() == "0"
        assert (volume / "new").stat().st_uid == 0
        assert (node.root / f"state/image-svc/containers/{web}/upper/written").stat().st_uid == FIRST_ID
        assert run("cat", "/proc/sys/kernel/shm_rmid_forced").strip() == "1"
        assert run("cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start").strip() == "80"
        assert run("hostname").strip() == "users"
        assert "hello" in run("wget", "-q", "-O", "-", f"http://{cri_client.pod_status(pod).network.ip}/")
        status = cri_client.pod_status(pod).linux.namespaces.options.userns_options
        assert (status.mode, status.uids[0].host_id) == (cri.POD, FIRST_ID)


def test_a_shared_pid_namespace_in_a_user_namespace(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("both", log_directory=tmp_path, linux=pod_linux(own_users(pid=cri.POD)))
    with cri_client.pod(config) as pod:
        container = cri_client.run(
            pod, container_config(world.image, SLEEP, linux=linux(own_users(pid=cri.POD))), config
        )
        processes = cri_client.exec(container, "ps").stdout
        assert b"catatonit" in processes
        assert b"sleep" in processes


USER_CASES = {
    "mode TARGET": own_users(cri.TARGET),
    "mode CONTAINER": own_users(cri.CONTAINER),
    "mode NODE with mappings": own_users(cri.NODE),
}


@pytest.mark.parametrize("case", USER_CASES)
def test_an_invalid_user_namespace_is_refused(cri_client: Cri, case: str) -> None:
    code, message = error_of(lambda: cri_client.run_pod(pod_config("bad", linux=pod_linux(USER_CASES[case]))))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "userns_options" in message


def test_a_handler_without_idmapped_mounts_says_so(cri_client: Cri) -> None:
    features = {
        handler.name: handler.features
        for handler in cri_client.runtime.Status(cri.StatusRequest(), timeout=60).runtime_handlers
    }
    assert features["crun"].user_namespaces
    assert features["crun"].recursive_read_only_mounts
    assert features["runc"].recursive_read_only_mounts
    if features["runc"].user_namespaces:
        pytest.skip("this machine's runc has idmapped mounts (1.2 and later)")
    code, message = error_of(lambda: cri_client.run_pod(pod_config("runc", linux=pod_linux(own_users())), "runc"))
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert "idmapped mounts" in message


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_an_image_as_a_volume(cri_client: Cri, world: World, tmp_path: Path, handler: str) -> None:
    layer = images.Layer()
    layer.folder("/data")
    layer.file("/data/model", "weights")
    layer.file("/data/tool", "#!/bin/sh\necho ran\n", 0o755)
    layer.symlink("/away", "/../../etc")
    images.build([layer.finish()], {}).push(world.registry, "test/volume", "1")
    name = f"{world.registry}/test/volume:1"
    image_id = cri_client.pull(name)
    config = pod_config("volume", log_directory=tmp_path)
    with cri_client.pod(config, handler) as pod:
        wanted = container_config(world.image, SLEEP)
        wanted.mounts.add(container_path="/whole", image=cri.ImageSpec(image=name), readonly=True)
        part = wanted.mounts.add(container_path="/part", image=cri.ImageSpec(image=image_id), image_sub_path="data")
        part.readonly = True
        container = cri_client.run(pod, wanted, config)
        assert cri_client.exec(container, "cat", "/whole/data/model").stdout == b"weights"
        assert cri_client.exec(container, "cat", "/part/model").stdout == b"weights"
        assert b"Read-only" in cri_client.exec(container, "touch", "/part/x").stderr
        assert cri_client.exec(container, "/part/tool").stdout == b"ran\n"
        cri_client.remove_image(name)
        assert cri_client.exec(container, "cat", "/part/model").stdout == b"weights"
        assert {mount.image.image for mount in cri_client.status(container).mounts} == {name, image_id}

        bad = container_config(world.image, SLEEP, name="bad")
        bad.mounts.add(container_path="/x", image=cri.ImageSpec(image="no/such:image"), readonly=True)
        assert error_of(lambda: cri_client.create(pod, bad, config))[0] == grpc.StatusCode.NOT_FOUND
        cri_client.pull(name)
        bad.mounts[0].image.image = name
        bad.mounts[0].image_sub_path = "away/passwd"
        code, message = error_of(lambda: cri_client.create(pod, bad, config))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "image_sub_path" in message
    cri_client.remove_image(name)


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_recursive_read_only_covers_mounts_below(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, handler: str
) -> None:
    source = node.root / f"rro-{handler}"
    (source / "sub").mkdir(parents=True)
    subprocess.run([*node.enter(), "mount", "-t", "tmpfs", "rro", str(source / "sub")], check=True)
    config = pod_config("rro", log_directory=tmp_path)
    try:
        with cri_client.pod(config, handler) as pod:
            wanted = container_config(world.image, SLEEP)
            wanted.mounts.add(host_path=str(source), container_path="/all", readonly=True, recursive_read_only=True)
            wanted.mounts.add(host_path=str(source), container_path="/top", readonly=True)
            container = cri_client.run(pod, wanted, config)
            assert cri_client.exec(container, "touch", "/all/sub/x").exit_code == 1
            assert cri_client.exec(container, "touch", "/top/x").exit_code == 1
            assert cri_client.exec(container, "touch", "/top/sub/x").exit_code == 0
    finally:
        subprocess.run([*node.enter(), "umount", str(source / "sub")], check=True)


def test_a_repeated_create_with_a_wrong_volume_leaves_the_running_container_its_files(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    config = pod_config("again", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        wanted = container_config(world.image, SLEEP)
        image = cri.ImageSpec(image=world.image)
        wanted.mounts.add(container_path="/x", image=image, image_sub_path="www", readonly=True)
        container = cri_client.run(pod, wanted, config)
        cri_client.exec(container, "sh", "-c", "echo kept > /kept")
        wrong = container_config(world.image, SLEEP)
        wrong.mounts.add(container_path="/x", image=image, image_sub_path="no/such/path", readonly=True)
        code, message = error_of(lambda: cri_client.create(pod, wrong, config))
        assert (code, "image_sub_path" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True), message
        assert cri_client.exec(container, "cat", "/kept").stdout == b"kept\n"
        assert cri_client.exec(container, "cat", "/x/index.html").stdout.decode() == PAGE
        assert (node.root / f"state/image-svc/containers/{container}/upper/kept").read_text() == "kept\n"

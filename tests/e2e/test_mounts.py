"""Mounts by depth, the volumes that images declare, and images as volumes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from expect import refused
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SLEEP = ["sleep", "600"]
RUNTIMES = ("crun", "runc")


@contextlib.contextmanager
def pulled(client: Cri, world: World, name: str, layer: images.Layer, **config: object) -> Iterator[str]:
    """Pulls an image while the block runs: busybox with files, and this config."""
    image = images.build([images.busybox_layer().finish(), layer.finish()], {"Env": ["PATH=/bin"], **config})
    image.push(world.registry, f"test/{name}", "1")
    reference = f"{world.registry}/test/{name}:1"
    client.pull(reference)
    try:
        yield reference
    finally:
        client.remove_image(reference)


@contextlib.contextmanager
def running(client: Cri, image: str, logs: Path, handler: str = "", **fields: Any) -> Iterator[str]:
    """Runs a container in a pod of its own while the block runs."""
    dns = cri.DNSConfig(servers=["10.9.8.7"])
    pod_linux = fields.pop("pod_linux", None)
    config = pod_config("volumes", log_directory=logs, dns_config=dns, linux=pod_linux)
    with client.pod(config, handler) as pod:
        yield client.run(pod, container_config(image, SLEEP, **fields), config)


def shell(client: Cri, container: str, script: str) -> list[str]:
    """Returns the lines that a script prints in a container."""
    said = client.exec(container, "sh", "-c", script)
    return (said.stdout + said.stderr).decode().splitlines()


def read_only_root() -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(readonly_rootfs=True))


# By depth


@pytest.mark.parametrize("handler", RUNTIMES)
def test_a_volume_on_etc_leaves_the_pods_files_in_place(
    cri_client: Cri, world: World, tmp_path: Path, handler: str
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/mine").write_text("mine\n")
    (tmp_path / "hosts").write_text("theirs\n")
    mounts = [
        cri.Mount(container_path="/etc/hosts", host_path=str(tmp_path / "hosts")),
        cri.Mount(container_path="/etc", host_path=str(tmp_path / "etc")),
    ]
    with running(cri_client, world.image, tmp_path / "logs", handler, mounts=mounts) as container:
        said = shell(cri_client, container, "cat /etc/mine /etc/resolv.conf /etc/hostname /etc/hosts")
        assert said == ["mine", "nameserver 10.9.8.7", "volumes", "theirs"]


@pytest.mark.parametrize("handler", RUNTIMES)
def test_a_read_only_volume_on_etc_without_such_files_takes_none(
    cri_client: Cri, world: World, tmp_path: Path, handler: str
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_text("covered\n")
    (tmp_path / "etc/hostname").mkdir()
    mounts = [cri.Mount(container_path="/etc", host_path=str(tmp_path / "etc"), readonly=True)]
    with running(cri_client, world.image, tmp_path / "logs", handler, mounts=mounts) as container:
        assert shell(cri_client, container, "cat /etc/resolv.conf; ls /etc") == [
            "nameserver 10.9.8.7",
            "hostname",
            "resolv.conf",
        ]


def test_of_two_mounts_on_one_path_the_later_one_counts(cri_client: Cri, world: World, tmp_path: Path) -> None:
    layer = images.Layer()
    layer.symlink("/link", "/real/deep")
    layer.folder("/real/deep")
    for name in ("one", "two", "three", "four"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{name}\n")

    def mount(path: str, name: str) -> cri.Mount:
        return cri.Mount(container_path=path, host_path=str(tmp_path / name))

    mounts = [
        mount("/real/deep/below", "four"),
        mount("/link", "one"),
        mount("/real/../real/./deep/", "two"),
        mount("/same", "two"),
        mount("/same", "three"),
    ]
    with (
        pulled(cri_client, world, "twice", layer) as image,
        running(cri_client, image, tmp_path, mounts=mounts) as container,
    ):
        assert shell(cri_client, container, "cat /link/name /real/deep/below/name /same/name") == [
            "two",
            "four",
            "three",
        ]
        assert [mount.container_path for mount in cri_client.status(container).mounts] == [
            mount.container_path for mount in mounts
        ]


def test_links_in_the_image_do_not_decide_who_wins_etc_hosts(cri_client: Cri, world: World, tmp_path: Path) -> None:
    layer = images.Layer()
    layer.symlink("/etc/hosts", "/hosts")
    layer.file("/hosts", "of the image")
    layer.symlink("/etc/resolv.conf", "../run/resolv/stub.conf")
    layer.symlink("/etc/hostname", "hostname")
    (tmp_path / "hosts").write_text("theirs\n")
    (tmp_path / "run").mkdir()
    mounts = [
        cri.Mount(container_path="/etc/hosts", host_path=str(tmp_path / "hosts")),
        cri.Mount(container_path="/run", host_path=str(tmp_path / "run")),
    ]
    with (
        pulled(cri_client, world, "links", layer) as image,
        running(cri_client, image, tmp_path, mounts=mounts) as container,
    ):
        assert shell(cri_client, container, "cat /etc/hosts /etc/resolv.conf") == ["theirs", "nameserver 10.9.8.7"]


@pytest.mark.parametrize("handler", RUNTIMES)
def test_a_request_brings_its_own_dev_and_sys(cri_client: Cri, world: World, tmp_path: Path, handler: str) -> None:
    mounts = [cri.Mount(container_path=path, host_path=path) for path in ("/dev", "/sys")]
    with running(cri_client, world.image, tmp_path, handler, mounts=mounts) as container:
        own = shell(
            cri_client, container, "grep -c ' /dev/pts devpts' /proc/mounts; grep ' /dev/shm ' /proc/mounts | tail -n 1"
        )
        assert own[1].startswith("shm /dev/shm tmpfs")
        assert cri_client.exec(container, "test", "-e", "/dev/null").exit_code == 0


def test_nothing_is_mounted_over_the_whole_image(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("whole", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        for path in ("/", "/..", "//", "/a/.."):
            mounts = [cri.Mount(container_path=path, host_path=str(tmp_path))]
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "mounts[0].container_path"):
                cri_client.create(pod, container_config(world.image, SLEEP, mounts=mounts), config)


# VOLUME


def declared() -> images.Layer:
    """Files for an image that declares volumes."""
    layer = images.Layer()
    layer.folder("/data", 0o750, uid=33, gid=100)
    layer.file("/data/seed", "seed\n", uid=33, gid=100)
    layer.folder("/elsewhere")
    layer.symlink("/link", "elsewhere")
    layer.file("/file", "a file\n")
    return layer


PATHS = [
    "/data",
    "/new/deep",
    "/link",
    "/file",
    "/sys/fs/cgroup",
    "/proc",
    "/",
    "/file/below",
    "relative",
    "/d" * 4000,
    "/nul\0",
]


@pytest.mark.parametrize("handler", RUNTIMES)
@pytest.mark.parametrize("readonly", [False, True])
def test_an_images_volumes_are_writable_with_its_content_and_owner(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, handler: str, readonly: bool
) -> None:
    linux = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(
            readonly_rootfs=readonly, run_as_user=cri.Int64Value(value=33), run_as_group=cri.Int64Value(value=100)
        )
    )
    volumes: dict[str, object] = {path: {} for path in PATHS}
    with (
        pulled(cri_client, world, "declared", declared(), Volumes=volumes) as image,
        running(cri_client, image, tmp_path, handler, linux=linux) as container,
    ):
        assert shell(
            cri_client, container, "cat /data/seed; stat -c '%u %g %a' /data /new/deep; ls /relative; cat /file"
        ) == [
            "seed",
            "33 100 750",
            "33 100 755",
            "a file",
        ]
        assert shell(cri_client, container, "echo x > /data/x && echo y > /new/deep/y && cat /data/x /new/deep/y") == [
            "x",
            "y",
        ]
        upper = node.root / "state/image-svc/containers" / container / "upper"
        assert (upper / "data/x").read_text() == "x\n", "it is measured, and removed, with the writable layer"
        assert cri_client.exec(container, "touch", "/not-here").exit_code == 1
        assert (b"Read-only" in cri_client.exec(container, "touch", "/not-here").stderr) is readonly
        assert [mount.container_path for mount in cri_client.status(container).mounts] == []


def test_a_mount_of_the_request_beats_a_declared_volume(cri_client: Cri, world: World, tmp_path: Path) -> None:
    for name in ("data", "parent", "below"):
        (tmp_path / name).mkdir()
    mounts = [
        cri.Mount(container_path="/data", host_path=str(tmp_path / "data")),
        cri.Mount(container_path="/parent", host_path=str(tmp_path / "parent")),
        cri.Mount(container_path="/link/below", host_path=str(tmp_path / "below")),
    ]
    volumes: dict[str, object] = {"/data": {}, "/parent/volume": {}, "/link": {}}
    with (
        pulled(cri_client, world, "beaten", declared(), Volumes=volumes) as image,
        running(cri_client, image, tmp_path / "logs", mounts=mounts, linux=read_only_root()) as container,
    ):
        script = "ls /data /parent; for path in /data /parent /link /link/below; do touch $path/mine; done"
        assert shell(cri_client, container, script) == ["/data:", "", "/parent:"]
        assert {path.name for path in tmp_path.glob("*/mine")} == {"mine"}
        assert len(list(tmp_path.glob("*/mine"))) == 3
        assert list((tmp_path / "parent").iterdir()) == [tmp_path / "parent/mine"], "no folder is made in a volume"


def test_a_declared_etc_has_the_pods_files(cri_client: Cri, world: World, tmp_path: Path) -> None:
    with (
        pulled(cri_client, world, "etc", declared(), Volumes={"/etc": {}}) as image,
        running(cri_client, image, tmp_path, linux=read_only_root()) as container,
    ):
        assert shell(cri_client, container, "touch /etc/new; cat /etc/resolv.conf /etc/hostname") == [
            "nameserver 10.9.8.7",
            "volumes",
        ]


@pytest.mark.parametrize(("mode", "made", "written"), [("mkdir", 0, 1), ("ignore", 1, 1)])
def test_what_becomes_of_declared_volumes_is_the_nodes_to_say(
    own_node: Node, world: World, tmp_path: Path, mode: str, made: int, written: int
) -> None:
    own_node.settings = {"runtime": {"image_volumes": mode}}
    own_node.start()
    with Cri(own_node.socket) as client, pulled(client, world, "said", declared(), Volumes={"/new": {}}) as image:
        with running(client, image, tmp_path, linux=read_only_root()) as container:
            assert client.exec(container, "test", "-d", "/new").exit_code == made
            assert client.exec(container, "touch", "/new/file").exit_code == written
        with running(client, image, tmp_path) as container:
            assert client.exec(container, "test", "-d", "/new").exit_code == made


# Images as volumes


def test_an_image_volume_tells_its_image_even_if_the_tag_moves(cri_client: Cri, world: World, tmp_path: Path) -> None:
    def push(content: str) -> None:
        layer = images.Layer()
        layer.file("/content", content)
        images.build([layer.finish()], {}).push(world.registry, "test/moving", "1")

    name = f"{world.registry}/test/moving:1"
    push("first")
    first = cri_client.pull(name)
    mounts = [
        cri.Mount(container_path="/host", host_path=str(tmp_path)),
        cri.Mount(container_path="/image", image=cri.ImageSpec(image=name), readonly=True),
    ]
    with running(cri_client, world.image, tmp_path, mounts=mounts) as container:
        push("second")
        second = cri_client.pull(name)
        assert first != second
        told = cri_client.status(container).mounts
        assert [(mount.image.image, mount.image.image_ref) for mount in told] == [("", ""), (name, first)]
        assert cri_client.exec(container, "cat", "/image/content").stdout == b"first"
    cri_client.remove_image(second)


def test_an_image_volume_is_asked_for_as_read_only(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("writable", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        mounts = [cri.Mount(container_path="/image", image=cri.ImageSpec(image=world.image))]
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "mounts[0].readonly = false"):
            cri_client.create(pod, container_config(world.image, SLEEP, mounts=mounts), config)

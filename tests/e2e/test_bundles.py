"""Any configuration of a container is refused or becomes a valid bundle.

A refusal names a field. A bundle fits OCI's schema, and the OCI runtime accepts it.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
from cgroup_files import VERSION_2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone, scratch
from crisplab.cri import Cri, pod_config
from crisplab.node import Node

# From the package golang-github-opencontainers-specs-dev, which `make lab` unpacks.
SCHEMAS = clone.ROOT / ".cache/debian/usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema"
FAULTS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED}
MIB = 1 << 20


@cache
def schema() -> Draft4Validator:
    """Returns OCI's own schema of config.json (opencontainers/runtime-spec, schema/)."""
    base = "https://opencontainers.org/schema/"
    documents = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    registry: Registry[Any] = Registry().with_resources(
        [
            (f"{base}{name}", Resource.from_contents(document, default_specification=DRAFT4))
            for name, document in documents.items()
        ]
    )
    return Draft4Validator({**documents["config-schema.json"], "id": f"{base}config-schema.json"}, registry=registry)


@pytest.fixture(scope="module")
def host() -> Iterator[Path]:
    """A folder with a file of each kind to mount."""
    with scratch.folder("bundles") as folder:
        (folder / "dir/below").mkdir(parents=True)
        (folder / "file").write_text("text")
        (folder / "link").symlink_to("dir")
        yield folder


def message(kind: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draws a protobuf message; each of these fields is left out in half of the cases."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


def of(*good: Any, bad: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Draws a valid value nearly always.

    A configuration has dozens of values and is valid only if all of them are.
    """
    return st.sampled_from([*good * (40 * len(bad) // len(good) + 1), *bad])


def some(elements: st.SearchStrategy[Any], most: int = 2) -> st.SearchStrategy[list[Any]]:
    return st.lists(elements, max_size=most)


WORDS = st.text("abcXYZ09._-/ é=", max_size=12)
NUMBERS = of(0, 1, 33, 1000, 65_534, bad=(-1,))
CAPABILITIES = some(of("NET_ADMIN", "CAP_CHOWN", "ALL", "SYS_PTRACE", "KILL", "cap_net_raw", bad=("NO_SUCH",)))
RESOURCES = message(
    cri.LinuxContainerResources,
    cpu_shares=of(0, 2, 512, 262_144, 300_000, bad=(-1,)),
    cpu_quota=of(-1, 0, 1000, 20_000, 1_000_000, bad=(500,)),
    cpu_period=of(0, 1000, 100_000, 1_000_000, bad=(-5, 10, 2_000_000)),
    cpuset_cpus=of("", "0", "0-1"),
    memory_limit_in_bytes=of(0, 16 * MIB, 64 * MIB, bad=(-1,)),
    memory_swap_limit_in_bytes=of(0, 64 * MIB, bad=(16 * MIB,)),
    oom_score_adj=of(0, 999, 1000, -998, bad=(-1001, 1001)),
    hugepage_limits=some(message(cri.HugepageLimit, page_size=of("2MB", "1GB"), limit=of(0, 1 << 30))),
    unified=st.dictionaries(of("memory.high"), of("max", "100000000"), max_size=1 if VERSION_2 else 0),
)
SECURITY = message(
    cri.LinuxContainerSecurityContext,
    capabilities=message(
        cri.Capability,
        add_capabilities=CAPABILITIES,
        drop_capabilities=CAPABILITIES,
        add_ambient_capabilities=some(of("KILL", "CAP_CHOWN")),
    ),
    privileged=st.booleans(),
    namespace_options=message(cri.NamespaceOption, pid=of(cri.POD, cri.CONTAINER, cri.NODE), ipc=of(cri.POD, cri.NODE)),
    run_as_user=st.builds(cri.Int64Value, value=NUMBERS),
    run_as_group=st.builds(cri.Int64Value, value=NUMBERS),
    run_as_username=of("", "root", bad=("nobody-here",)),
    supplemental_groups=some(NUMBERS),
    supplemental_groups_policy=of(cri.Merge, cri.Strict),
    readonly_rootfs=st.booleans(),
    no_new_privs=st.booleans(),
    masked_paths=some(of("/proc/kcore", "/sys/firmware", "/nowhere")),
    readonly_paths=some(of("/proc/sys", "/nowhere")),
    seccomp=message(cri.SecurityProfile, profile_type=of(0, 1), localhost_ref=of("", "none.json")),
    apparmor=message(cri.SecurityProfile, profile_type=of(0, 1, bad=(2,)), localhost_ref=of("", "none")),
)


def configs(image: str, host: Path) -> st.SearchStrategy[cri.ContainerConfig]:
    """Draws configurations, most of them valid."""
    mounts = message(
        cri.Mount,
        container_path=of(
            "/data", "/etc/hosts", "/dev/shm", "/www/index.html", "/a/../b", "/new/deep/dir", bad=("relative",)
        ),
        host_path=of(
            *(str(host / name) for name in ("dir", "link", "dir/below", "made/by/us")),
            bad=("relative", str(host / "file/no")),
        ),
        readonly=st.booleans(),
        recursive_read_only=of(False, bad=(True,)),
        propagation=of(0, bad=(1, 2)),
    ).map(_complete)
    devices = message(
        cri.Device,
        container_path=of("/dev/mine", "/dev/deep/mine"),
        host_path=of("/dev/null", "/dev/zero", bad=("/dev/none", str(host / "file"))),
        permissions=of("", "r", "rwm", bad=("x",)),
    ).map(_complete_device)
    return message(
        cri.ContainerConfig,
        working_dir=of("", "/", "/new/folder", bad=("relative",)),
        envs=some(
            message(cri.KeyValue, key=of("A", "B_2", "é", bad=("=",)), value=st.binary(max_size=6).map(_no_nul)).map(
                _complete_env
            )
        ),
        args=some(WORDS),
        mounts=some(mounts),
        devices=some(devices),
        labels=st.dictionaries(WORDS, WORDS, max_size=2),
        annotations=st.dictionaries(WORDS.filter(len), WORDS, max_size=2),
        tty=st.booleans(),
        stdin=st.booleans(),
        stdin_once=st.booleans(),
        stop_signal=of(0, 15, 40),
        linux=message(cri.LinuxContainerConfig, resources=RESOURCES, security_context=SECURITY),
    ).map(lambda config: _named(config, image))


def _no_nul(raw: bytes) -> bytes:
    return raw.replace(b"\0", b".")


def _complete(mount: cri.Mount) -> cri.Mount:
    mount.container_path, mount.host_path = mount.container_path or "/data", mount.host_path or "/tmp"
    return mount


def _complete_device(device: cri.Device) -> cri.Device:
    device.container_path, device.host_path = device.container_path or "/dev/mine", device.host_path or "/dev/null"
    return device


def _complete_env(variable: cri.KeyValue) -> cri.KeyValue:
    variable.key = variable.key or "A"
    return variable


def _named(config: cri.ContainerConfig, image: str) -> cri.ContainerConfig:
    config.metadata.name, config.log_path, config.image.image = "main", "main.log", image
    config.command.extend(["sleep", "600"])
    return config


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_any_configuration_is_refused_by_name_or_makes_a_bundle(
    cri_client: Cri, node: Node, world: World, host: Path, tmp_path: Path, handler: str
) -> None:
    pod_of_all = pod_config("bundles", log_directory=tmp_path)
    pod_of_all.linux.security_context.privileged = True
    pod_of_all.linux.security_context.namespace_options.pid = cri.POD
    with cri_client.pod(pod_of_all, handler) as pod:
        made = [0]

        # The examples are the same each time: what they find belongs in a test of its own, and must
        # not fail a later run by chance.
        @settings(
            max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
        )
        @given(configs(world.image, host))
        def try_it(config: cri.ContainerConfig) -> None:
            made[0] += _created(cri_client, node, pod, config, pod_of_all)

        try_it()
        assert made[0] >= 10, "the strategy draws hardly any valid configuration"


def _created(client: Cri, node: Node, pod: str, config: cri.ContainerConfig, of: cri.PodSandboxConfig) -> bool:
    try:
        container = client.create(pod, config, of)
    except grpc.RpcError as error:
        assert error.code() in FAULTS, f"{error.code()}: {error.details()}\n{config}"
        assert error.details()
        return False
    try:
        bundle = node.run / "runtime-svc/bundles" / container / "config.json"
        faults = [
            f"{'/'.join(map(str, fault.path))}: {fault.message}"
            for fault in schema().iter_errors(json.loads(bundle.read_text()))
        ]
        assert not faults
        assert client.status(container).state == cri.CONTAINER_CREATED
    finally:
        client.remove(container)
    return True


def test_the_schema_finds_faults() -> None:
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": "/x"},
        "linux": {"resources": {"pids": {"limit": 1}}},
    }
    assert schema().is_valid(document)
    document["linux"]["resources"]["pids"]["limit"] = "many"
    assert not schema().is_valid(document)

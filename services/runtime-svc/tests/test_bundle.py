"""CRI's configuration translated to an OCI bundle, without root."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp_proto.config import (
    Capability,
    ContainerConfig,
    HugepageLimit,
    Int64Value,
    KeyValue,
    LinuxContainerConfig,
    LinuxContainerResources,
    LinuxContainerSecurityContext,
    LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext,
    Mount,
    NamespaceMode,
    NamespaceOption,
    PodSandboxConfig,
    ProfileType,
    SecurityProfile,
    SupplementalGroupsPolicy,
)  # fmt: skip
from crisp_proto.image import ImageConfig
from runtime_svc.cgroups import limits
from runtime_svc.cgroups.v1 import CgroupsV1
from runtime_svc.cgroups.v2 import CgroupsV2
from runtime_svc.runtimes.features import Features
from runtime_svc.sandbox.sandbox import Sandbox
from runtime_svc.settings import BlockIoClass, HandlerSettings, RuntimeSettings
from runtime_svc.spec import (
    bundle,
    capabilities,
    mounts,
    oci,
    process,
    resource_classes,
    resources,
    seccomp,
    seccomp_filter,
    users,
)
from runtime_svc.spec.bundle import PodContext
from runtime_svc.spec.cdi import Registry
from runtime_svc.spec.mounts import MountContext
from servicekit.errors import FailedPrecondition, InvalidArgument

IMAGE = ImageConfig(entrypoint=["/entry"], cmd=["default"], env=["A=image", "B=image"], user="web")
PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/sh\n"
GROUP = "root:x:0:\nweb:x:34:\nextra:x:50:web,other\nnumbers:x:100:\n"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "rootfs/etc").mkdir(parents=True)
    (tmp_path / "rootfs/etc/passwd").write_text(PASSWD)
    (tmp_path / "rootfs/etc/group").write_text(GROUP)
    return tmp_path / "rootfs"


FEATURES = Features(recursive_read_only=True, idmapped_mounts=True, user_namespaces=True, no_checkpoint=None)
PLAIN_POD = PodSandboxConfig()
PRIVILEGED_POD = PodSandboxConfig(
    linux=LinuxPodSandboxConfig(security_context=LinuxSandboxSecurityContext(privileged=True))
)


def context(folder: Path, pod: PodSandboxConfig = PLAIN_POD) -> PodContext:
    sandbox = Sandbox(folder / "pod")
    sandbox.namespace("pid").parent.mkdir(parents=True, exist_ok=True)
    sandbox.namespace("pid").touch()
    sandbox.namespace("ipc").touch()
    return PodContext(
        id="pid",
        config=pod,
        sandbox=sandbox,
        hostname="host",
        cgroups_path="/crisp/pod/cid",
        cgroups=CgroupsV2(),
        handler=HandlerSettings(path=Path("/usr/bin/crun")),
        features=FEATURES,
        netns="/run/netns/x",
    )


def build(config: ContainerConfig, rootfs: Path, image: ImageConfig = IMAGE, pod: PodContext | None = None) -> oci.Spec:
    pod = pod or context(rootfs.parent)
    return bundle.build(config, image, rootfs, pod, RuntimeSettings(hooks_dirs=[]), Registry([])).spec


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [([], [], ["/entry", "default"]), ([], ["x"], ["/entry", "x"]), (["c"], [], ["c"]), (["c"], ["x"], ["c", "x"])],
)
def test_command_and_args(command: list[str], args: list[str], expected: list[str]) -> None:
    assert process.arguments(ContainerConfig(command=command, args=args), IMAGE) == expected


def test_environment_comes_from_the_image_then_the_request(rootfs: Path) -> None:
    config = ContainerConfig(
        envs=[KeyValue(key="B", value=b"cmVxdWVzdA=="), KeyValue(key="C", value=b"Yw==")], tty=True
    )
    environment = dict(entry.split("=", 1) for entry in build(config, rootfs)["process"]["env"])
    assert (environment["A"], environment["B"], environment["C"], environment["TERM"]) == (
        "image",
        "request",
        "c",
        "xterm",
    )
    assert (environment["HOSTNAME"], environment["HOME"]) == ("host", "/var/www")
    assert environment["PATH"].startswith("/usr/local/sbin:")


@pytest.mark.parametrize(
    ("security", "image_user", "expected"),
    [
        ({}, "", (0, 0, (0,))),
        ({}, "web", (33, 34, (34, 50))),
        ({}, "33", (33, 34, (34, 50))),
        ({}, "web:numbers", (33, 100, (100, 50))),
        ({}, "1234:5678", (1234, 5678, (5678,))),
        ({"run_as_username": "web"}, "root", (33, 34, (34, 50))),
        (
            {"run_as_user": Int64Value(value=7), "run_as_group": Int64Value(value=8), "supplemental_groups": [9]},
            "web",
            (7, 8, (8, 9)),
        ),
        (
            {"supplemental_groups": [9], "supplemental_groups_policy": SupplementalGroupsPolicy.STRICT},
            "web",
            (33, 34, (34, 9)),
        ),
    ],
)
def test_users(
    rootfs: Path, security: dict[str, object], image_user: str, expected: tuple[int, int, tuple[int, ...]]
) -> None:
    found = users.resolve(LinuxContainerSecurityContext.model_validate(security), image_user, rootfs)
    assert (found.uid, found.gid, found.groups) == expected


def test_what_is_all_digits_is_an_id_whatever_the_image_calls_it(rootfs: Path) -> None:
    """Otherwise USER 1000 is root past runAsNonRoot, which kubelet checks by the number."""
    (rootfs / "etc/passwd").write_text("1000:x:0:0::/root:/bin/sh\nmine:x:1000:7::/home:/bin/sh\n0:x:5:5::/:\n")
    (rootfs / "etc/group").write_text("2000:x:0:\nfriends:x:8:mine\n")

    def found(image_user: str = "", **security: object) -> tuple[int, int, tuple[int, ...]]:
        user = users.resolve(LinuxContainerSecurityContext.model_validate(security), image_user, rootfs)
        return user.uid, user.gid, user.groups

    assert found("1000") == (1000, 7, (7, 8))
    assert found("1000:2000") == (1000, 2000, (2000, 8))
    assert found("0:0") == (0, 0, (0,))
    assert found(":2000") == (0, 2000, (2000,))
    assert found(run_as_username="1000") == (1000, 7, (7, 8))
    assert found(run_as_user=Int64Value(value=1000)) == (1000, 7, (7, 8))
    assert found(run_as_user=Int64Value(value=2**32 - 2)) == (2**32 - 2, 0, (0,))


@pytest.mark.parametrize(
    ("user", "error"),
    [
        ("nobody", "'nobody': the image's /etc/passwd has no such user"),
        ("--5", "no such user"),
        ("-5", "no such user"),
        ("+5", "no such user"),
        ("١٠", "no such user"),
        ("05", "without leading zeros"),
        ("00", "without leading zeros"),
        (str(2**32 - 1), "ids go from 0 to 4294967294"),
        ("9" * 5000, "ids go from 0"),
        ("n" * 5000, "no such user"),
    ],
)
def test_a_user_that_is_neither_name_nor_id_is_refused(rootfs: Path, user: str, error: str) -> None:
    for asked, image_user, field in (
        ({"run_as_username": user}, "", "linux.security_context.run_as_username"),
        ({}, user, "the image's USER"),
    ):
        with pytest.raises(InvalidArgument, match=error) as refused:
            users.resolve(LinuxContainerSecurityContext.model_validate(asked), image_user, rootfs)
        assert refused.value.field == field
        assert len(refused.value.message) < 400
    with pytest.raises(InvalidArgument, match="the image's USER"):
        users.resolve(LinuxContainerSecurityContext(), f"web:{user}", rootfs)


def test_lines_of_passwd_and_group_without_ids_are_left_out(rootfs: Path) -> None:
    many = "9" * 5000
    (rootfs / "etc/passwd").write_text(
        f"a:x:{many}:0::/:\nb:x:-1:0::/:\nc:x:٥:0::/:\nd:x:4294967295:0::/:\nweb:x:5:6::/w:\n"
    )
    (rootfs / "etc/group").write_text(f"a:x:{many}:web\nb:x::web\nc:x:7:web\n")
    found = users.resolve(LinuxContainerSecurityContext(), "web", rootfs)
    assert (found.uid, found.gid, found.groups, found.home) == (5, 6, (6, 7), "/w")
    for lost in "abcd":
        with pytest.raises(InvalidArgument, match="no such user"):
            users.resolve(LinuxContainerSecurityContext(), lost, rootfs)


def test_passwd_is_never_read_through_a_link_out_of_the_rootfs(rootfs: Path) -> None:
    (rootfs / "etc/passwd").unlink()
    (rootfs / "etc/passwd").symlink_to("../../../../../etc/passwd")
    with pytest.raises(InvalidArgument, match="daemon"):
        users.resolve(LinuxContainerSecurityContext(run_as_username="daemon"), "", rootfs)


def test_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "held", lambda: frozenset(capabilities.ALL))
    wanted = capabilities.wanted
    assert wanted([], [], privileged=False) == capabilities.DEFAULT
    assert wanted(["net_admin"], ["CAP_CHOWN"], privileged=False) == capabilities.DEFAULT - {"CAP_CHOWN"} | {
        "CAP_NET_ADMIN"
    }
    assert wanted([], ["ALL"], privileged=False) == frozenset()
    assert wanted(["NET_RAW"], ["all"], privileged=False) == {"CAP_NET_RAW"}
    assert wanted(["ALL"], ["SYS_ADMIN"], privileged=False) == frozenset(capabilities.ALL) - {"CAP_SYS_ADMIN"}
    assert wanted([], ["ALL"], privileged=True) == frozenset(capabilities.ALL)
    with pytest.raises(InvalidArgument, match="'FLY'"):
        wanted(["FLY"], [], privileged=False)


def test_what_a_process_may_not_hold_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "held", lambda: frozenset({"CAP_CHOWN"}))
    assert capabilities.wanted([], [], privileged=True) == {"CAP_CHOWN"}


def test_limits() -> None:
    asked = LinuxContainerResources(cpu_shares=512, cpu_quota=-1, memory_limit_in_bytes=1 << 20, cpuset_cpus="0-1")
    assert resources.to_oci(asked, CgroupsV2()) == {
        "cpu": {"shares": 512, "cpus": "0-1"},
        "memory": {"limit": 1 << 20},
    }
    assert resources.to_oci(LinuxContainerResources(), CgroupsV2()) == {}
    with pytest.raises(InvalidArgument, match="unified needs cgroup version 2"):
        resources.to_oci(LinuxContainerResources(unified={"memory.high": "1"}), CgroupsV1(()))
    merged = limits.merged(asked, LinuxContainerResources(cpu_shares=1024))
    assert (merged.cpu_shares, merged.memory_limit_in_bytes) == (1024, 1 << 20)


def test_a_mount_of_the_request_beats_ours_and_parents_come_before_children(rootfs: Path, tmp_path: Path) -> None:
    asked = [
        Mount(container_path="/a/b", host_path=str(tmp_path)),
        Mount(container_path="/a", host_path=str(tmp_path)),
        Mount(container_path="/etc/hosts", host_path="/etc/hostname"),
    ]
    files = {"/etc/hosts": tmp_path / "hosts", "/etc/resolv.conf": tmp_path / "resolv.conf"}
    plan = mounts.plan(asked, MountContext(rootfs, FEATURES), [], files, readonly_rootfs=False)
    found = [entry["destination"] for entry in plan.mounts]
    assert found == ["/a", "/etc/resolv.conf", "/a/b", "/etc/hosts"]
    assert plan.root_propagation is None


def test_a_container_path_is_resolved_inside_the_rootfs(rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "link").symlink_to("../../../etc")
    asked = [Mount(container_path="/link/x", host_path=str(tmp_path))]
    plan = mounts.plan(asked, MountContext(rootfs, FEATURES), [], {}, readonly_rootfs=False)
    assert plan.mounts[-1]["destination"] == "/etc/x"
    (rootfs / "loop").symlink_to("loop")
    with pytest.raises(InvalidArgument, match=r"mounts\[0\]\.container_path = '/loop/x': too many links"):
        mounts.plan(
            [Mount(container_path="/loop/x", host_path=str(tmp_path))],
            MountContext(rootfs, FEATURES),
            [],
            {},
            readonly_rootfs=False,
        )


def test_privileged_containers_have_no_masks_and_no_seccomp(rootfs: Path) -> None:
    confined = LinuxContainerSecurityContext(seccomp=SecurityProfile(profile_type=ProfileType.RUNTIME_DEFAULT))
    plain = build(ContainerConfig(linux=LinuxContainerConfig(security_context=confined)), rootfs)["linux"]
    assert "seccomp" not in build(ContainerConfig(), rootfs)["linux"]
    assert plain["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    config = ContainerConfig(
        linux=LinuxContainerConfig(security_context=LinuxContainerSecurityContext(privileged=True))
    )
    mighty = context(rootfs.parent, PRIVILEGED_POD)
    linux = build(config, rootfs, pod=mighty)["linux"]
    assert not {"maskedPaths", "readonlyPaths", "seccomp"} & set(linux)


def test_namespaces(rootfs: Path) -> None:
    def kinds(**options: NamespaceMode) -> set[str]:
        security = LinuxContainerSecurityContext(namespace_options=NamespaceOption(**options))
        return {
            entry["type"]
            for entry in build(ContainerConfig(linux=LinuxContainerConfig(security_context=security)), rootfs)["linux"][
                "namespaces"
            ]
        }

    assert kinds(pid=NamespaceMode.CONTAINER) == {"mount", "network", "uts", "ipc", "pid", "cgroup"}
    assert kinds(network=NamespaceMode.NODE, pid=NamespaceMode.NODE, ipc=NamespaceMode.NODE) == {
        "mount",
        "network",
        "uts",
        "cgroup",
    }  # the pod decides


def test_the_default_profile_is_narrowed_to_the_capabilities() -> None:
    def allowed(*names: str) -> set[str]:
        rules = seccomp.default_profile(frozenset(names))["syscalls"]
        return {
            name
            for rule in rules
            if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
            for name in rule["names"]
        }

    assert {"read", "execve", "openat2"} <= allowed()
    assert not {"mount", "bpf", "kexec_load", "add_key", "clone"} & allowed()
    assert {"mount", "setns", "clone"} <= allowed("CAP_SYS_ADMIN")
    assert allowed() < allowed("CAP_SYS_ADMIN", "CAP_BPF")


def test_the_compiled_profile_is_a_program_of_the_kernels_size() -> None:
    program = seccomp_filter._compile(seccomp.default_profile(capabilities.DEFAULT))
    assert len(program) % 8 == 0
    assert 100 < len(program) // 8 <= 4096  # BPF_MAXINSNS


def test_a_localhost_profile(tmp_path: Path) -> None:
    (tmp_path / "fine.json").write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    (tmp_path / "odd.json").write_text("[]")
    assert seccomp.localhost_profile("localhost/fine.json", tmp_path) == {"defaultAction": "SCMP_ACT_ALLOW"}
    with pytest.raises(InvalidArgument, match="defaultAction"):
        seccomp.localhost_profile("odd.json", tmp_path)
    with pytest.raises(InvalidArgument, match=r"none\.json"):
        seccomp.localhost_profile("none.json", tmp_path)


@given(
    st.builds(
        LinuxContainerResources,
        cpu_shares=st.integers(0, 2**20),
        cpu_quota=st.integers(-1, 2**20),
        memory_limit_in_bytes=st.integers(0, 2**40),
        cpuset_cpus=st.sampled_from(["", "0"]),
    )
)
def test_any_limits_make_a_document_without_empty_parts(asked: LinuxContainerResources) -> None:
    document = resources.to_oci(asked, CgroupsV2())
    assert json.loads(json.dumps(document)) == document
    assert all(document.values())


@given(
    st.lists(st.sampled_from(["ALL", *capabilities.NAMES, *capabilities.ALL]), max_size=6),
    st.lists(st.sampled_from(["ALL", *capabilities.NAMES]), max_size=6),
)
def test_capabilities_asked_for_are_had_and_dropped_ones_are_not(add: list[str], drop: list[str]) -> None:
    found = capabilities.wanted(add, drop, privileged=False)
    full = {name if name.startswith("CAP_") else f"CAP_{name}" for name in add if name != "ALL"}
    assert full & capabilities.held() <= found
    assert not ({f"CAP_{name}" for name in drop if name != "ALL"} - full) & found


def test_ambient_capabilities_are_in_every_set(rootfs: Path) -> None:
    security = LinuxContainerSecurityContext(
        capabilities=Capability(add_ambient_capabilities=["NET_BIND_SERVICE"], drop_capabilities=["ALL"])
    )
    sets = build(ContainerConfig(linux=LinuxContainerConfig(security_context=security)), rootfs)["process"][
        "capabilities"
    ]
    assert {name: value for name, value in sets.items() if value != ["CAP_NET_BIND_SERVICE"]} == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpu_shares", 1), ("cpu_shares", -2), ("cpu_shares", 262_145), ("cpu_period", 999), ("cpu_period", 1_000_001), ("cpu_quota", 999),
     ("memory_limit_in_bytes", -1), ("memory_swap_limit_in_bytes", 5), ("oom_score_adj", 1001), ("cpuset_cpus", "1-"), ("cpuset_mems", "a")],
)  # fmt: skip
def test_limits_that_no_cgroup_takes_are_named(field: str, value: int | str) -> None:
    asked = LinuxContainerResources(**{field: value})
    with pytest.raises(InvalidArgument, match=rf"linux\.resources\.{field} = {value}: "):
        limits.check(asked, "linux.resources")


def test_classes_come_from_the_pods_annotations_for_one_container_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource_classes, "RESCTRL", tmp_path)
    (tmp_path / "gold").mkdir()
    (tmp_path / "info").mkdir()
    settings = RuntimeSettings(blockio_classes={"slow": BlockIoClass(weight=10), "slower": BlockIoClass(weight=5)})
    annotations = {
        "blockio.resources.beta.kubernetes.io/pod": "slow",
        "blockio.resources.beta.kubernetes.io/container.db": "slower",
        "rdt.resources.beta.kubernetes.io/container.db": "gold",
    }
    found = resource_classes.choose(annotations, "db", settings)
    assert (found.block_io, found.rdt) == ({"weight": 5}, {"closID": "gold"})
    found = resource_classes.choose(annotations, "web", settings)
    assert (found.block_io, found.rdt) == ({"weight": 10}, None)
    for name, kind in (
        ("silver", FailedPrecondition),
        ("..", InvalidArgument),
        ("info", InvalidArgument),
        ("gold/../info", InvalidArgument),
    ):
        with pytest.raises(kind, match="RDT class"):
            resource_classes.choose({"rdt.resources.beta.kubernetes.io/pod": name}, "web", settings)
    with pytest.raises(InvalidArgument, match="'fast' is not configured .*; there are: slow, slower"):
        resource_classes.choose({"blockio.resources.beta.kubernetes.io/pod": "fast"}, "web", settings)


@pytest.mark.parametrize("page_size", ["", "2", "MB", "0MB", "2TB", "../2MB"])
def test_a_huge_page_limit_needs_a_page_size(page_size: str) -> None:
    asked = LinuxContainerResources(hugepage_limits=[HugepageLimit(page_size=page_size, limit=0)])
    with pytest.raises(InvalidArgument, match="page_size"):
        limits.check(asked, "linux.resources")

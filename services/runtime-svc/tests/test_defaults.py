"""What the settings give to every container, without root."""

import os
import resource
from pathlib import Path

import pytest
from pydantic import ValidationError

from crisp_proto.config import ContainerConfig, Device, IDMapping, PodSandboxConfig
from crisp_proto.image import ImageConfig
from runtime_svc.sandbox import id_mappings, sysctls
from runtime_svc.settings import RuntimeSettings
from runtime_svc.spec import capabilities, devices, oci, process, ulimits
from runtime_svc.spec.devices import ANNOTATION
from runtime_svc.spec.users import User
from servicekit.errors import FailedPrecondition, InvalidArgument

ROOT = User(0, 0, (0,), "/root")
NULL = os.stat("/dev/null").st_rdev


def planned(settings: RuntimeSettings) -> oci.Process:
    return process.plan(ContainerConfig(command=["x"]), ImageConfig(env=["A=image"]), ROOT, frozenset(), "h", settings)


def test_limits_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "held", lambda: frozenset(capabilities.ALL))
    assert "rlimits" not in planned(RuntimeSettings())
    made = planned(
        RuntimeSettings(default_ulimits=["nofile=1:2", "CORE=-1:-1"], default_env=["A=node", "B=b=c", "PATH=/x"])
    )
    assert made["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2},
        {"type": "RLIMIT_CORE", "soft": 2**64 - 1, "hard": 2**64 - 1},
    ]
    assert {"A=image", "B=b=c", "PATH=/x", "HOSTNAME=h"} <= set(made["env"])


def test_no_limit_is_promised_that_the_machine_withholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "held", frozenset[str])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 20))
    assert ulimits.to_oci("memlock=-1:-1") == {"type": "RLIMIT_MEMLOCK", "soft": 20, "hard": 20}
    assert ulimits.to_oci("nofile=5:6") == {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}
    assert ulimits.to_oci("nofile=5:-1") == {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 20}


def test_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "held", lambda: frozenset(capabilities.ALL))
    assert capabilities.configured(RuntimeSettings().default_capabilities) == capabilities.DEFAULT
    default = capabilities.configured(["chown", "CAP_KILL"])
    assert capabilities.wanted([], [], privileged=False, default=default) == {"CAP_CHOWN", "CAP_KILL"}
    assert capabilities.wanted(["SETUID"], ["KILL"], privileged=False, default=default) == {"CAP_CHOWN", "CAP_SETUID"}
    assert capabilities.wanted([], [], privileged=False, default=capabilities.configured([])) == frozenset()
    assert capabilities.configured(["ALL"]) == frozenset(capabilities.ALL)
    with pytest.raises(InvalidArgument) as refused:
        capabilities.configured(["FLY"])
    assert refused.value.field == "runtime.default_capabilities"


def nodes(settings: RuntimeSettings, annotation: str = "", *asked: Device) -> dict[str, int]:
    annotations = {ANNOTATION: annotation} if annotation else {}
    plan = devices.plan(devices.requested(asked, annotations, settings), privileged=False)
    return {node["path"]: os.makedev(node["major"], node["minor"]) for node in plan.nodes}


def test_devices_of_the_node_and_of_the_annotation() -> None:
    assert nodes(RuntimeSettings(), "/dev/null:/dev/mine") == {}, "the annotation means nothing unless some are allowed"
    settings = RuntimeSettings(additional_devices=["/dev/zero:/dev/x:r"], allowed_devices=["/dev/null"])
    zero = os.stat("/dev/zero").st_rdev
    assert nodes(settings, "/dev/null:/dev/mine:rw, /dev/../dev/null") == {
        "/dev/x": zero,
        "/dev/mine": NULL,
        "/dev/null": NULL,
    }
    assert nodes(settings, "", Device(host_path="/dev/null", container_path="/dev/x")) == {"/dev/x": NULL}
    for wrong in ("/dev/zero", "/dev/null,/dev/full", "null", ":", "/dev/null/../zero", "/dev/zero:/dev/null"):
        with pytest.raises(InvalidArgument, match="is not allowed on this node") as refused:
            nodes(settings, wrong)
        assert refused.value.field == f"annotations[{ANNOTATION}]"
    with pytest.raises(FailedPrecondition, match="additional_devices = '/dev/gone'"):
        nodes(RuntimeSettings(additional_devices=["/dev/gone"]))
    with pytest.raises(InvalidArgument, match=r"devices\[0\]\.host_path = '/dev/gone'"):
        nodes(settings, "", Device(host_path="/dev/gone"))


def test_sysctls() -> None:
    assert sysctls.parse_defaults(["kernel/sem=1 2 3 4", "fs.mqueue.msg_max=1"]) == {
        "kernel.sem": "1 2 3 4",
        "fs.mqueue.msg_max": "1",
    }
    with pytest.raises(InvalidArgument, match=r"kernel\.panic is not a pod's own"):
        sysctls.parse_defaults(["kernel.panic=1"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("default_ulimits", ["nofile"]),
        ("default_ulimits", ["nofile=1"]),
        ("default_ulimits", ["nofile=2:1"]),
        ("default_ulimits", ["nofile=-1:1"]),
        ("default_ulimits", ["nofile=-2:-2"]),
        ("default_ulimits", ["files=1:1"]),
        ("default_ulimits", ["nofile=" + "9" * 5000 + ":1"]),
        ("default_sysctls", ["net.ipv4.ip_forward=1"]),
        ("default_sysctls", ["net/ipv4/ip_forward=1"]),
        ("default_sysctls", ["kernel.sem"]),
        ("default_sysctls", ["../../etc/passwd=1"]),
        ("default_env", ["A"]),
        ("default_env", ["=a"]),
        ("default_env", ["A=\0"]),
        ("additional_devices", ["null"]),
        ("additional_devices", ["/dev/null:/dev/x:rwx"]),
        ("allowed_devices", ["dev"]),
        ("absent_mount_sources_to_reject", ["relative"]),
        ("timezone", "../UTC"),
        ("timezone", "/etc/passwd"),
        ("image_volumes", "tmpfs"),
        ("unset_masked_paths", "some"),
    ],
)
def test_values_that_cannot_be(key: str, value: object) -> None:
    with pytest.raises(ValidationError):
        RuntimeSettings.model_validate({key: value})


def test_ids_of_a_container_on_the_node() -> None:
    plain = PodSandboxConfig()
    assert id_mappings.on_the_node(plain, 33, 34) == (33, 34)
    mapping = IDMapping(host_id=100_000, container_id=0, length=1000)
    mapped = PodSandboxConfig.model_validate(
        {
            "linux": {
                "security_context": {"namespace_options": {"userns_options": {"uids": [mapping], "gids": [mapping]}}}
            }
        }
    )
    assert id_mappings.on_the_node(mapped, 33, 999) == (100_033, 100_999)
    assert id_mappings.on_the_node(mapped, 1000, 5000) == (100_000, 100_000), "root, for ids without a mapping"
    assert id_mappings.root_of(mapped) == (100_000, 100_000)


def test_paths_of_the_zone_files_are_below_their_folder(tmp_path: Path) -> None:
    assert RuntimeSettings(timezone="America/Argentina/Buenos_Aires").timezone
    assert RuntimeSettings(timezone="local").timezone == "local"
    assert RuntimeSettings(timezone="Etc/GMT+1").timezone

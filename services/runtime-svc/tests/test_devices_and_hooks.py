"""CDI files and OCI hooks: what they change in the OCI configuration, and errors in them."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from crisp_proto.config import Device
from runtime_svc.spec import cdi, devices, hooks, oci
from runtime_svc.spec.cdi import Registry
from runtime_svc.spec.devices import Requested
from servicekit.errors import FailedPrecondition, InvalidArgument

Document = dict[str, Any]


def document() -> oci.Spec:
    return {
        "ociVersion": oci.VERSION,
        "process": {
            "env": ["A=1", "B=2"],
            "user": {"uid": 0, "gid": 0, "additionalGids": [5]},
            "args": ["/bin/app"],
            "cwd": "/",
        },
        "root": {"path": "/none"},
        "mounts": [{"destination": "/data", "source": "/old", "type": "bind", "options": []}],
        "linux": {"namespaces": [], "cgroupsPath": "", "devices": [], "resources": {"devices": []}},
    }


def spec(folder: Path, name: str, device: str = "one", **edits: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    content = {
        "cdiVersion": "0.7.0",
        "kind": "vendor.com/device",
        "containerEdits": {"env": ["COMMON=yes"]},
        "devices": [{"name": device, "containerEdits": edits or {"env": [f"NAME={name}"]}}],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_device_changes_environment_nodes_mounts_hooks_and_groups(tmp_path: Path) -> None:
    spec(
        tmp_path / "etc",
        "vendor.json",
        env=["B=3"],
        deviceNodes=[{"path": "/dev/mine", "hostPath": "/dev/null", "permissions": "rw"}],
        mounts=[{"hostPath": "/lib/driver", "containerPath": "/data"}],
        hooks=[{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook"]}],
        additionalGids=[7, 0],
    )
    made = document()
    cdi.apply(made, Registry([tmp_path / "etc"]).edits(["vendor.com/device=one"]))
    assert sorted(made["process"]["env"]) == ["A=1", "B=3", "COMMON=yes"]
    assert (made["linux"]["devices"][0]["path"], made["linux"]["devices"][0]["type"]) == ("/dev/mine", "c")
    null = os.stat("/dev/null").st_rdev
    rule = {"allow": True, "type": "c", "major": os.major(null), "minor": os.minor(null), "access": "rw"}
    assert made["linux"]["resources"]["devices"] == [rule]
    assert [mount["source"] for mount in made["mounts"]] == ["/lib/driver"]
    assert made["hooks"] == {"createContainer": [{"path": "/bin/hook", "args": ["hook"]}]}
    assert made["process"]["user"]["additionalGids"] == [5, 7]


def test_a_later_folder_wins_and_two_files_of_one_folder_conflict(tmp_path: Path) -> None:
    spec(tmp_path / "etc", "a.json")
    spec(tmp_path / "run", "b.json")
    registry = Registry([tmp_path / "etc", tmp_path / "run"])
    assert registry.edits(["vendor.com/device=one"])[-1] == {"env": ["NAME=b.json"]}
    spec(tmp_path / "run", "c.json")
    with pytest.raises(InvalidArgument, match="both"):
        registry.edits(["vendor.com/device=one"])


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    registry = Registry([tmp_path / "cdi"])
    with pytest.raises(InvalidArgument, match="in no file"):
        registry.edits(["vendor.com/device=one"])
    path = spec(tmp_path / "cdi", "a.json")
    assert registry.edits(["vendor.com/device=one"])
    path.unlink()
    with pytest.raises(InvalidArgument, match="in no file"):
        registry.edits(["vendor.com/device=one"])


def test_yaml_is_read_too_and_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "cdiVersion: '1.0.0'\nkind: v.com/c\ndevices:\n- name: d\n  containerEdits:\n    env: [FROM=yaml]\n"
    )
    (tmp_path / "broken.json").write_text('{"cdiVersion": "0.5.0"}')
    registry = Registry([tmp_path])
    assert registry.edits(["v.com/c=d"]) == [{"env": ["FROM=yaml"]}]
    with pytest.raises(InvalidArgument, match=r"broken\.json: 'kind' is missing"):
        registry.edits(["v.com/c=other"])


@pytest.mark.parametrize(
    ("edits", "fault"),
    [
        ({"deviceNodes": [{"path": "/dev/a"}, {"hostPath": "/dev/null"}]}, r"deviceNodes\[1\]\.path is missing"),
        ({"mounts": [{"containerPath": "/x"}]}, r"mounts\[0\]\.hostPath is missing"),
        ({"hooks": [{"hookName": "createContainer"}]}, r"hooks\[0\]\.path is missing"),
        ({"hooks": [{"hookName": "before", "path": "/x"}]}, "hookName = 'before'"),
        ({"mounts": ["/x"]}, "'str' object has no attribute"),
    ],
)
def test_edits_that_lack_something_are_named(tmp_path: Path, edits: Document, fault: str) -> None:
    spec(tmp_path / "etc", "bad.json", **edits)
    with pytest.raises(InvalidArgument, match=rf"bad\.json: .*{fault}"):
        Registry([tmp_path / "etc"]).edits(["vendor.com/device=one"])


def test_a_device_that_goes_while_its_folder_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on every hotplug: a privileged container gets all of /dev."""
    scandir = os.scandir

    def scanned(folder: Path) -> Any:
        found = list(scandir(folder))
        (tmp_path / "dev/gone").unlink(missing_ok=True)
        if (tmp_path / "dev/folder").exists():
            (tmp_path / "dev/folder").rmdir()
        return contextlib.nullcontext(found)

    (tmp_path / "dev/folder").mkdir(parents=True)
    (tmp_path / "dev/gone").touch()
    monkeypatch.setattr(os, "scandir", scanned)
    found = devices.plan([Requested(Device(host_path=str(tmp_path / "dev")), "devices[0].host_path")], privileged=False)
    assert (found.nodes, [rule for rule in found.rules if rule["allow"]]) == ([], [])


def test_devices_come_from_the_field_and_from_annotations() -> None:
    annotations = {"cdi.k8s.io/plugin": "v/c=b, v/c=c", "other": "v/c=d"}
    assert cdi.requested(["v/c=a", "v/c=b"], annotations) == ["v/c=a", "v/c=b", "v/c=c"]


HOOK = {"version": "1.0.0", "hook": {"path": "/bin/hook"}, "when": {"always": True}, "stages": ["prestart"]}


def hook(folder: Path, name: str, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({**HOOK, **changes}))


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"always": True}, True),
        ({"always": False}, False),
        ({}, False),
        ({"commands": ["^/bin/a"]}, True),
        ({"commands": ["^/bin/b"]}, False),
        ({"annotations": {"^gpu$": "^(yes|all)$"}}, True),
        ({"annotations": {"^gpu$": "no"}}, False),
        ({"hasBindMounts": True}, True),
        ({"hasBindMounts": True, "commands": ["^/bin/b"]}, False),
    ],
)
def test_a_hook_is_added_when_all_its_conditions_hold(tmp_path: Path, when: Document, expected: bool) -> None:
    hook(tmp_path / "hooks", "a.json", when=when)
    made = document()
    hooks.add(made, [tmp_path / "hooks"], {"gpu": "yes"}, bind_mounts=True)
    assert ("hooks" in made) is expected


def test_a_later_folders_hook_replaces_one_of_the_same_name(tmp_path: Path) -> None:
    hook(tmp_path / "usr", "a.json")
    hook(tmp_path / "etc", "a.json", hook={"path": "/bin/other"}, stages=["poststop", "prestart"])
    made = document()
    hooks.add(made, [tmp_path / "usr", tmp_path / "etc", tmp_path / "none"], {}, bind_mounts=False)
    assert made["hooks"] == {"poststop": [{"path": "/bin/other"}], "prestart": [{"path": "/bin/other"}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "2"}, "version '2'"),
        ({"stages": ["never"]}, "stages"),
        ({"hook": {"path": "relative"}}, "absolute"),
        ({"hook": {}}, "'path' is missing"),
        ({"when": {"sometimes": True}}, "sometimes"),
        ({"when": {"commands": ["("]}}, "unterminated"),
    ],
)
def test_a_hook_file_that_cannot_be_used_keeps_containers_from_running(
    tmp_path: Path, changes: Document, said: str
) -> None:
    hook(tmp_path / "hooks", "bad.json", **changes)
    with pytest.raises(FailedPrecondition, match=said) as raised:
        hooks.add(document(), [tmp_path / "hooks"], {}, bind_mounts=False)
    assert "bad.json" in raised.value.message

"""CDI: devices that vendors describe in files, and that containers request by name.

Source: Container Device Interface, SPEC.md 1.0.

The folders are read again when a file in them has changed, so that what a device plugin writes
holds at once. A later folder has priority over an earlier one. A device that is twice in one folder
cannot be used.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from runtime_svc.spec import oci
from servicekit import logs
from servicekit.errors import InvalidArgument

Version = tuple[Path, int, int, int]
"""A file, its inode, when it was changed (ns), and its size."""
_ANNOTATION = "cdi.k8s.io/"
_KIND = re.compile(r"^[A-Za-z][A-Za-z0-9_.-]*/[A-Za-z][A-Za-z0-9_.-]*$")
_REQUIRED = {"deviceNodes": ("path",), "mounts": ("hostPath", "containerPath"), "hooks": ("hookName", "path")}
_FIELD = "CDI_devices"
_log = logs.get()


class DeviceNode(TypedDict):
    """A device node; what is absent is taken from the node's own device."""

    path: str
    hostPath: NotRequired[str]
    type: NotRequired[str]
    major: NotRequired[int]
    minor: NotRequired[int]
    fileMode: NotRequired[int]
    permissions: NotRequired[str]
    uid: NotRequired[int]
    gid: NotRequired[int]


class Mount(TypedDict):
    """A mount."""

    hostPath: str
    containerPath: str
    options: NotRequired[list[str]]
    type: NotRequired[str]


class Hook(oci.Hook):
    """An OCI hook and its stage."""

    hookName: str


class ContainerEdits(TypedDict, total=False):
    """What a device changes in an OCI configuration."""

    env: list[str]
    deviceNodes: list[DeviceNode]
    mounts: list[Mount]
    hooks: list[Hook]
    additionalGids: list[int]
    intelRdt: oci.IntelRdt


@dataclass(slots=True)
class _Device:
    """A device's own edits, and those that its file has for all its devices."""

    edits: list[ContainerEdits]
    origin: Path
    conflict: Path | None = None


@dataclass(slots=True)
class Registry:
    """All devices of the node, by vendor/class=name."""

    folders: Sequence[Path]
    _seen: tuple[Version, ...] | None = None
    _devices: dict[str, _Device] = field(default_factory=dict)
    _faults: dict[str, str] = field(default_factory=dict)

    def edits(self, names: Iterable[str]) -> list[ContainerEdits]:
        """Returns the containerEdits of these devices, with the common ones of a file only once.

        Raises InvalidArgument for a device that cannot be used.
        """
        self._refresh()
        found: list[ContainerEdits] = []
        for name in dict.fromkeys(names):
            device = self._devices.get(name)
            if device is None:
                raise self._unknown(name)
            if device.conflict is not None:
                raise InvalidArgument(
                    f"CDI device {name!r} is in both {device.origin} and {device.conflict}",
                    hint="remove it from one",
                    field=_FIELD,
                )
            found += [edit for edit in device.edits if not any(edit is other for other in found)]
        return found

    def _unknown(self, name: str) -> InvalidArgument:
        faults = "".join(f"; {path}: {fault}" for path, fault in self._faults.items())
        folders = ", ".join(str(folder) for folder in self.folders)
        return InvalidArgument(f"CDI device {name!r} is in no file of {folders}{faults}", field=_FIELD)

    def _refresh(self) -> None:
        seen = tuple(self._files())
        if seen == self._seen:
            return
        self._devices, self._faults = {}, {}
        for path, *_ in seen:
            try:
                self._load(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                fault = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                self._faults[str(path)] = fault
                _log.error("cdi-file-skipped", path=str(path), error=fault)
        self._seen = seen

    def _files(self) -> Iterator[Version]:
        for folder in self.folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".yaml")):
                    with contextlib.suppress(FileNotFoundError):  # the temporary name of a file that was renamed
                        status = path.stat()
                        if stat.S_ISREG(status.st_mode):
                            yield path, status.st_ino, status.st_mtime_ns, status.st_size

    def _load(self, path: Path) -> None:
        document = _parse(path)
        if not str(document["cdiVersion"]).startswith(("0.", "1.")):
            raise ValueError(f"cdiVersion {document['cdiVersion']} is not known")
        kind = str(document["kind"])
        if not _KIND.match(kind):
            raise ValueError(f"kind = {kind!r} is not vendor/class")
        common = document.get("containerEdits") or {}
        for entry in document["devices"]:
            name = f"{kind}={entry['name']}"
            device = _Device([_checked(edits) for edits in (common, entry["containerEdits"]) if edits], path)
            known = self._devices.get(name)
            if known is not None and known.origin.parent == path.parent:
                known.conflict = path
            else:
                self._devices[name] = device


def _checked(edits: dict[str, Any]) -> ContainerEdits:
    """Raises ValueError for edits that lack what the specification requires."""
    for kind, keys in _REQUIRED.items():
        for number, entry in enumerate(edits.get(kind) or ()):
            for key in keys:
                if not entry.get(key):
                    raise ValueError(f"{kind}[{number}].{key} is missing")
    for hook in edits.get("hooks") or ():
        if hook["hookName"] not in oci.STAGES:
            raise ValueError(f"hookName = {hook['hookName']!r}: of {', '.join(sorted(oci.STAGES))}")
    return cast("ContainerEdits", edits)


def _parse(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        parsed = json.loads(path.read_text())
    else:
        import yaml  # only where a vendor writes YAML: it takes 2 MB

        try:
            parsed = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    if not isinstance(parsed, dict):
        raise ValueError("the file holds no object")
    return parsed


def requested(devices: Iterable[str], annotations: dict[str, str]) -> list[str]:
    """Returns the names of all devices that a container requests.

    They are in CDI_devices, and in annotations that device plugins for older kubelets write.
    """
    by_annotation = [
        name.strip()
        for key in sorted(annotations)
        if key.startswith(_ANNOTATION)
        for name in annotations[key].split(",")
    ]
    return list(dict.fromkeys([*devices, *(name for name in by_annotation if name)]))


def apply(spec: oci.Spec, edits: Sequence[ContainerEdits]) -> None:
    """Changes an OCI configuration as the edits say.

    Raises InvalidArgument for a device node that this machine lacks.
    """
    for edit in edits:
        _set_environment(spec["process"], edit.get("env") or [])
        for node in edit.get("deviceNodes") or ():
            _add_device(spec["linux"], node)
        for mount in edit.get("mounts") or ():
            _add_mount(spec, mount)
        for hook in edit.get("hooks") or ():
            finished = cast("oci.Hook", {key: value for key, value in hook.items() if key != "hookName"})
            spec.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(finished)
        groups = spec["process"]["user"].setdefault("additionalGids", [])
        groups += [gid for gid in edit.get("additionalGids") or () if gid and gid not in groups]
        if rdt := edit.get("intelRdt"):
            spec["linux"]["intelRdt"] = rdt


def _set_environment(process: oci.Process, variables: Sequence[str]) -> None:
    names = {entry.partition("=")[0] for entry in variables}
    kept = [entry for entry in process.get("env", []) if entry.partition("=")[0] not in names]
    process["env"] = [*kept, *variables]


def _add_device(linux: oci.Linux, node: DeviceNode) -> None:
    device = _device(node)
    linux["devices"] = [other for other in linux.get("devices", []) if other["path"] != device["path"]] + [device]
    if device["type"] == "p":  # the device cgroup knows no FIFOs
        return
    rules = linux.setdefault("resources", {}).setdefault("devices", [])
    rules.append(
        {
            "allow": True,
            "type": device["type"],
            "major": device["major"],
            "minor": device["minor"],
            "access": node.get("permissions") or "rwm",
        }
    )


def _add_mount(spec: oci.Spec, mount: Mount) -> None:
    added: oci.Mount = {
        "destination": mount["containerPath"],
        "source": mount["hostPath"],
        "type": mount.get("type") or "bind",
        "options": mount.get("options") or ["ro", "nosuid", "nodev", "rbind"],
    }
    spec["mounts"] = [other for other in spec["mounts"] if other["destination"] != added["destination"]] + [added]


def _device(node: DeviceNode) -> oci.Device:
    """Completes a device node by what the node's own device is."""
    device: dict[str, Any] = {key: node.get(key) for key in ("path", "type", "major", "minor")}
    if not device["type"] or (device["type"] != "p" and None in (device["major"], device["minor"])):
        device |= _status(node.get("hostPath") or node["path"])
    device |= {key: node.get(key) for key in ("fileMode", "uid", "gid") if node.get(key) is not None}
    return cast("oci.Device", {key: value for key, value in device.items() if value is not None})


def _status(host: str) -> dict[str, Any]:
    try:
        status = os.stat(host)
    except OSError as error:
        raise InvalidArgument(f"CDI device node {host}: {error.strerror}", field=_FIELD) from error
    kinds = ((stat.S_ISCHR, "c"), (stat.S_ISBLK, "b"), (stat.S_ISFIFO, "p"))
    kind = next((kind for test, kind in kinds if test(status.st_mode)), None)
    if kind is None:
        raise InvalidArgument(f"CDI device node {host} is not a device", field=_FIELD)
    return {
        "type": kind,
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode),
    }

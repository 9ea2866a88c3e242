"""CDI: devices that vendors describe in files, asked for by name (Container Device Interface, SPEC.md 1.0).

The folders are read anew when a file in them has changed, so that what a device plugin writes holds at once. A later folder has
priority over an earlier one; the same device twice in one folder can't be used.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servicekit import logs
from servicekit.errors import InvalidArgument

Document = dict[str, Any]
Version = tuple[Path, int, int, int]
"""A file, its inode, when it was changed (ns), and its size."""
_ANNOTATION = "cdi.k8s.io/"
_KIND = re.compile(r"^[A-Za-z][A-Za-z0-9_.-]*/[A-Za-z][A-Za-z0-9_.-]*$")
_REQUIRED = {"deviceNodes": ("path",), "mounts": ("hostPath", "containerPath"), "hooks": ("hookName", "path")}
_STAGES = {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}
_log = logs.get()


@dataclass(slots=True)
class _Device:
    """A device's own edits, and those that its file has for all its devices."""

    edits: list[Document]
    origin: Path
    conflict: Path | None = None


@dataclass(slots=True)
class Registry:
    """All devices of the node, by vendor/class=name."""

    folders: Sequence[Path]
    _seen: tuple[Version, ...] | None = None
    _devices: dict[str, _Device] = field(default_factory=dict)
    _faults: dict[str, str] = field(default_factory=dict)

    def edits(self, names: Iterable[str]) -> list[Document]:
        """The containerEdits of these devices, each file's common ones once. Raises InvalidArgument for a device that can't be used."""
        self._refresh()
        found: list[Document] = []
        for name in dict.fromkeys(names):
            device = self._devices.get(name)
            if device is None:
                faults = "".join(f"; {path}: {fault}" for path, fault in self._faults.items())
                folders = ", ".join(str(folder) for folder in self.folders)
                raise InvalidArgument(f"CDI device {name!r} is in no file of {folders}{faults}", field="CDI_devices")
            if device.conflict is not None:
                raise InvalidArgument(
                    f"CDI device {name!r} is in both {device.origin} and {device.conflict}; remove it from one",
                    field="CDI_devices",
                )
            found += [edit for edit in device.edits if not any(edit is other for other in found)]
        return found

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
                    with contextlib.suppress(FileNotFoundError):  # who replaces a file renames another one over it
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


def _checked(edits: Document) -> Document:
    """Raises ValueError for edits that lack what the specification requires."""
    for kind, keys in _REQUIRED.items():
        for number, entry in enumerate(edits.get(kind) or ()):
            for key in keys:
                if not entry.get(key):
                    raise ValueError(f"{kind}[{number}].{key} is missing")
    for hook in edits.get("hooks") or ():
        if hook["hookName"] not in _STAGES:
            raise ValueError(f"hookName = {hook['hookName']!r}: of {', '.join(sorted(_STAGES))}")
    return edits


def requested(devices: Iterable[str], annotations: dict[str, str]) -> list[str]:
    """All devices that a container asks for: in CDI_devices, and in annotations as device plugins for older kubelets do."""
    by_annotation = [
        name.strip()
        for key in sorted(annotations)
        if key.startswith(_ANNOTATION)
        for name in annotations[key].split(",")
    ]
    return list(dict.fromkeys([*devices, *(name for name in by_annotation if name)]))


def apply(document: Document, edits: Sequence[Document]) -> None:
    """Changes an OCI document as containerEdits say. Raises InvalidArgument for a device node that this machine lacks."""
    process, linux = document["process"], document["linux"]
    for edit in edits:
        names = {entry.partition("=")[0] for entry in edit.get("env") or ()}
        process["env"] = [entry for entry in process["env"] if entry.partition("=")[0] not in names] + list(
            edit.get("env") or ()
        )
        for node in edit.get("deviceNodes") or ():
            device = _device(node)
            linux["devices"] = [other for other in linux["devices"] if other["path"] != device["path"]] + [device]
            if device["type"] != "p":
                rule: Document = {key: device[key] for key in ("type", "major", "minor")}
                linux["resources"]["devices"].append(
                    {"allow": True, **rule, "access": node.get("permissions") or "rwm"}
                )
        for mount in edit.get("mounts") or ():
            options = mount.get("options") or ["ro", "nosuid", "nodev", "rbind"]
            entry: Document = {
                "destination": mount["containerPath"],
                "source": mount["hostPath"],
                "type": mount.get("type") or "bind",
                "options": options,
            }
            document["mounts"] = [
                other for other in document["mounts"] if other["destination"] != mount["containerPath"]
            ] + [entry]
        for hook in edit.get("hooks") or ():
            finished = {key: value for key, value in hook.items() if key != "hookName"}
            document.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(finished)
        groups = process["user"]["additionalGids"]
        groups += [gid for gid in edit.get("additionalGids") or () if gid and gid not in groups]
        if edit.get("intelRdt"):
            linux["intelRdt"] = edit["intelRdt"]


def _device(node: Document) -> Document:
    path, host = node["path"], node.get("hostPath") or node["path"]
    device: Document = {
        "path": path,
        "type": node.get("type", ""),
        "major": node.get("major"),
        "minor": node.get("minor"),
    }
    if not device["type"] or (device["type"] != "p" and (device["major"] is None or device["minor"] is None)):
        try:
            status = os.stat(host)
        except OSError as error:
            raise InvalidArgument(f"CDI device node {host}: {error.strerror}", field="CDI_devices") from error
        kinds = ((stat.S_ISCHR, "c"), (stat.S_ISBLK, "b"), (stat.S_ISFIFO, "p"))
        device["type"] = next((kind for test, kind in kinds if test(status.st_mode)), "")
        if not device["type"]:
            raise InvalidArgument(f"CDI device node {host} is not a device", field="CDI_devices")
        device.update(major=os.major(status.st_rdev), minor=os.minor(status.st_rdev))
        device.setdefault("fileMode", stat.S_IMODE(status.st_mode))
    device |= {key: node[key] for key in ("fileMode", "uid", "gid") if node.get(key) is not None}
    return {key: value for key, value in device.items() if value is not None}


def _parse(path: Path) -> Document:
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

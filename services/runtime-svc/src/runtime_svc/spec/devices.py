"""A container's device nodes and what the device cgroup allows (OCI runtime spec, config-linux.md: devices)."""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp_proto.config import Device
from servicekit.errors import InvalidArgument

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Nodes to make, and rules for the device cgroup in order."""

    nodes: list[Document]
    rules: list[Document]


def plan(devices: Sequence[Device], *, privileged: bool, all_devices: bool = True) -> DevicePlan:
    """What the request asks for; all the node's devices for a privileged container, unless its handler says no. Raises InvalidArgument."""
    nodes: dict[str, Document] = {}
    rules: list[Document] = [{"allow": privileged, "access": "rwm"}]
    if privileged and all_devices:
        for path in _below(
            Path("/dev"),
            skip=("pts", "shm", "mqueue", "fd", "console", "ptmx", "null", "zero", "full", "random", "urandom", "tty"),
        ):
            nodes[str(path)] = _node(path, str(path))
    for number, device in enumerate(devices):
        field = f"devices[{number}]"
        access = device.permissions or "rwm"
        if set(access) - set("rwm"):
            raise InvalidArgument(
                f"{field}.permissions = {device.permissions!r}: of r, w and m only", field=f"{field}.permissions"
            )
        source = Path(os.path.realpath(device.host_path))
        if not device.host_path.startswith("/") or not source.exists():
            raise InvalidArgument(
                f"{field}.host_path = {device.host_path!r}: no such device on this node", field=f"{field}.host_path"
            )
        found = list(_below(source)) if source.is_dir() else [source]
        for path in found:
            inside = os.path.normpath(f"/{device.container_path or device.host_path}/{path.relative_to(source)}")
            node = _node(path, inside)
            if node:
                nodes[inside] = node
                rules.append(
                    {
                        "allow": True,
                        "type": node["type"],
                        "major": node["major"],
                        "minor": node["minor"],
                        "access": access,
                    }
                )
            elif path == source:
                raise InvalidArgument(
                    f"{field}.host_path = {device.host_path!r} is not a device", field=f"{field}.host_path"
                )
    return DevicePlan([node for node in nodes.values() if node], rules)


def _below(folder: Path, skip: Sequence[str] = ()) -> Iterator[Path]:
    """All files in a folder and below it, without those that links lead to."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.name in skip or entry.is_symlink():
                continue
            if entry.is_dir():
                yield from _below(Path(entry.path))
            else:
                yield Path(entry.path)


def _node(path: Path, inside: str) -> Document:
    """Empty for what is no device, or has gone: /dev changes at any time."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}
    kind = "c" if stat.S_ISCHR(status.st_mode) else "b" if stat.S_ISBLK(status.st_mode) else ""
    if not kind:
        return {}
    return {
        "path": inside,
        "type": kind,
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
    }

"""A container's device nodes, and the rules of its device cgroup.

Source: OCI runtime spec, config-linux.md, devices.
"""

import contextlib
import os
import stat
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import Device
from runtime_svc.spec import oci
from servicekit.errors import InvalidArgument

# The OCI runtime makes these itself, or other mounts cover them.
_NEVER_FROM_THE_NODE = frozenset(
    {"pts", "shm", "mqueue", "fd", "console", "ptmx", "null", "zero", "full", "random", "urandom", "tty"}
)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The nodes to make, and the rules for the device cgroup in order."""

    nodes: list[oci.Device]
    rules: list[oci.DeviceRule]


def plan(devices: Sequence[Device], *, privileged: bool, all_devices: bool = True) -> DevicePlan:
    """Returns the requested devices, and all devices of the node for a privileged container.

    A handler can keep the node's devices from its privileged containers (`all_devices` is False).
    Raises InvalidArgument.
    """
    nodes: dict[str, oci.Device] = {}
    rules: list[oci.DeviceRule] = [{"allow": privileged, "access": "rwm"}]
    if privileged and all_devices:
        for path in _files(Path("/dev"), skip=_NEVER_FROM_THE_NODE):
            if (node := _node(path, str(path))) is not None:
                nodes[str(path)] = node
    for number, device in enumerate(devices):
        for node in _requested(f"devices[{number}]", device):
            nodes[node["path"]] = node
            rules.append(
                {
                    "allow": True,
                    "type": node["type"],
                    "major": node["major"],
                    "minor": node["minor"],
                    "access": device.permissions or "rwm",
                }
            )
    return DevicePlan(list(nodes.values()), rules)


def _requested(field: str, device: Device) -> Iterator[oci.Device]:
    """Yields the node of a requested device, or the nodes in a requested folder."""
    if set(device.permissions) - set("rwm"):
        raise InvalidArgument(
            f"{field}.permissions = {device.permissions!r}: of r, w and m only", field=f"{field}.permissions"
        )
    source = Path(os.path.realpath(device.host_path))
    if not device.host_path.startswith("/") or not source.exists():
        raise InvalidArgument(
            f"{field}.host_path = {device.host_path!r}: no such device on this node", field=f"{field}.host_path"
        )
    for path in _files(source) if source.is_dir() else [source]:
        inside = os.path.normpath(f"/{device.container_path or device.host_path}/{path.relative_to(source)}")
        node = _node(path, inside)
        if node is not None:
            yield node
        elif path == source:
            raise InvalidArgument(
                f"{field}.host_path = {device.host_path!r} is not a device", field=f"{field}.host_path"
            )


def _files(root: Path, skip: Container[str] = ()) -> Iterator[Path]:
    """Yields all files below a folder, apart from those in `skip` at its top.

    Follows no links, and leaves out what disappears meanwhile.
    """
    pending = [root]
    while pending:
        folder = pending.pop()
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in list(entries):
                if entry.is_symlink() or (folder == root and entry.name in skip):
                    continue
                if entry.is_dir():
                    pending.append(Path(entry.path))
                else:
                    yield Path(entry.path)


def _node(path: Path, inside: str) -> oci.Device | None:
    """Describes a device; None if the file is no device, or has gone: /dev changes at any time."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISCHR(status.st_mode):
        kind = "c"
    elif stat.S_ISBLK(status.st_mode):
        kind = "b"
    else:
        return None
    return {
        "path": inside,
        "type": kind,
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
    }

"""A container's device nodes, and the rules of its device cgroup.

Source: OCI runtime spec, config-linux.md, devices.
"""

import contextlib
import os
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import Device
from runtime_svc.settings import RuntimeSettings
from runtime_svc.spec import oci
from servicekit.errors import CrispError, FailedPrecondition, InvalidArgument

ANNOTATION = "io.kubernetes.cri-o.Devices"
"""CRI-O's annotation, of a pod or a container, with devices that it wants."""

# The OCI runtime makes these itself, or other mounts cover them.
_NEVER_FROM_THE_NODE = frozenset(
    {"pts", "shm", "mqueue", "fd", "console", "ptmx", "null", "zero", "full", "random", "urandom", "tty"}
)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The nodes to make, and the rules for the device cgroup in order."""

    nodes: list[oci.Device]
    rules: list[oci.DeviceRule]


@dataclass(frozen=True, slots=True)
class Requested:
    """A device, and where its path on the node is given: a field, an annotation or a setting."""

    device: Device
    field: str
    of_node: bool = False

    def refused(self, why: str) -> CrispError:
        """Returns the error for a device that this node does not have."""
        kind = FailedPrecondition if self.of_node else InvalidArgument  # the request is not to blame
        return kind(f"{self.field} = {self.device.host_path[:200]!r}: {why}", field=self.field)


def requested(devices: Sequence[Device], annotations: Mapping[str, str], settings: RuntimeSettings) -> list[Requested]:
    """Returns the node's additional devices, those of the annotation, and those of the request.

    Of two with one path in the container the later counts. The annotation is ignored unless
    runtime.allowed_devices lists some devices. Raises InvalidArgument for a device that is not
    among them, and for wrong permissions.
    """
    own = [Requested(_parse(text), "runtime.additional_devices", of_node=True) for text in settings.additional_devices]
    named = [Requested(device, f"devices[{number}].host_path") for number, device in enumerate(devices)]
    for number, device in enumerate(devices):
        if set(device.permissions) - set("rwm"):
            field = f"devices[{number}].permissions"
            raise InvalidArgument(f"{field} = {device.permissions[:200]!r}: of r, w and m only", field=field)
    return [*own, *_of_annotation(annotations.get(ANNOTATION, ""), settings.allowed_devices), *named]


def _of_annotation(text: str, allowed: Sequence[str]) -> Iterator[Requested]:
    field = f"annotations[{ANNOTATION}]"
    if not allowed:
        return
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        device = _parse(entry)
        if os.path.normpath(device.host_path) not in {os.path.normpath(path) for path in allowed}:
            raise InvalidArgument(
                f"{field}: {device.host_path[:200]!r} is not allowed on this node",
                hint=f"runtime.allowed_devices has: {', '.join(allowed)}",
                field=field,
            )
        yield Requested(device, field)


def _parse(text: str) -> Device:
    """Parses HOST[:CONTAINER][:PERMISSIONS], as CRI-O writes devices."""
    host, *rest = text.split(":")
    permissions = rest.pop() if rest and rest[-1] and set(rest[-1]) <= set("rwm") else ""
    return Device(host_path=host, container_path=":".join(rest), permissions=permissions)


def plan(devices: Sequence[Requested], *, privileged: bool, all_devices: bool = True) -> DevicePlan:
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
    for asked in devices:
        device = asked.device
        for node in _nodes(asked):
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


def _nodes(asked: Requested) -> Iterator[oci.Device]:
    """Yields the node of a requested device, or the nodes in a requested folder."""
    device = asked.device
    source = Path(os.path.realpath(device.host_path))
    if not device.host_path.startswith("/") or not source.exists():
        raise asked.refused("no such device on this node")
    for path in _files(source) if source.is_dir() else [source]:
        inside = _absolute(f"{device.container_path or device.host_path}/{path.relative_to(source)}")
        node = _node(path, inside)
        if node is not None:
            yield node
        elif path == source:
            raise asked.refused("not a device")


def _absolute(path: str) -> str:
    """Returns a normal path from the root; normpath keeps two slashes at the beginning (POSIX)."""
    return os.path.normpath(f"/{path.lstrip('/')}")


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

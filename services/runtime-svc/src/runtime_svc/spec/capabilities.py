"""Linux capabilities of a container (capabilities(7))."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from runtime_svc.settings import DEFAULT_CAPABILITIES
from runtime_svc.spec import oci
from servicekit import logs
from servicekit.errors import InvalidArgument

NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()  # in the order of their numbers
ALL = tuple(f"CAP_{name}" for name in NAMES)
DEFAULT = frozenset(f"CAP_{name}" for name in DEFAULT_CAPABILITIES)
_FIELD = "linux.security_context.capabilities"
_log = logs.get()


@cache
def held() -> frozenset[str]:
    """Returns the capabilities that this process can pass on: those of its bounding set."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            bits = int(line.split()[1], 16)
            return frozenset(name for number, name in enumerate(ALL) if bits >> number & 1)
    return frozenset(ALL)


def configured(names: Iterable[str]) -> frozenset[str]:
    """Returns the node's default set (runtime.default_capabilities).

    Raises InvalidArgument for an unknown name.
    """
    return _parsed_setting(tuple(names))


@cache
def _parsed_setting(names: tuple[str, ...]) -> frozenset[str]:
    field = "runtime.default_capabilities"
    parsed = _parse(names, field)
    return frozenset(ALL) if "ALL" in parsed else parsed


def wanted(
    add: Iterable[str], drop: Iterable[str], *, privileged: bool, default: frozenset[str] = DEFAULT
) -> frozenset[str]:
    """Returns a container's capabilities: the default set with the requested changes.

    Raises InvalidArgument for an unknown name.
    """
    added, dropped = _parse(add, f"{_FIELD}.add_capabilities"), _parse(drop, f"{_FIELD}.drop_capabilities")
    if privileged:
        return _clamped(frozenset(ALL))
    if "ALL" in added:
        start = frozenset(ALL)
    elif "ALL" in dropped:
        start = frozenset()
    else:
        start = default
    return _clamped((start - (dropped - added)) | (added - {"ALL"}))


def ambient(names: Iterable[str]) -> frozenset[str]:
    """Returns the requested ambient capabilities. Raises InvalidArgument for an unknown name."""
    parsed = _parse(names, f"{_FIELD}.add_ambient_capabilities")
    return _clamped(frozenset(ALL) if "ALL" in parsed else parsed)


def to_oci(granted: frozenset[str], ambient: frozenset[str]) -> oci.Capabilities:
    """Returns process.capabilities; ambient ones are in every set."""
    names, inherited = in_order(granted | ambient), in_order(ambient)
    return {
        "bounding": names,
        "effective": names,
        "permitted": names,
        "inheritable": inherited,
        "ambient": inherited,
    }


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts capabilities by their numbers, so that equal sets look equal."""
    chosen = set(names)
    return [name for name in ALL if name in chosen]


def _parse(names: Iterable[str], field: str) -> frozenset[str]:
    parsed = set()
    for name in names:
        upper = name.upper()
        full = upper if upper == "ALL" or upper.startswith("CAP_") else f"CAP_{upper}"
        if full != "ALL" and full not in ALL:
            raise InvalidArgument(
                f"{field}: capability {name!r} is unknown",
                hint="see capabilities(7)",
                field=field,
            )
        parsed.add(full)
    return frozenset(parsed)


def _clamped(names: frozenset[str]) -> frozenset[str]:
    missing = names - held()
    if missing:
        _warn_once(", ".join(in_order(missing)))
    return names & held()


@cache
def _warn_once(missing: str) -> None:
    _log.warning(
        "capabilities-clamped",
        missing=missing,
        consequence="this machine does not grant them to crisp, so containers run without them",
    )

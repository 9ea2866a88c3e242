"""Limits as properties of systemd's units (systemd.resource-control(5))."""

from collections.abc import Mapping

from dbus_fast import Variant

from crisp_proto.config import LinuxContainerResources
from runtime_svc.cgroups.files import DEFAULT_PERIOD_US
from runtime_svc.cgroups.limits import NUMBERS, NUMBERS_RULE
from runtime_svc.cgroups.v2 import cpu_and_memory_files
from servicekit.errors import InvalidArgument

Properties = Mapping[str, Variant]
_INFINITY = (1 << 64) - 1  # systemd's "no limit" on D-Bus
_NUMBERS = {
    "cpu.weight": "CPUWeight",
    "memory.min": "MemoryMin",
    "memory.low": "MemoryLow",
    "memory.high": "MemoryHigh",
    "memory.max": "MemoryMax",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
}
_SETS = {"cpuset.cpus": "AllowedCPUs", "cpuset.mems": "AllowedMemoryNodes"}
FILES = {*_NUMBERS, *_SETS, "cpu.max"}
"""The files that systemd writes; it would overwrite what anybody else writes into them."""


def of_slice(limits: LinuxContainerResources) -> Properties:
    """Returns the limits that systemd has properties for; `unified` wins over the others.

    Raises InvalidArgument for a value of `unified` that systemd cannot express.
    """
    found: dict[str, Variant] = {}
    for _, name, value in cpu_and_memory_files(limits):
        found |= _properties(name, value)
    for name, value in limits.unified.items():
        try:
            found |= _properties(name, value)
        except ValueError as error:
            raise InvalidArgument(
                f"linux.resources.unified[{name}] = {value!r}: {error}", field="linux.resources.unified"
            ) from error
    return found


def of_scope(limits: LinuxContainerResources, pids: int) -> Properties:
    """Returns a container's limits, with its own number of tasks instead of systemd's default.

    `pids` is 0 for no limit. Raises InvalidArgument as `of_slice` does.
    """
    return {"TasksMax": Variant("t", pids or _INFINITY), **of_slice(limits)}


def _properties(name: str, value: str) -> dict[str, Variant]:
    """Translates a file of version 2; returns nothing if systemd has no property for it.

    Raises ValueError.
    """
    if name in _NUMBERS:
        return {_NUMBERS[name]: Variant("t", _INFINITY if value == "max" else int(value))}
    if name in _SETS:
        return {_SETS[name]: Variant("ay", _mask(value))}
    if name == "cpu.max":
        quota, _, period = value.partition(" ")
        microseconds = int(period or DEFAULT_PERIOD_US)
        per_second = _INFINITY if quota == "max" else int(quota) * 1_000_000 // microseconds
        return {"CPUQuotaPerSecUSec": Variant("t", per_second), "CPUQuotaPeriodUSec": Variant("t", microseconds)}
    return {}


def _mask(numbers: str) -> bytes:
    """Converts `0,2-3` to a bit mask, lowest bit and byte first. Raises ValueError."""
    if not NUMBERS.match(numbers):
        raise ValueError(NUMBERS_RULE)
    mask = 0
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            mask |= 1 << number
    return mask.to_bytes(mask.bit_length() // 8 + 1, "little")

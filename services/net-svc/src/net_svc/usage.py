"""Interface counters of pods (proc_pid_net(5), /proc/PID/net/dev)."""

import time
from collections.abc import Mapping
from pathlib import Path

from crisp_proto.net import InterfaceUsage, NetworkUsage
from servicekit.linux import namespaces, syscalls


async def read(paths: Mapping[str, Path]) -> dict[str, NetworkUsage]:
    """Reads the counters of pods, in one thread that enters one namespace after the other.

    Pods whose namespace has just been removed are left out.
    """
    return await namespaces.in_own_thread(lambda: _read(paths))


def _read(paths: Mapping[str, Path]) -> dict[str, NetworkUsage]:
    usages = {}
    for pod_id, path in paths.items():
        try:
            namespaces.enter(path, syscalls.CLONE_NEWNET)
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
        except OSError:
            continue
        interfaces = [usage for usage in map(_interface, lines) if usage.name != "lo"]
        usages[pod_id] = NetworkUsage(timestamp=time.time_ns(), interfaces=interfaces)
    return usages


def _interface(line: str) -> InterfaceUsage:
    """Parses a line: the name, eight counters of received data, eight of transmitted data.

    Both groups begin with bytes, packets, errs and drop.
    """
    name, _, numbers = line.partition(":")
    fields = [int(number) for number in numbers.split()]
    return InterfaceUsage(
        name=name.strip(),
        rx_bytes=fields[0],
        rx_packets=fields[1],
        rx_errors=fields[2],
        rx_dropped=fields[3],
        tx_bytes=fields[8],
        tx_packets=fields[9],
        tx_errors=fields[10],
        tx_dropped=fields[11],
    )

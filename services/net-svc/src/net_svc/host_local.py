"""The IPAM of CNI's host-local plugin, with leases in our database instead of files (CNI plugins, host-local)."""

import ipaddress
from dataclasses import dataclass
from typing import Any

from net_svc.store import Store
from servicekit.errors import FailedPrecondition, ResourceExhausted

Document = dict[str, Any]
KEYS = {"type", "ranges", "routes", "subnet", "rangeStart", "rangeEnd", "gateway"}
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses that may be given out, both ends included."""

    subnet: Network
    first: Address
    last: Address
    gateway: Address


def understands(ipam: Document) -> bool:
    """Whether this configuration has only keys that we act on."""
    return ipam.get("type") == "host-local" and set(ipam) <= KEYS


def range_sets(ipam: Document, where: str) -> list[list[Range]]:
    """The sets of ranges; a pod gets one address of each set. Raises FailedPrecondition."""
    sets = list(ipam.get("ranges") or [])
    if ipam.get("subnet"):
        sets.insert(0, [{key: ipam[key] for key in ("subnet", "rangeStart", "rangeEnd", "gateway") if key in ipam}])
    try:
        parsed = [[_range(entry) for entry in entries] for entries in sets]
    except (KeyError, TypeError, ValueError) as error:
        raise FailedPrecondition(f"{where}: ipam ranges of host-local are wrong: {error}") from error
    if not parsed or not all(parsed):
        raise FailedPrecondition(f"{where}: ipam of host-local has no subnet")
    return parsed


def allocate(store: Store, network: str, ranges: list[Range], pod_id: str) -> tuple[Range, Address]:
    """A free address of the set, after the one that was given out last, so that one just freed is not used again at once."""
    for entry in ranges:
        lease = store.lease(network, str(entry.subnet), int(entry.first), int(entry.last), {int(entry.gateway)}, pod_id)
        if lease is not None:
            return entry, type(entry.first)(lease)
    described = ", ".join(f"{entry.first}-{entry.last}" for entry in ranges)
    raise ResourceExhausted(f"network {network} has no free address in {described}; remove pods or widen the range")


def _range(entry: Document) -> Range:
    subnet = ipaddress.ip_network(entry["subnet"], strict=False)
    if subnet.num_addresses < 4:
        raise ValueError(f"subnet {subnet} is too small")
    first = ipaddress.ip_address(entry["rangeStart"]) if entry.get("rangeStart") else subnet[1]
    last = (
        ipaddress.ip_address(entry["rangeEnd"])
        if entry.get("rangeEnd")
        else subnet[-2]
        if subnet.version == 4
        else subnet[-1]
    )
    gateway = ipaddress.ip_address(entry["gateway"]) if entry.get("gateway") else subnet[1]
    if first not in subnet or last not in subnet or int(first) > int(last):
        raise ValueError(f"range {first}-{last} is not inside {subnet}")
    return Range(subnet, first, last, gateway)

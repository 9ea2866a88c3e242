"""CNI's host-local plugin (IPAM), with leases in our database instead of files.

Source: CNI plugins, host-local.
"""

import ipaddress
from dataclasses import dataclass

from net_svc.cni import Document
from net_svc.store import Store
from servicekit.errors import FailedPrecondition, ResourceExhausted

_KEYS = {"type", "ranges", "routes", "subnet", "rangeStart", "rangeEnd", "gateway"}
_MIN_ADDRESSES = 4
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses that may be leased, both ends included."""

    subnet: Network
    first: Address
    last: Address
    gateway: Address


@dataclass(frozen=True, slots=True)
class Lease:
    """An address that a pod holds, and the range it comes from."""

    range: Range
    address: Address

    @property
    def with_prefix_length(self) -> str:
        """The address in CIDR notation."""
        return f"{self.address}/{self.range.subnet.prefixlen}"


def understands(ipam: object) -> bool:
    """Tells whether this configuration has only keys that we support."""
    return isinstance(ipam, dict) and ipam.get("type") == "host-local" and set(ipam) <= _KEYS


def range_sets(ipam: Document, where: str) -> list[list[Range]]:
    """Returns the sets of ranges; a pod gets one address of each set.

    Raises FailedPrecondition; `where` names the source in its message.
    """
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


def allocate(store: Store, network: str, ranges: list[Range], pod_id: str) -> Lease:
    """Leases a free address of a set. Raises ResourceExhausted.

    The search starts after the address that was leased last, so that a freed one is not reused at
    once.
    """
    for entry in ranges:
        number = store.lease(
            network, str(entry.subnet), int(entry.first), int(entry.last), {int(entry.gateway)}, pod_id
        )
        if number is not None:
            return Lease(entry, type(entry.first)(number))
    described = ", ".join(f"{entry.first}-{entry.last}" for entry in ranges)
    raise ResourceExhausted(
        f"network {network} has no free address in {described}", hint="remove pods or widen the range"
    )


def _range(entry: Document) -> Range:
    subnet = ipaddress.ip_network(entry["subnet"], strict=False)
    if subnet.num_addresses < _MIN_ADDRESSES:
        raise ValueError(f"subnet {subnet} is too small")
    first = ipaddress.ip_address(entry.get("rangeStart") or subnet[1])
    last = ipaddress.ip_address(entry.get("rangeEnd") or _last_host(subnet))
    gateway = ipaddress.ip_address(entry.get("gateway") or subnet[1])
    if first not in subnet or last not in subnet or int(first) > int(last):
        raise ValueError(f"range {first}-{last} is not inside {subnet}")
    return Range(subnet, first, last, gateway)


def _last_host(subnet: Network) -> Address:
    """Returns the last address of a subnet, in IPv4 before the broadcast address."""
    return subnet[-2] if subnet.version == 4 else subnet[-1]

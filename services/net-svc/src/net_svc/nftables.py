"""Our one nftables table: masquerade for pods, and host ports (nft(8)).

The table is always written whole, from the database, in one transaction: what it should be never depends on what it was, and
somebody's `nft flush ruleset` is repaired by the next look.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from servicekit.errors import Internal
from servicekit.linux.programs import run


@dataclass(frozen=True, slots=True)
class Masquerade:
    """A subnet whose pods reach the world under the node's address."""

    subnet: str
    bridge: str


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port of the node (at one address, or at all: empty) that leads to a port of a pod."""

    protocol: str
    host_ip: str
    host_port: int
    pod_ip: str
    pod_port: int


def render(table: str, masquerades: Sequence[Masquerade], ports: Sequence[HostPort]) -> str:
    """The script that makes the table what it should be."""
    if not masquerades and not ports:
        return f"add table inet {table}\ndelete table inet {table}\n"
    dnat, hairpin = [], []
    for port in ports:
        family = "ip6" if ":" in port.pod_ip else "ip"
        target = f"[{port.pod_ip}]:{port.pod_port}" if family == "ip6" else f"{port.pod_ip}:{port.pod_port}"
        where = (
            f"{family} daddr {port.host_ip} "
            if port.host_ip and not ipaddress.ip_address(port.host_ip).is_unspecified
            else f"meta nfproto {'ipv6' if family == 'ip6' else 'ipv4'} "
        )
        dnat.append(f"{where}{port.protocol} dport {port.host_port} dnat {family} to {target}")
        hairpin.append(f"{family} saddr {port.pod_ip} {family} daddr {port.pod_ip} masquerade")
    postrouting = []
    for entry in masquerades:
        family, multicast = ("ip6", "ff00::/8") if ":" in entry.subnet else ("ip", "224.0.0.0/4")
        postrouting.append(
            f"{family} saddr {entry.subnet} {family} daddr != {{ {entry.subnet}, {multicast} }} masquerade"
        )
        if family == "ip":
            postrouting.append(f'ip saddr 127.0.0.0/8 oifname "{entry.bridge}" masquerade')
    lines = [
        f"add table inet {table}",
        f"delete table inet {table}",
        f"table inet {table} {{",
        " chain hostports {",
        *(f"  {rule}" for rule in dict.fromkeys(dnat)),
        " }",
        " chain prerouting { type nat hook prerouting priority dstnat; policy accept; fib daddr type local jump hostports; }",
        " chain output { type nat hook output priority -100; policy accept; fib daddr type local jump hostports; }",
        " chain postrouting { type nat hook postrouting priority srcnat; policy accept;",
        *(f"  {rule}" for rule in dict.fromkeys([*hairpin, *postrouting])),
        " }",
        "}",
    ]
    return "\n".join(lines) + "\n"


async def apply(script: str) -> None:
    """Hands a script to nft."""
    finished = await run(["nft", "-f", "-"], deadline=20, stdin=script.encode())
    if finished.returncode != 0:
        raise Internal(
            f"nft refused our table: {finished.stderr.decode(errors='replace').strip()[:500]}; are the kernel's nf_tables and nft_nat modules there?"
        )


async def present(table: str) -> bool:
    """Whether the table exists."""
    return (await run(["nft", "list", "table", "inet", table], deadline=20)).returncode == 0

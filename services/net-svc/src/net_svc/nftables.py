"""Our only nftables table: masquerading for pods, and host ports (nft(8)).

The table is always written as a whole, from the database, in one transaction. So its content never
depends on what was there before, and the next check repairs somebody's `nft flush ruleset`.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from servicekit.errors import Internal
from servicekit.linux.programs import run

_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Masquerade:
    """A subnet whose pods reach the world under the node's address."""

    subnet: str
    bridge: str


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port of the node that leads to a port of a pod; `host_ip` is None for all addresses."""

    protocol: str
    host_ip: str | None
    host_port: int
    pod_ip: str
    pod_port: int


def render(table: str, masquerades: Sequence[Masquerade], ports: Sequence[HostPort]) -> str:
    """Returns the script that replaces the table."""
    if not masquerades and not ports:
        return f"add table inet {table}\ndelete table inet {table}\n"
    # When a pod connects to its own host port, masquerading makes the answer come back through the
    # node.
    hairpin = [
        f"{_family(port.pod_ip)} saddr {port.pod_ip} {_family(port.pod_ip)} daddr {port.pod_ip} masquerade"
        for port in ports
    ]
    postrouting = [rule for entry in masquerades for rule in _masquerade(entry)]
    lines = [
        f"add table inet {table}",
        f"delete table inet {table}",
        f"table inet {table} {{",
        " chain hostports {",
        *(f"  {rule}" for rule in dict.fromkeys(map(_dnat, ports))),
        " }",
        " chain prerouting { type nat hook prerouting priority dstnat; policy accept; fib daddr type local jump hostports; }",
        " chain output { type nat hook output priority -100; policy accept; fib daddr type local jump hostports; }",
        " chain postrouting { type nat hook postrouting priority srcnat; policy accept;",
        *(f"  {rule}" for rule in dict.fromkeys([*hairpin, *postrouting])),
        " }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _family(address: str) -> str:
    return "ip6" if ":" in address else "ip"


def _dnat(port: HostPort) -> str:
    family = _family(port.pod_ip)
    target = f"[{port.pod_ip}]:{port.pod_port}" if family == "ip6" else f"{port.pod_ip}:{port.pod_port}"
    if port.host_ip is None or ipaddress.ip_address(port.host_ip).is_unspecified:
        where = f"meta nfproto {'ipv6' if family == 'ip6' else 'ipv4'}"
    else:
        where = f"{family} daddr {port.host_ip}"
    return f"{where} {port.protocol} dport {port.host_port} dnat {family} to {target}"


def _masquerade(entry: Masquerade) -> list[str]:
    if _family(entry.subnet) == "ip6":
        return [f"ip6 saddr {entry.subnet} ip6 daddr != {{ {entry.subnet}, ff00::/8 }} masquerade"]
    return [
        f"ip saddr {entry.subnet} ip daddr != {{ {entry.subnet}, 224.0.0.0/4 }} masquerade",
        f'ip saddr 127.0.0.0/8 oifname "{entry.bridge}" masquerade',
    ]


async def apply(script: str) -> None:
    """Runs a script with nft. Raises Internal if nft refuses it."""
    finished = await run(["nft", "-f", "-"], deadline=_SECONDS, stdin=script.encode())
    if finished.returncode != 0:
        raise Internal(
            f"nft refused our table: {finished.stderr.decode(errors='replace').strip()[:500]}",
            hint="are the kernel's nf_tables and nft_nat modules there?",
        )


async def present(table: str) -> bool:
    """Tells whether the table exists."""
    return (await run(["nft", "list", "table", "inet", table], deadline=_SECONDS)).returncode == 0

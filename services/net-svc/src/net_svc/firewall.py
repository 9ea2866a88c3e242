"""What our nftables table should be, worked out from the attachments there are."""

import asyncio
import json
from collections.abc import Callable, Iterable

from crisp_proto.net import Attachment, AttachmentRequest
from net_svc import bridge, nftables
from net_svc.cni import NetworkConfiguration
from net_svc.nftables import HostPort, Masquerade
from net_svc.store import Row
from servicekit import logs
from servicekit.tasks import repeat_every

_log = logs.get()
_LOOK_SECONDS = 30


class Firewall:
    """Keeps the table equal to `wanted()`, which renders it from the database."""

    def __init__(self, table: str, wanted: Callable[[], str]) -> None:
        self._table = table
        self._wanted = wanted
        self._applied = ""
        self._lock = asyncio.Lock()

    async def refresh(self) -> None:
        """Applies what is wanted, if it is not what we applied last."""
        async with self._lock:
            script = self._wanted()
            if script != self._applied:
                await nftables.apply(script)
                self._applied = script

    async def watch(self) -> None:
        """Puts the table back when somebody has flushed it, looking every half minute."""
        await repeat_every("firewall", _LOOK_SECONDS, self._look)

    async def _look(self) -> None:
        if self._applied and not await nftables.present(self._table):
            _log.warning("firewall-table-gone", table=self._table, action="written again")
            self._applied = ""
            await self.refresh()


def render(table: str, networks: Iterable[NetworkConfiguration], rows: Iterable[Row]) -> str:
    """The table for these networks and attachments."""
    masquerades, ports = [], []
    for network in networks:
        for plugin in network.plugins:
            if plugin.get("ipMasq") and bridge.understands(plugin):
                masquerades += [
                    Masquerade(subnet, bridge.name_of(plugin)) for subnet in bridge.subnets(plugin, network.origin)
                ]
    for row in rows:
        if row.record:
            ports += host_ports(
                AttachmentRequest.model_validate_json(row.request),
                Attachment.model_validate_json(row.record).ips,
                row.network,
            )
    return nftables.render(table, list(dict.fromkeys(masquerades)), ports)


def host_ports(request: AttachmentRequest, ips: Iterable[str], network: str) -> list[HostPort]:
    """The host ports of a pod, if its network's portmap plugin is done by us."""
    if not any(understands_portmap(plugin) for plugin in json.loads(network)["plugins"]):
        return []
    return [
        HostPort(mapping.protocol.value.lower(), mapping.host_ip, mapping.host_port, ip, mapping.container_port)
        for mapping in request.port_mappings
        if mapping.host_port
        for ip in ips
        if not mapping.host_ip or (":" in mapping.host_ip) == (":" in ip)
    ]


def understands_portmap(plugin: dict[str, object]) -> bool:
    """Whether this portmap configuration asks for nothing that we don't do."""
    return plugin["type"] == "portmap" and set(plugin) <= {"type", "capabilities", "snat", "externalSetMarkChain"}

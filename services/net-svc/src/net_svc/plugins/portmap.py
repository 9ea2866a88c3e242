"""CNI's portmap plugin by rules in our nftables table (CNI plugins, portmap)."""

from collections.abc import Sequence

from crisp_proto.net import AttachmentRequest
from net_svc.cni import Document, PodRef, Result
from net_svc.nftables import HostPort
from net_svc.plugins.interface import Plugin

_KEYS = {"type", "capabilities", "snat", "externalSetMarkChain"}


def understands(plugin: Document) -> bool:
    """Tells whether this configuration has only keys that we support."""
    return plugin["type"] == "portmap" and set(plugin) <= _KEYS


class NativePortmap(Plugin):
    """Host ports of pods. The firewall makes their rules, so ADD and DEL have nothing to do."""

    async def add(self, pod: PodRef, previous: Result | None) -> Result | None:
        """Passes the previous result on."""
        return previous

    async def delete(self, pod: PodRef) -> None:
        """Does nothing; the ports go with the attachment's row."""

    def host_ports(self, request: AttachmentRequest, ips: Sequence[str]) -> list[HostPort]:
        """Pairs each mapped port with the pod's addresses.

        A mapping with a host address applies to addresses of its family only.
        """
        return [
            HostPort(
                mapping.protocol.value.lower(), mapping.host_ip or None, mapping.host_port, ip, mapping.container_port
            )
            for mapping in request.port_mappings
            if mapping.host_port
            for ip in ips
            if not mapping.host_ip or (":" in mapping.host_ip) == (":" in ip)
        ]

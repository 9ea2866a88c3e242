"""net-svc's routes."""

from fastapi import APIRouter, WebSocket

from crisp_proto.ids import Id
from crisp_proto.net import Attachment, AttachmentList, AttachmentRequest, NetworkStatus, NetworkUsages, NodeConfig
from crisp_proto.streams import DialRequest
from net_svc.attachments import Attachments
from net_svc.networks import Networks
from servicekit import served_channels


def routes(attachments: Attachments, networks: Networks) -> APIRouter:
    """Returns everything under /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/attachments")
    async def list_attachments() -> AttachmentList:
        """Returns all attachments and their ages."""
        return attachments.all()

    @router.put("/attachments/{id}")
    async def attach(id: Id, request: AttachmentRequest) -> Attachment:
        """Gives a pod a network namespace and connects it (CNI ADD).

        A repeated request returns the existing attachment.
        """
        return await attachments.attach(id, request)

    @router.get("/attachments/{id}")
    async def get_attachment(id: Id) -> Attachment:
        """Returns one attachment."""
        return attachments.get(id)

    @router.delete("/attachments/{id}", status_code=204)
    async def detach(id: Id) -> None:
        """Disconnects a pod (CNI DEL) and removes its namespace; succeeds if there is none."""
        await attachments.detach(id)

    @router.websocket("/dial")
    async def dial(socket: WebSocket) -> None:
        """Connects the client to a TCP port inside a pod."""
        await served_channels.serve(socket, DialRequest, attachments.dial)

    @router.get("/usage")
    async def usage() -> NetworkUsages:
        """Returns the interface counters of all pods."""
        return await attachments.usage()

    @router.get("/status")
    async def status() -> NetworkStatus:
        """Tells whether new pods can be connected, and by which network configuration."""
        return networks.status()

    @router.put("/node")
    async def set_node(config: NodeConfig) -> NodeConfig:
        """Stores what kubelet knows about the node: its pod CIDR."""
        networks.set_pod_cidr(config.pod_cidr)
        return config

    return router

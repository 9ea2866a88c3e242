"""net-svc's routes."""

from fastapi import APIRouter, WebSocket

from crisp_proto.net import Attachment, AttachmentList, AttachmentRequest, NetworkStatus, NetworkUsages, NodeConfig
from crisp_proto.streams import DialRequest
from net_svc.attachments import Attachments
from servicekit import served_channels


def routes(attachments: Attachments) -> APIRouter:
    """Everything under /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/attachments")
    async def list_attachments() -> AttachmentList:
        """All attachments."""
        return attachments.all()

    @router.put("/attachments/{id}")
    async def attach(id: str, request: AttachmentRequest) -> Attachment:
        """Gives a pod a network namespace and connects it (CNI ADD); the same again answers what there is."""
        return await attachments.attach(id, request)

    @router.get("/attachments/{id}")
    async def get_attachment(id: str) -> Attachment:
        """An attachment."""
        return attachments.get(id)

    @router.delete("/attachments/{id}", status_code=204)
    async def detach(id: str) -> None:
        """Disconnects a pod (CNI DEL) and removes its namespace; fine if there is none."""
        await attachments.detach(id)

    @router.websocket("/dial")
    async def dial(socket: WebSocket) -> None:
        """A connection to a TCP port inside a pod."""
        await served_channels.serve(socket, DialRequest, attachments.dial)

    @router.get("/usage")
    async def usage() -> NetworkUsages:
        """Interface counters of all pods."""
        return await attachments.usage()

    @router.get("/status")
    async def status() -> NetworkStatus:
        """Whether pods can be connected, and by which configuration."""
        return attachments.status()

    @router.put("/node")
    async def set_node(config: NodeConfig) -> NodeConfig:
        """What kubelet knows of the node: its pod CIDR."""
        attachments.set_pod_cidr(config.pod_cidr)
        return config

    return router

"""Exec, Attach and PortForward as CRI has them: each checks what is asked for and answers a URL that is good once, and for a minute."""

import asyncio

from cri_gateway import lookup
from cri_gateway.services import Services
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import ProcessState
from crisp_proto.runtime import Container, PodState
from crisp_proto.streams import Session, SessionKind
from servicekit.errors import FailedPrecondition, InvalidArgument


class Sessions:
    """The three calls. `base` is the streaming server's URL."""

    def __init__(self, services: Services, base: str) -> None:
        self._services = services
        self._base = base

    async def exec(self, request: api_pb2.ExecRequest) -> api_pb2.ExecResponse:
        """Exec."""
        if not request.cmd:
            raise InvalidArgument("cmd is empty; give the command to run", field="cmd")
        _check_streams(request)
        container = await self._running(request.container_id)
        session = Session(
            kind=SessionKind.EXEC, id=container.id, command=list(request.cmd), tty=request.tty,
            stdin=request.stdin, stdout=request.stdout, stderr=request.stderr,
        )  # fmt: skip
        return api_pb2.ExecResponse(url=await self._url(session))

    async def attach(self, request: api_pb2.AttachRequest) -> api_pb2.AttachResponse:
        """Attach."""
        _check_streams(request)
        container = await self._running(request.container_id)
        if request.tty != container.config.tty:
            raise InvalidArgument(
                f"tty = {request.tty}: the container was created with tty = {container.config.tty}, and this must match",
                field="tty",
            )
        session = Session(
            kind=SessionKind.ATTACH,
            id=container.id,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return api_pb2.AttachResponse(url=await self._url(session))

    async def port_forward(self, request: api_pb2.PortForwardRequest) -> api_pb2.PortForwardResponse:
        """PortForward."""
        for port in request.port:
            if not 1 <= port <= 65535:
                raise InvalidArgument(f"port = {port}: a number from 1 to 65535", field="port")
        pod = await self._services.runtime.pod(await lookup.pod_id(self._services.runtime, request.pod_sandbox_id))
        if pod.state is not PodState.READY:
            raise FailedPrecondition(f"pod {pod.id} is not ready: it was stopped", field="pod_sandbox_id")
        session = Session(
            kind=SessionKind.PORT_FORWARD, id=pod.id, ports=list(request.port), node_network=pod.config.on_node_network
        )
        return api_pb2.PortForwardResponse(url=await self._url(session))

    async def _running(self, text: str) -> Container:
        container_id = await lookup.container_id(self._services.runtime, text)
        container, process = await asyncio.gather(
            self._services.runtime.container(container_id), self._services.monitor.process(container_id)
        )
        if process.state is not ProcessState.ALIVE or not container.started_at:
            raise FailedPrecondition(f"container {container_id} is not running", field="container_id")
        return container

    async def _url(self, session: Session) -> str:
        token = (await self._services.monitor.create_session(session)).token
        return f"{self._base}/{session.kind}/{token}"


def _check_streams(request: api_pb2.ExecRequest | api_pb2.AttachRequest) -> None:
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("none of stdin, stdout and stderr is asked for; ask for one at least", field="stdout")
    if request.tty and request.stderr:
        raise InvalidArgument("stderr = true with tty = true: a terminal has one output, stdout", field="stderr")

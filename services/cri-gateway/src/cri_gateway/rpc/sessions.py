"""RuntimeService's methods Exec, Attach and PortForward, which return a URL for a stream."""

from cri_gateway.streaming.sessions import Sessions
from crisp_proto.cri import api_pb2
from crisp_proto.streams import Session, SessionKind


class SessionMethods:
    """Translates CRI's messages to sessions."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def exec(self, request: api_pb2.ExecRequest) -> api_pb2.ExecResponse:
        """Exec."""
        session = Session(
            kind=SessionKind.EXEC,
            id=request.container_id,
            command=list(request.cmd),
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return api_pb2.ExecResponse(url=await self._sessions.open_exec(session))

    async def attach(self, request: api_pb2.AttachRequest) -> api_pb2.AttachResponse:
        """Attach."""
        session = Session(
            kind=SessionKind.ATTACH,
            id=request.container_id,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return api_pb2.AttachResponse(url=await self._sessions.open_attach(session))

    async def port_forward(self, request: api_pb2.PortForwardRequest) -> api_pb2.PortForwardResponse:
        """PortForward."""
        url = await self._sessions.open_port_forward(request.pod_sandbox_id, list(request.port))
        return api_pb2.PortForwardResponse(url=url)

"""The HTTP server behind the URLs that Exec, Attach and PortForward return."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

# Loaded now: at the first stream, the gateway may have given up the right to read it.
import websockets.asyncio.client  # noqa: F401

from cri_gateway.services import Services
from cri_gateway.settings import GatewaySettings
from cri_gateway.streaming import certificate, port_forward, remote_command, spdy
from cri_gateway.streaming.transport import Tcp
from cri_gateway.streaming.upgrade import UpgradeRequest, refuse
from cri_gateway.streaming.websocket import WebSocket
from crisp_proto.streams import Session, SessionKind, SessionToken
from servicekit import context, logs
from servicekit.errors import CrispError, InvalidArgument, NotFound

_HEAD_LIMIT = 32 << 10
_HEAD_SECONDS = 30
_CLOSE_SECONDS = 5
_log = logs.get()


@asynccontextmanager
async def serving(services: Services, settings: GatewaySettings) -> AsyncIterator[str]:
    """Serves streams while the block runs; yields the base of their URLs.

    At the end, streams get a few seconds to end by themselves. Raises InvalidArgument if the
    address, the port or the certificate can't be used.
    """
    connections = _Connections(services, settings)
    tls = certificate.configured(settings)
    try:
        server = await asyncio.start_server(
            connections.handle,
            settings.stream_address,
            settings.stream_port,
            limit=_HEAD_LIMIT,
            reuse_port=bool(settings.stream_port),  # a gateway that takes over listens before the old one has ended
            ssl=tls.context if tls else None,
        )
    except OSError as error:
        raise InvalidArgument(
            f"the streaming server can't listen on {settings.stream_address}:{settings.stream_port}: {error.strerror}",
            hint="see gateway.stream_address and gateway.stream_port",
            field="gateway.stream_port",
        ) from error
    try:
        yield _base_url("https" if tls else "http", *server.sockets[0].getsockname()[:2])
    finally:
        server.close()
        await connections.close()


def _base_url(scheme: str, host: str, port: int) -> str:
    """Returns the URL of a listener. One that listens on all addresses is reached by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 — no socket is bound to it
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Connections:
    """The server's connections. Each is one request, and then one stream."""

    def __init__(self, services: Services, settings: GatewaySettings) -> None:
        self._services = services
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Gives streams under way a few seconds, then ends them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._handle(reader, Tcp(reader, writer, self._settings.stream_idle_timeout or None))
        except OSError:
            pass  # the client is gone
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _handle(self, reader: asyncio.StreamReader, transport: Tcp) -> None:
        context.enter(None, None)
        try:
            async with asyncio.timeout(_HEAD_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, asyncio.IncompleteReadError):
            return
        except asyncio.LimitOverrunError:
            message = f"the request's head has more than {_HEAD_LIMIT} bytes"
            await refuse(transport, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)
            return
        try:
            request = UpgradeRequest.parse(head)
            session = await self._redeem(request)
            await self._stream(request, session, transport)
        except CrispError as error:
            await refuse(transport, HTTPStatus(error.status), error.message)

    async def _redeem(self, request: UpgradeRequest) -> Session:
        """Exchanges the token in the request's path for its session."""
        kind, _, token = request.path.strip("/").partition("/")
        if kind not in list(SessionKind):
            raise NotFound("this server has the paths that Exec, Attach and PortForward answer, and no others")
        if not request.upgrade:
            raise InvalidArgument("this is no upgrade; streams are SPDY/3.1 or WebSockets")
        session = await self._services.monitor.redeem_session(SessionToken(token=token))
        if session.kind != kind:
            raise NotFound(f"this token is for {session.kind}")
        return session

    async def _stream(self, request: UpgradeRequest, session: Session, transport: Tcp) -> None:
        _log.info("stream-opened", kind=session.kind, id=session.id, by=request.upgrade)
        match request.upgrade:
            case "websocket":
                await self._stream_websocket(request, session, transport)
            case "spdy/3.1":
                await self._stream_spdy(request, session, transport)
            case _:
                raise InvalidArgument(f"Upgrade: {request.upgrade}: this server speaks SPDY/3.1 and WebSocket")
        _log.info("stream-closed", kind=session.kind, id=session.id)

    async def _stream_websocket(self, request: UpgradeRequest, session: Session, transport: Tcp) -> None:
        forwards = session.kind is SessionKind.PORT_FORWARD
        served = port_forward.WEBSOCKET_PROTOCOLS if forwards else remote_command.WEBSOCKET_PROTOCOLS
        socket = WebSocket(transport, request.head, served)
        protocol = await socket.accept()
        seconds = self._settings.stream_creation_timeout
        if protocol is None:
            await transport.close()
        elif forwards:
            await port_forward.over_websocket(self._services.net, session, socket, protocol, seconds)
        else:
            await remote_command.over_websocket(self._services.monitor, session, socket, protocol)

    async def _stream_spdy(self, request: UpgradeRequest, session: Session, transport: Tcp) -> None:
        forwards = session.kind is SessionKind.PORT_FORWARD
        protocol = request.negotiate(port_forward.SPDY_PROTOCOLS if forwards else remote_command.SPDY_PROTOCOLS)
        await transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
            b"X-Stream-Protocol-Version: " + protocol.encode() + b"\r\n\r\n"
        )
        seconds = self._settings.stream_creation_timeout
        if forwards:
            connection = spdy.Connection(transport, port_forward.SPDY_STREAMS)
            await port_forward.over_spdy(self._services.net, session, connection, seconds)
        else:
            connection = spdy.Connection(transport, remote_command.SPDY_STREAMS)
            await remote_command.over_spdy(self._services.monitor, session, connection, protocol, seconds)

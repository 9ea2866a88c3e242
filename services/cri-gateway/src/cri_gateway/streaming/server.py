"""The HTTP server behind the URLs that Exec, Attach and PortForward answer. It knows one kind of request: an upgrade, with a token in its path."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import h11
import websockets.asyncio.client  # noqa: F401 — else the first stream would load it, when we may have given up the right to read it

from cri_gateway.services import Services
from cri_gateway.settings import GatewaySettings
from cri_gateway.streaming import port_forward, remote_command, spdy
from cri_gateway.streaming.transport import Tcp
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
    """Serves streams; gives the base of their URLs. At the end, clients have a few seconds to come to theirs."""
    handler = _Handler(services, settings)
    tls = _Certificate.of(settings)
    try:
        server = await asyncio.start_server(
            handler.handle,
            settings.stream_address,
            settings.stream_port,
            limit=_HEAD_LIMIT,
            reuse_port=bool(settings.stream_port),  # a gateway that takes over listens before the old one has ended
            ssl=tls.context if tls else None,
        )
    except OSError as error:
        raise InvalidArgument(
            f"the streaming server can't listen on {settings.stream_address}:{settings.stream_port}: {error.strerror}; "
            "see gateway.stream_address and gateway.stream_port",
            field="gateway.stream_port",
        ) from error
    try:
        host, port = server.sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 — what listens everywhere is reached here
        yield f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.close()
        await handler.close()


class _Handler:
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
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._connection(reader, writer)
        except OSError:
            pass  # the client is gone
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        context.enter(None, None)
        transport = Tcp(reader, writer, self._settings.stream_idle_timeout)
        try:
            async with asyncio.timeout(_HEAD_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, asyncio.IncompleteReadError):
            return
        except asyncio.LimitOverrunError:
            await _refuse(
                transport,
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"the request's head has more than {_HEAD_LIMIT} bytes",
            )
            return
        try:
            request = _Request.parse(head)
            session = await self._session(request)
            await self._stream(request, session, transport)
        except CrispError as error:
            await _refuse(transport, HTTPStatus(error.status), error.message)

    async def _session(self, request: "_Request") -> Session:
        kind, _, token = request.path.strip("/").partition("/")
        if kind not in list(SessionKind):
            raise NotFound("this server has the paths that Exec, Attach and PortForward answer, and no others")
        if not request.upgrade:
            raise InvalidArgument("this is no upgrade; streams are SPDY/3.1 or WebSockets")
        session = await self._services.monitor.redeem_session(SessionToken(token=token))
        if session.kind != kind:
            raise NotFound(f"this token is for {session.kind}")
        return session

    async def _stream(self, request: "_Request", session: Session, transport: Tcp) -> None:
        forwards = session.kind is SessionKind.PORT_FORWARD
        _log.info("stream-begins", kind=session.kind, id=session.id, by=request.upgrade)
        seconds = self._settings.stream_creation_timeout
        if request.upgrade == "websocket":
            socket = WebSocket(
                transport,
                request.head,
                port_forward.WEBSOCKET_PROTOCOLS if forwards else remote_command.WEBSOCKET_PROTOCOLS,
            )
            protocol = await socket.accept()
            if not protocol:
                await transport.close()
            elif forwards:
                await port_forward.over_websocket(self._services.net, session, socket, protocol, seconds)
            else:
                await remote_command.over_websocket(self._services.monitor, session, socket, protocol)
        elif request.upgrade == "spdy/3.1":
            protocol = _negotiated(request, port_forward.SPDY_PROTOCOLS if forwards else remote_command.SPDY_PROTOCOLS)
            await transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
                b"X-Stream-Protocol-Version: " + protocol.encode() + b"\r\n\r\n"
            )
            connection = spdy.Connection(
                transport, port_forward.SPDY_STREAMS if forwards else remote_command.SPDY_STREAMS
            )
            if forwards:
                await port_forward.over_spdy(self._services.net, session, connection, seconds)
            else:
                await remote_command.over_spdy(self._services.monitor, session, connection, protocol, seconds)
        else:
            raise InvalidArgument(f"Upgrade: {request.upgrade}: this server speaks SPDY/3.1 and WebSocket")
        _log.info("stream-ends", kind=session.kind, id=session.id)


@dataclass(frozen=True, slots=True)
class _Request:
    head: bytes
    path: str
    upgrade: str
    protocols: tuple[str, ...]

    @staticmethod
    def parse(head: bytes) -> "_Request":
        parser = h11.Connection(h11.SERVER)
        parser.receive_data(head)
        try:
            request = parser.next_event()
        except h11.RemoteProtocolError as error:
            raise InvalidArgument(f"this is no HTTP request: {error}") from error
        if not isinstance(request, h11.Request):
            raise InvalidArgument("this is no HTTP request")
        headers = [(name, value.decode("latin-1")) for name, value in request.headers]
        return _Request(
            head=head,
            path=request.target.decode("latin-1").partition("?")[0],
            upgrade=next((value.lower() for name, value in headers if name == b"upgrade"), ""),
            protocols=tuple(
                part.strip()
                for name, value in headers
                if name == b"x-stream-protocol-version"
                for part in value.split(",")
                if part.strip()
            ),
        )


def _negotiated(request: _Request, served: list[str]) -> str:
    """The client's first choice that we have; a client that names none has the oldest."""
    if not request.protocols:
        return served[-1]
    for protocol in request.protocols:
        if protocol in served:
            return protocol
    raise InvalidArgument(
        f"X-Stream-Protocol-Version: {', '.join(request.protocols)}: this server speaks {', '.join(served)}"
    )


async def _refuse(transport: Tcp, status: HTTPStatus, message: str) -> None:
    body = message.encode() + b"\n"
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.suppress(OSError):
        await transport.write(head.encode() + body)
    await transport.close()


class _Certificate:
    """The server's certificate, read anew when its files have changed."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._read = self._versions()
        self.context = self._loaded()

    @staticmethod
    def of(settings: GatewaySettings) -> "_Certificate | None":
        """The one that the settings name, if they do. Raises InvalidArgument."""
        if settings.stream_tls_certificate is None and settings.stream_tls_key is None:
            return None
        if settings.stream_tls_certificate is None or settings.stream_tls_key is None:
            raise InvalidArgument(
                "gateway.stream_tls_certificate and gateway.stream_tls_key go together; one of them is empty",
                field="gateway.stream_tls_key",
            )
        try:
            return _Certificate(settings.stream_tls_certificate, settings.stream_tls_key)
        except OSError as error:
            raise InvalidArgument(
                f"the streaming server's certificate {settings.stream_tls_certificate} or its key can't be used: {error}",
                field="gateway.stream_tls_certificate",
            ) from error

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self._files)
        context.sni_callback = self._refresh  # called in each handshake, also without a server name
        return context

    def _versions(self) -> tuple[int, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)

    def _refresh(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        try:
            versions = self._versions()
            if versions != self._read:
                self.context, self._read = self._loaded(), versions
                _log.info("certificate-read-anew", file=str(self._files[0]))
        except OSError as error:
            _log.error("certificate-not-read", file=str(self._files[0]), error=str(error))
        connection.context = self.context

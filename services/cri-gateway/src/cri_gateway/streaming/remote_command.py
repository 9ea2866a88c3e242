"""Exec and Attach: a client's channels and monitor-svc's, joined (Kubernetes' channel protocols v1 to v5)."""

import asyncio
import contextlib
from collections.abc import Mapping

from cri_gateway.services import MonitorService
from cri_gateway.streaming import spdy
from cri_gateway.streaming.channels import SpdyChannels, WebSocketChannels
from cri_gateway.streaming.websocket import WebSocket
from crisp_proto.streams import AttachRequest, Channel, ExecStreamRequest, Session, SessionKind, failed
from servicekit import logs
from servicekit.channels import Channels
from servicekit.errors import CrispError
from servicekit.tasks import race

_BASE64 = "v4.base64.channel.k8s.io"
WEBSOCKET_PROTOCOLS = ["v5.channel.k8s.io", "v4.channel.k8s.io", _BASE64]
# Best first. The first two know no resize stream; all but v4 have plain text on the error stream.
SPDY_PROTOCOLS = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"]
_WITHOUT_RESIZE = SPDY_PROTOCOLS[2:]
SPDY_STREAMS = 5
_log = logs.get()


async def over_websocket(monitor: MonitorService, session: Session, socket: WebSocket, protocol: str) -> None:
    """The session, to its end, with a client that has a WebSocket."""
    channels = WebSocketChannels(socket, base64=protocol == _BASE64)
    await _joined(monitor, session, channels)
    await channels.close()


async def over_spdy(
    monitor: MonitorService, session: Session, connection: spdy.Connection, protocol: str, create_timeout: float
) -> None:
    """The session, to its end, with a client that has `create_timeout` seconds to open its SPDY streams."""
    missing = _expected(session, protocol)
    streams: dict[Channel, spdy.Stream] = {}
    complete = asyncio.Event()

    def opened(stream: spdy.Stream) -> None:
        channel = _channel(stream.headers)
        if channel not in missing:
            raise spdy.Refused(
                f"stream type {stream.headers.get('streamtype', '')!r} was not asked for, or was opened before"
            )
        missing.remove(channel)
        streams[channel] = stream
        if not missing:
            complete.set()

    async def command() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(create_timeout):
                await complete.wait()
        channels = SpdyChannels(connection, streams, plain_errors=protocol != SPDY_PROTOCOLS[0])
        if missing:
            names = ", ".join(sorted(channel.name.lower() for channel in missing))
            _log.warning("stream-missing", missing=names)
            await _tell(
                channels,
                failed(
                    f"the client did not open its streams {names} within {create_timeout:g} s (gateway.stream_creation_timeout)"
                ),
            )
        else:
            await _joined(monitor, session, channels)
        await channels.close()

    await race(command(), connection.serve(opened))


def _expected(session: Session, protocol: str) -> set[Channel]:
    wanted = {Channel.ERROR}
    if session.stdin:
        wanted.add(Channel.STDIN)
    if session.stdout:
        wanted.add(Channel.STDOUT)
    if session.stderr:
        wanted.add(Channel.STDERR)
    if session.tty and protocol not in _WITHOUT_RESIZE:
        wanted.add(Channel.RESIZE)
    return wanted


def _channel(headers: Mapping[str, str]) -> Channel | None:
    name = headers.get("streamtype", "").upper()
    return Channel[name] if name in Channel.__members__ else None


async def _joined(monitor: MonitorService, session: Session, client: Channels) -> None:
    """Passes messages on until the service has said its last, or the client is gone."""
    try:
        service = await (
            monitor.exec_stream(
                session.id, ExecStreamRequest(command=session.command, tty=session.tty, stdin=session.stdin)
            )
            if session.kind is SessionKind.EXEC
            else monitor.attach(
                session.id, AttachRequest(stdin=session.stdin, stdout=session.stdout, stderr=session.stderr)
            )
        )
    except CrispError as error:
        await _tell(client, failed(error.message))
        return

    async def up() -> None:
        while (message := await client.receive()) is not None:
            await service.send(*message)

    async def down() -> None:
        last = Channel.CLOSE
        while (message := await service.receive()) is not None:
            last = Channel(message[0])
            await client.send(*message)
        if last is not Channel.ERROR:
            await _tell(client, failed("monitor-svc went away; whether the command still runs is not known"))

    try:
        await race(up(), down())
    except OSError:
        pass  # one side is gone, and so is the session
    finally:
        await service.close()


async def _tell(client: Channels, status: bytes) -> None:
    try:
        await client.send(Channel.ERROR, status)
    except OSError:
        pass

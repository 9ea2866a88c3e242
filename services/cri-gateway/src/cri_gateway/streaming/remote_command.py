"""Exec and Attach: joins a client's channels with monitor-svc's.

The protocols are Kubernetes' channel protocols v1 to v5.
"""

import asyncio
import contextlib
from collections.abc import Mapping

from cri_gateway.services import MonitorService
from cri_gateway.streaming import spdy
from cri_gateway.streaming.channels import SpdyChannels, WebSocketChannels
from cri_gateway.streaming.websocket import WebSocket
from crisp_proto.streams import AttachRequest, Channel, ExecStreamRequest, Session, SessionKind, failed
from servicekit import logs
from servicekit.channels import Channels, ServiceChannels
from servicekit.errors import CrispError
from servicekit.tasks import race

_BASE64 = "v4.base64.channel.k8s.io"
WEBSOCKET_PROTOCOLS = ["v5.channel.k8s.io", "v4.channel.k8s.io", _BASE64]
# Best first. The two oldest have no resize stream; all but v4 have plain text on the error stream.
SPDY_PROTOCOLS = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"]
_WITHOUT_RESIZE = SPDY_PROTOCOLS[2:]
SPDY_STREAMS = 5
_log = logs.get()


async def over_websocket(monitor: MonitorService, session: Session, socket: WebSocket, protocol: str) -> None:
    """Runs a session to its end, for a client with a WebSocket."""
    channels = WebSocketChannels(socket, base64=protocol == _BASE64)
    await _relay(monitor, session, channels)
    await channels.close()


async def over_spdy(
    monitor: MonitorService, session: Session, connection: spdy.Connection, protocol: str, create_timeout: float
) -> None:
    """Runs a session to its end, for a client with SPDY.

    The client must open its streams within `create_timeout` seconds.
    """
    streams = _Streams(_expected(session, protocol))

    async def run() -> None:
        await streams.wait(create_timeout)
        channels = SpdyChannels(connection, streams.opened, plain_errors=protocol != SPDY_PROTOCOLS[0])
        if streams.missing:
            names = ", ".join(sorted(channel.name.lower() for channel in streams.missing))
            _log.warning("stream-missing", missing=names)
            limit = f"{create_timeout:g} s (gateway.stream_creation_timeout)"
            await _send_status(channels, failed(f"the client did not open its streams {names} within {limit}"))
        else:
            await _relay(monitor, session, channels)
        await channels.close()

    await race(run(), connection.serve(streams.accept))


class _Streams:
    """The SPDY streams that a client opened for a session, and the channels that still lack one."""

    def __init__(self, expected: set[Channel]) -> None:
        self.missing = expected
        self.opened: dict[Channel, spdy.Stream] = {}
        self._complete = asyncio.Event()

    def accept(self, stream: spdy.Stream) -> None:
        """Takes a new stream. Raises Refused for one that is not missing."""
        channel = _channel(stream.headers)
        if channel not in self.missing:
            kind = stream.headers.get("streamtype", "")
            raise spdy.Refused(f"stream type {kind!r} was not asked for, or was opened before")
        self.missing.remove(channel)
        self.opened[channel] = stream
        if not self.missing:
            self._complete.set()

    async def wait(self, seconds: float) -> None:
        """Waits until no stream is missing, or this time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._complete.wait()


def _expected(session: Session, protocol: str) -> set[Channel]:
    """Returns the channels for which the client must open streams."""
    optional = {
        Channel.STDIN: session.stdin,
        Channel.STDOUT: session.stdout,
        Channel.STDERR: session.stderr,
        Channel.RESIZE: session.tty and protocol not in _WITHOUT_RESIZE,
    }
    return {Channel.ERROR, *(channel for channel, wanted in optional.items() if wanted)}


def _channel(headers: Mapping[str, str]) -> Channel | None:
    name = headers.get("streamtype", "").upper()
    return Channel[name] if name in Channel.__members__ else None


async def _relay(monitor: MonitorService, session: Session, client: Channels) -> None:
    """Passes messages on until the service has sent its last one, or the client is gone."""
    try:
        service = await _connect(monitor, session)
    except CrispError as error:
        await _send_status(client, failed(error.message))
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
            await _send_status(client, failed("monitor-svc went away; whether the command still runs is not known"))

    try:
        await race(up(), down())
    except OSError:
        pass  # one side is gone, and so is the session
    finally:
        await service.close()


async def _connect(monitor: MonitorService, session: Session) -> ServiceChannels:
    if session.kind is SessionKind.EXEC:
        return await monitor.exec_stream(
            session.id, ExecStreamRequest(command=session.command, tty=session.tty, stdin=session.stdin)
        )
    return await monitor.attach(
        session.id, AttachRequest(stdin=session.stdin, stdout=session.stdout, stderr=session.stderr)
    )


async def _send_status(client: Channels, status: bytes) -> None:
    """Sends the last message of a session, unless the client is gone."""
    try:
        await client.send(Channel.ERROR, status)
    except OSError:
        pass

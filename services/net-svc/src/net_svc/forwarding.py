"""Connections to a pod's ports from outside its network, as PortForward wants them: dialled inside the pod, on its loopback interface."""

import asyncio
import contextlib
import os
import socket
from functools import partial
from pathlib import Path

from crisp_proto.streams import SUCCESS, Channel, failed
from net_svc import netns
from servicekit.channels import Channels

_PIECE = 1 << 16
_CONNECT_SECONDS = 10
_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


async def forward(namespace: Path | None, port: int, channels: Channels) -> None:
    """Joins the client's channels to a TCP port, each direction to its own end. `namespace` is the pod's, None the node's."""
    try:
        connection = await _dial(namespace, port)
    except OSError as error:
        await channels.send(
            Channel.ERROR, failed(f"nothing answers on port {port} in the pod: {os.strerror(error.errno or 0)}")
        )
        return
    with connection:
        incoming = asyncio.create_task(_to_pod(connection, channels))
        outgoing = asyncio.create_task(_from_pod(connection, channels))
        try:
            await asyncio.wait([incoming, outgoing], return_when=asyncio.FIRST_COMPLETED)
            if incoming.done() and not incoming.result():
                return  # the client is gone
            fault = await outgoing
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            await incoming
        finally:
            for task in (incoming, outgoing):
                task.cancel()
            await asyncio.gather(incoming, outgoing, return_exceptions=True)
    await channels.send(
        Channel.ERROR, failed(f"the connection to port {port} in the pod broke: {fault}") if fault else SUCCESS
    )


async def _to_pod(connection: socket.socket, channels: Channels) -> bool:
    """Until the client has closed its direction; False if it is gone."""
    loop = asyncio.get_running_loop()
    while (message := await channels.receive()) is not None:
        channel, data = message
        if channel == Channel.STDIN:
            try:
                await loop.sock_sendall(connection, data)
            except OSError:
                return True  # the pod does not want any more
        elif channel == Channel.CLOSE:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            return True
    return False


async def _from_pod(connection: socket.socket, channels: Channels) -> str:
    """Until the pod has closed its direction; answers why, if it did not do that in the regular way."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await loop.sock_recv(connection, _PIECE)
        except OSError as error:
            return str(error)
        if not data:
            break
        await channels.send(Channel.STDOUT, data)
    await channels.send(Channel.CLOSE, bytes([Channel.STDOUT]))
    return ""


async def _dial(namespace: Path | None, port: int) -> socket.socket:
    """A connection to the port, by IPv4 or else by IPv6. Raises OSError."""
    loop = asyncio.get_running_loop()
    refused = OSError()
    for family, address in _ADDRESSES:
        try:
            make = partial(socket.socket, family)
            connection = make() if namespace is None else await netns.inside(namespace, make)
        except OSError as error:  # no IPv6 here
            refused = refused if refused.errno else error
            continue
        connection.setblocking(False)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await loop.sock_connect(connection, (address, port))
            return connection
        except TimeoutError as error:
            connection.close()
            raise OSError(110, "timed out") from error
        except OSError as error:
            connection.close()
            refused = refused if refused.errno else error
    raise refused

"""Connections to a pod's ports from outside its network, for PortForward.

They are dialled in the pod's network namespace, on its loopback interface.
"""

import asyncio
import contextlib
import errno
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
    """Joins the client's channels to a TCP port until both directions have ended.

    `namespace` is the pod's network namespace; None stands for the node's.
    """
    try:
        connection = await _dial(namespace, port)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        await channels.send(Channel.ERROR, failed(f"nothing answers on port {port} in the pod: {reason}"))
        return
    with connection:
        incoming = asyncio.create_task(_to_pod(connection, channels))
        outgoing = asyncio.create_task(_from_pod(connection, channels))
        try:
            await asyncio.wait([incoming, outgoing], return_when=asyncio.FIRST_COMPLETED)
            if incoming.done() and not incoming.result():
                return
            fault = await outgoing
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            await incoming
        finally:
            for task in (incoming, outgoing):
                task.cancel()
            await asyncio.gather(incoming, outgoing, return_exceptions=True)
    ended = SUCCESS if fault is None else failed(f"the connection to port {port} in the pod broke: {fault}")
    await channels.send(Channel.ERROR, ended)


async def _to_pod(connection: socket.socket, channels: Channels) -> bool:
    """Passes data to the pod until the client closes its direction; False if the client is gone."""
    loop = asyncio.get_running_loop()
    while (message := await channels.receive()) is not None:
        channel, data = message
        if channel == Channel.STDIN:
            try:
                await loop.sock_sendall(connection, data)
            except OSError:
                return True  # the pod has closed the connection
        elif channel == Channel.CLOSE:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            return True
    return False


async def _from_pod(connection: socket.socket, channels: Channels) -> str | None:
    """Passes data to the client until the pod closes its direction.

    Returns the fault if the connection broke.
    """
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
    return None


async def _dial(namespace: Path | None, port: int) -> socket.socket:
    """Connects to the port by IPv4, otherwise by IPv6. Raises the first OSError."""
    first: OSError | None = None
    for family, address in _ADDRESSES:
        try:
            return await _connect(namespace, family, address, port)
        except TimeoutError:
            raise
        except OSError as error:  # nothing listens there, or the kernel has no IPv6
            first = first or error
    assert first is not None
    raise first


async def _connect(namespace: Path | None, family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """Connects a socket of the namespace. Raises OSError; TimeoutError after ten seconds."""
    make = partial(socket.socket, family)
    connection = make() if namespace is None else await netns.inside(namespace, make)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
    except TimeoutError as error:
        connection.close()
        raise TimeoutError(errno.ETIMEDOUT, "timed out") from error
    except BaseException:
        connection.close()
        raise
    return connection

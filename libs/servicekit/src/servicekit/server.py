"""Runs a service: one replica, listening on RUNDIR/<service>/<replica>.sock until it is told to stop.

Stopping (SIGTERM, SIGINT) takes three steps: the socket's name goes away, so that no new client comes; what is in flight is
finished; the process ends. A client that still holds a connection sees it closed and goes to another replica.
"""

import asyncio
import contextlib
import gc
import grp
import json
import os
import resource
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import uvicorn
import uvicorn.lifespan.off  # uvicorn would import it later, see client.py
import uvloop
from fastapi import APIRouter
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from servicekit import logs
from servicekit.app import Readiness, create_app
from servicekit.errors import CrispError
from servicekit.linux.files import listen_unix
from servicekit.settings import Section, Settings, load

S = TypeVar("S", bound=Section)
_log = logs.get()
DRAIN_SECONDS = 25
_FILES = 1 << 20
_MESSAGE_LIMIT = 16 << 20


@dataclass(frozen=True, slots=True)
class Frontend:
    """What a service shows to the outside once it is open. `drain` ends the calls that wait for something to happen, when it is to stop."""

    routers: Sequence[APIRouter]
    ready: Readiness
    drain: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Service(Generic[S]):
    """A service: its name, its section of the settings, and how to open it (closing it is the way back)."""

    name: str
    section: str
    settings: type[S]
    open: Callable[[Settings[S]], AbstractAsyncContextManager[Frontend]]


def main(service: Service[S]) -> None:
    """The whole of a service's __main__. `--openapi` prints the service's OpenAPI document instead of serving."""
    try:
        if sys.argv[1:] == ["--openapi"]:
            sys.stdout.write(asyncio.run(openapi(service)) + "\n")
            return
        settings = load(service.section, service.settings)
        logs.configure(service.name, settings.replica, fmt=settings.node.log_format, level=settings.node.log_level)
        _raise_file_limit()
        uvloop.run(_serve(service, settings))
    except CrispError as error:
        sys.stderr.write(f"{service.name}: {error.message}\n")
        raise SystemExit(2) from error


def _raise_file_limit() -> None:
    """A pidfd for each container needs more than the usual 1024 files. Containers get the same limit, as under our systemd units."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def openapi(service: Service[S]) -> str:
    """The service's OpenAPI document, made by opening it on an empty temporary root."""
    with tempfile.TemporaryDirectory() as root:
        arguments = ["--set", f"node.run_dir={root}/run", "--set", f"node.state_dir={root}/state"]
        async with service.open(load(service.section, service.settings, arguments, {})) as face:
            return json.dumps(create_app(service.name, face.routers, face.ready).openapi(), indent=1, sort_keys=True)


async def _serve(service: Service[S], settings: Settings[S]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Ours alone: an OCI runtime that inherits it would speak to systemd in our name (crun fails to start containers with it).
    systemd = os.environ.pop("NOTIFY_SOCKET", "")
    async with service.open(settings) as face, listening(service.name, settings, face):
        gc.enable()  # each __main__ has put it off
        gc.freeze()  # what was loaded until here stays; looking through it again and again takes 10 ms each time
        notify(systemd, "READY=1")
        _log.info("ready", socket=str(socket_path(service.name, settings)))
        await stop.wait()
        notify(systemd, "STOPPING=1")
        _log.info("draining")


@asynccontextmanager
async def listening(name: str, settings: Settings[S], face: Frontend) -> AsyncIterator[None]:
    """Serves `face` on the replica's socket while the block runs, and drains at its end."""
    path = socket_path(name, settings)
    allowed_gid = group_id(settings.node.group)
    listener = listen_unix(path, allowed_gid)
    config = uvicorn.Config(
        create_app(name, face.routers, face.ready),
        http=_peer_checked(allowed_gid),
        loop="uvloop",
        ws=_web_sockets,  # type: ignore[arg-type]  # it is only called
        ws_max_size=_MESSAGE_LIMIT,
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=3600,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = uvicorn.Server(config)
    server.capture_signals = _no_signals  # type: ignore[method-assign]  # _serve has its own handlers
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        face.drain()
        server.should_exit = True
        await serving


def _web_sockets(*arguments: Any, **more: Any) -> asyncio.Protocol:
    """What uvicorn gives a connection to that wants to be a WebSocket; loaded by the first one, since most services never see any."""
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    return WebSocketsSansIOProtocol(*arguments, **more)


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    yield


def socket_path(name: str, settings: Settings[S]) -> Path:
    """Where a replica listens."""
    return settings.node.run_dir / name / f"{settings.replica}.sock"


def group_id(group: str) -> int | None:
    """The number of the group that may connect besides root; None where the machine has no such group."""
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _peer_checked(allowed_gid: int | None) -> type[HttpToolsProtocol]:
    class PeerCheckedProtocol(HttpToolsProtocol):
        """Hangs up on peers that are neither root, nor this user, nor in the allowed group (SO_PEERCRED, unix(7))."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            raw = transport.get_extra_info("socket").getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
            )
            pid, uid, gid = struct.unpack("3i", raw)
            if uid not in (0, os.geteuid()) and gid != allowed_gid:
                _log.warning("peer-refused", pid=pid, uid=uid, gid=gid)
                self.transport = transport  # connection_lost closes it
                transport.abort()
                return
            super().connection_made(transport)

    return PeerCheckedProtocol


def notify(address: str, state: str) -> None:
    """Tells systemd how we are (sd_notify(3)) on the socket that it gave us; silent where there is none."""
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagram:
        datagram.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)

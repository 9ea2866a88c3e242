"""Runs one replica of a service, listening on RUNDIR/<service>/<replica>.sock until it is stopped.

SIGTERM or SIGINT stops it in three steps: it unlinks its socket, so that no new client connects; it
finishes the requests in flight; it exits. A client that keeps a connection open sees it closed and
goes to another replica.
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
import uvicorn.lifespan.off  # uvicorn would import it late, see client.py
import uvloop
from fastapi import APIRouter
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from servicekit import logs
from servicekit.app import Readiness, create_app
from servicekit.errors import CrispError
from servicekit.linux import accounts
from servicekit.linux.files import listen_unix
from servicekit.settings import Section, Settings, load

S = TypeVar("S", bound=Section)
_log = logs.get()
DRAIN_SECONDS = 25
_OPEN_FILES = 1 << 20
_MESSAGE_LIMIT = 16 << 20  # bytes of a WebSocket message
_KEEP_ALIVE_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Frontend:
    """The routes and the readiness check of an open service.

    `drain` is called when the service stops; it ends requests that wait for an event.
    """

    routers: Sequence[APIRouter]
    ready: Readiness
    drain: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Service(Generic[S]):
    """A service: its name, its section of the settings, and how to open it.

    Leaving the context that `open` returns closes the service.
    """

    name: str
    section: str
    settings: type[S]
    open: Callable[[Settings[S]], AbstractAsyncContextManager[Frontend]]


def main(service: Service[S]) -> None:
    """Runs the service of this process; with `--openapi`, prints its OpenAPI document instead.

    Exits with status 2 and the reason on standard error if the settings are wrong.
    """
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
    """Raises the limit of open files: a pidfd for each container needs more than the usual 1024.

    Containers inherit the limit, as they do under our systemd units.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def openapi(service: Service[S]) -> str:
    """Returns the service's OpenAPI document.

    Opens the service on an empty temporary root for it.
    """
    with tempfile.TemporaryDirectory() as root:
        arguments = ["--set", f"node.run_dir={root}/run", "--set", f"node.state_dir={root}/state"]
        async with service.open(load(service.section, service.settings, arguments, {})) as frontend:
            app = create_app(service.name, frontend.routers, frontend.ready)
            return json.dumps(app.openapi(), indent=1, sort_keys=True)


async def _serve(service: Service[S], settings: Settings[S]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # No child may inherit this variable: an OCI runtime would notify systemd in our name, and crun
    # then fails to start containers.
    systemd = os.environ.pop("NOTIFY_SOCKET", "")
    async with service.open(settings) as frontend, listening(service.name, settings, frontend):
        gc.enable()  # each __main__ disables it while modules are loaded
        gc.freeze()  # the loaded modules stay, and scanning them would take 10 ms at each collection
        notify(systemd, "READY=1")
        _log.info("service-ready", socket=str(socket_path(service.name, settings)))
        await stop.wait()
        notify(systemd, "STOPPING=1")
        _log.info("service-draining")


@asynccontextmanager
async def listening(name: str, settings: Settings[S], frontend: Frontend) -> AsyncIterator[None]:
    """Serves `frontend` on the replica's socket while the block runs, then drains."""
    path = socket_path(name, settings)
    allowed_gid = group_id(settings.node.group)
    listener = listen_unix(path, allowed_gid)
    config = uvicorn.Config(
        create_app(name, frontend.routers, frontend.ready),
        http=_peer_checked(allowed_gid),
        loop="uvloop",
        ws=_websocket_protocol,  # type: ignore[arg-type]  # uvicorn only calls it
        ws_max_size=_MESSAGE_LIMIT,
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = uvicorn.Server(config)
    server.capture_signals = _no_signals  # type: ignore[method-assign]  # _serve has its own handlers
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        frontend.drain()
        server.should_exit = True
        await serving


def _websocket_protocol(*arguments: Any, **more: Any) -> asyncio.Protocol:
    """Returns uvicorn's protocol for a connection that becomes a WebSocket.

    The first such connection loads the module, since most services never see one.
    """
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    class Protocol(WebSocketsSansIOProtocol):
        """Knows that a handshake is over once it has been refused; uvicorn 0.54 logs an error."""

        async def send(self, message: Any) -> None:
            await super().send(message)
            if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
                self.handshake_complete = True

    return Protocol(*arguments, **more)


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    yield


def socket_path(name: str, settings: Settings[S]) -> Path:
    """Returns the socket that a replica listens on."""
    return settings.node.run_dir / name / f"{settings.replica}.sock"


def group_id(group: str) -> int | None:
    """Returns the id of the group that may connect besides root; None if there is no such group."""
    if accounts.is_number(group):
        return accounts.parse_id(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _peer_checked(allowed_gid: int | None) -> type[HttpToolsProtocol]:
    class PeerCheckedProtocol(HttpToolsProtocol):
        """Aborts connections of peers other than root, our user and the allowed group.

        The kernel names the peer (SO_PEERCRED, unix(7)).
        """

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
            self.app_state = {**self.app_state, "peer_uid": uid}  # for servicekit.app.only_root
            super().connection_made(transport)

    return PeerCheckedProtocol


def notify(address: str, state: str) -> None:
    """Sends our state to systemd (sd_notify(3)), if systemd gave us the address of a socket."""
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagram:
        datagram.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)

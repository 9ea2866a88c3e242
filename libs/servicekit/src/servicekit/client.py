"""Calls from the gateway (and crispctl) to a service's replicas over their unix sockets.

The folder RUNDIR/<service>/ is the list of replicas. A call goes to the least busy one; when a replica goes away under a
call, the call is sent again, to another replica or to the same one's successor, until the deadline or for `patience` seconds,
whichever is sooner. That is safe because every write is keyed by an id; the few calls that are not say so.
"""

import asyncio
import contextlib
import json
import os
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import anyio._backends._asyncio  # noqa: F401 — httpx would import these at the first call, when a service may have
import httpcore  # noqa: F401         given up the right to read its own packages
from pydantic import BaseModel, TypeAdapter

from servicekit import context, metrics
from servicekit.channels import ServiceChannels
from servicekit.errors import CrispError, DeadlineExceeded, Unavailable, from_problem
from servicekit.imports import hidden

with hidden("rich"):
    import httpx

T = TypeVar("T")
PATIENCE = 10.0
_RETRY_PAUSE = 0.05
_READY_SECONDS = 5
_SETTLED = 1_000_000_000  # ns, many ticks of the kernel's clock
_adapters: dict[Any, TypeAdapter[Any]] = {}


@dataclass(frozen=True, slots=True)
class Step:
    """One call to a service as its caller saw it; `milliseconds` includes the way there and back."""

    service: str
    method: str
    path: str
    milliseconds: float


steps: ContextVar[list[Step] | None] = ContextVar("crisp_steps", default=None)
"""Where the calls of the current task are noted down, if someone wants to know."""


@dataclass(slots=True)
class _Replica:
    path: str
    transport: httpx.AsyncHTTPTransport
    inode: int
    in_flight: int = 0


@dataclass(slots=True)
class ServiceClient:
    """All replicas of one service. `deadline` in seconds is for calls that don't bring their own, `patience` for one to come back."""

    service: str
    run_dir: Path
    deadline: float = 60.0
    patience: float = PATIENCE
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _folder_version: int = -1
    _kept: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """ETag and reply of the last answer, for paths whose replies are kept."""

    async def close(self) -> None:
        """Closes all connections."""
        for replica in self._replicas.values():
            await replica.transport.aclose()
        self._replicas.clear()
        self._folder_version = -1

    def replicas(self) -> list[str]:
        """Names of the replicas that listen now, sorted."""
        return sorted(path.stem for path in (self.run_dir / self.service).glob("[!.]*.sock"))

    async def fault(self) -> str:
        """Why the service is not ready, in its own words; empty if it is."""
        try:
            await self.call("GET", "/readyz", deadline=_READY_SECONDS)
        except CrispError as error:
            return error.message
        return ""

    @overload
    async def call(
        self,
        method: str,
        path: str,
        reply: type[T],
        body: BaseModel | None = None,
        *,
        deadline: float | None = None,
        idempotent: bool = True,
        keep: bool = False,
    ) -> T: ...
    @overload
    async def call(
        self,
        method: str,
        path: str,
        reply: None = None,
        body: BaseModel | None = None,
        *,
        deadline: float | None = None,
        idempotent: bool = True,
    ) -> None: ...
    async def call(
        self,
        method: str,
        path: str,
        reply: type[T] | None = None,
        body: BaseModel | None = None,
        *,
        deadline: float | None = None,
        idempotent: bool = True,
        keep: bool = False,
    ) -> T | None:
        """Sends a request and answers its reply as `reply`. Raises the error that the service named.

        With `keep` the reply is kept and given again as long as the service says that it is still the same (RFC 9110, 13.1.2).

        Unavailable: no replica answered for `patience` seconds, or there is none at the deadline. DeadlineExceeded: one did not
        answer within `deadline` seconds.
        """
        limit = self.deadline if deadline is None else deadline
        tag, kept = self._kept.get(path, ("", None)) if keep else ("", None)
        started = time.perf_counter()
        status = "none"
        try:
            async with asyncio.timeout(limit):
                response = await self._send(
                    method, path, b"" if body is None else body.model_dump_json().encode(), idempotent, tag
                )
            status = str(response.status_code)
        except TimeoutError as error:
            if not self.replicas():
                raise self._away() from error
            raise DeadlineExceeded(f"{self.service} did not answer {method} {path} within {limit:g} s") from error
        finally:
            elapsed = time.perf_counter() - started
            metrics.CALLS.labels(self.service, method, status).observe(elapsed)
            noted = steps.get()
            if noted is not None:
                noted.append(Step(self.service, method, path, elapsed * 1000))
        if response.status_code >= 400:
            raise from_problem(response.status_code, _json(response.content), self.service)
        if reply is None:
            return None
        if response.status_code == 304:
            return cast(T, kept)
        adapter = _adapters.get(reply) or _adapters.setdefault(reply, TypeAdapter(reply))
        parsed: T = adapter.validate_json(response.content)
        if keep and "etag" in response.headers:
            self._kept[path] = response.headers["etag"], parsed
        return parsed

    async def connect(self, path: str, request: BaseModel) -> ServiceChannels:
        """Opens a WebSocket of channels and sends its first message. Raises Unavailable."""
        from websockets.asyncio.client import unix_connect  # 3 MB that only streams need
        from websockets.exceptions import WebSocketException

        give_up = time.monotonic() + self.patience
        while True:
            replica = self._least_busy()
            if replica is not None:
                with contextlib.suppress(OSError, WebSocketException):
                    connection = await unix_connect(
                        replica.path,
                        f"ws://{self.service}{path}",
                        additional_headers=_context_headers(),
                        compression=None,
                        max_size=None,
                        ping_interval=None,
                        user_agent_header=None,
                        proxy=None,
                    )
                    await connection.send(request.model_dump_json())
                    return ServiceChannels(connection)
            if time.monotonic() > give_up:
                raise self._away()
            await asyncio.sleep(_RETRY_PAUSE)

    async def _send(self, method: str, path: str, content: bytes, idempotent: bool, tag: str) -> httpx.Response:
        headers = {"host": self.service, "content-length": str(len(content))}
        if content:
            headers["content-type"] = "application/json"
        if tag:
            headers["if-none-match"] = tag
        headers |= _context_headers()
        give_up: float | None = (
            None  # counted from when it is missed: a call that waits for news may have been there for long
        )
        while True:
            replica = self._least_busy()
            if replica is not None:
                replica.in_flight += 1
                try:
                    # The transport itself, not httpx.AsyncClient: cookies, redirects and proxies cost half a millisecond a hop.
                    response = await replica.transport.handle_async_request(
                        httpx.Request(method, f"http://{self.service}{path}", headers=headers, content=content)
                    )
                    await response.aread()
                    return response
                except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                    if not (idempotent or isinstance(error, httpx.ConnectError)):
                        raise Unavailable(
                            f"{self.service} went away during {method} {path}, which is not safe to repeat; look before you try again"
                        ) from error
                    metrics.CALL_RETRIES.labels(self.service).inc()
                finally:
                    replica.in_flight -= 1
            give_up = give_up or time.monotonic() + self.patience
            if time.monotonic() > give_up:
                raise self._away()
            await asyncio.sleep(_RETRY_PAUSE)

    def _away(self) -> Unavailable:
        return Unavailable(
            f"{self.service} is away: no replica answers in {self.run_dir / self.service}; see its log, or start it"
        )

    def _least_busy(self) -> _Replica | None:
        folder = self.run_dir / self.service
        try:
            version = os.stat(folder).st_mtime_ns
        except FileNotFoundError:
            return None
        if version != self._folder_version:
            self._refresh(folder)
            # Two changes within one tick leave the folder with one time, and we may have looked between them.
            self._folder_version = version if time.time_ns() - version > _SETTLED else -1
        return min(self._replicas.values(), key=lambda replica: replica.in_flight, default=None)

    def _refresh(self, folder: Path) -> None:
        sockets = {
            entry.path: entry.inode()
            for entry in os.scandir(folder)
            if entry.name.endswith(".sock") and not entry.name.startswith(".")
        }
        self._replicas = {
            path: replica
            if (replica := self._replicas.get(path)) and replica.inode == inode
            else _Replica(path, _transport(path), inode)
            for path, inode in sockets.items()
        }


def _transport(path: str) -> httpx.AsyncHTTPTransport:
    # verify: nothing is encrypted on a unix socket; loading the certificate authorities would take 20 ms and 3 MB.
    return httpx.AsyncHTTPTransport(
        uds=path,
        verify=False,
        limits=httpx.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=3000),
    )


def _context_headers() -> dict[str, str]:
    call = context.current()
    return (
        {}
        if call is None
        else {context.REQUEST_ID_HEADER: call.request_id, context.TRACEPARENT_HEADER: call.traceparent}
    )


def _json(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None

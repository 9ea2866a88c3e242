"""Calls from the gateway (and crispctl) to the replicas of a service over their unix sockets.

A call goes to the least busy replica. If the replica goes away during the call, the call is sent
again, to another replica or to a successor, until the deadline or for `patience` seconds, whichever
comes first. Repeating is safe because every write is keyed by an id; the few calls that are not
idempotent say so.
"""

import asyncio
import json
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter

from servicekit import context, metrics
from servicekit.channels import ServiceChannels
from servicekit.errors import CrispError, DeadlineExceeded, Unavailable, from_problem
from servicekit.imports import hidden
from servicekit.replicas import Replicas

with hidden("rich"):
    import httpx

T = TypeVar("T")
PATIENCE = 10.0
_RETRY_PAUSE = 0.05
_READY_SECONDS = 5
_adapters: dict[Any, TypeAdapter[Any]] = {}


def segment(text: str) -> str:
    """Returns a name as one segment of a path, or as a value of a query, whatever is in it.

    A client resolves the segments `.` and `..`, so dots are escaped too.
    """
    return quote(text, safe="").replace(".", "%2E")


@dataclass(frozen=True, slots=True)
class Step:
    """One call to a service as its caller saw it, with the round trip in milliseconds."""

    service: str
    method: str
    path: str
    milliseconds: float


steps: ContextVar[list[Step] | None] = ContextVar("crisp_steps", default=None)
"""The list that records the calls of the current task; None if nobody wants to know."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parsed reply, and the entity tag that the service gave it."""

    etag: str
    reply: Any


@dataclass(slots=True)
class ServiceClient:
    """All replicas of one service.

    `deadline` is for calls that have none of their own; `patience` is how long a call waits for a
    replica to come back. Both are in seconds.
    """

    service: str
    run_dir: Path
    deadline: float = 60.0
    patience: float = PATIENCE
    _replicas: Replicas = field(init=False)
    _kept: dict[str, _Kept] = field(default_factory=dict)
    """The last replies, by path, of calls that keep them."""

    def __post_init__(self) -> None:
        self._replicas = Replicas(self.run_dir / self.service)

    async def close(self) -> None:
        """Closes all connections."""
        await self._replicas.close()

    def replicas(self) -> list[str]:
        """Returns the names of the replicas that have a socket now, sorted."""
        return self._replicas.names()

    async def fault(self) -> str | None:
        """Returns the service's own explanation why it is not ready; None if it is ready."""
        try:
            await self.call("GET", "/readyz", deadline=_READY_SECONDS)
        except CrispError as error:
            return error.message
        return None

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
        """Sends a request, and returns its reply parsed as `reply`.

        With `keep` the parsed reply is kept, and returned again as long as the service says that it
        has not changed (RFC 9110, 13.1.2).

        Raises the error that the service answered; Unavailable if no replica answered for
        `patience` seconds, or there is none at the deadline; DeadlineExceeded if a replica did not
        answer within `deadline` seconds.
        """
        kept = self._kept.get(path) if keep else None
        content = b"" if body is None else body.model_dump_json().encode()
        limit = self.deadline if deadline is None else deadline
        response = await self._measured(method, path, content, limit, idempotent, kept)
        if response.status_code >= 400:
            raise from_problem(response.status_code, _json(response.content), self.service)
        if reply is None:
            return None
        if response.status_code == 304 and kept is not None:
            unchanged: T = kept.reply
            return unchanged
        adapter = _adapters.get(reply) or _adapters.setdefault(reply, TypeAdapter(reply))
        parsed: T = adapter.validate_json(response.content)
        if keep and "etag" in response.headers:
            self._kept[path] = _Kept(response.headers["etag"], parsed)
        return parsed

    async def connect(self, path: str, request: BaseModel) -> ServiceChannels:
        """Opens a WebSocket of channels and sends its first message.

        Raises Unavailable, or the error that the service answered.
        """
        from websockets.asyncio.client import unix_connect  # 3 MB that only streams need
        from websockets.exceptions import InvalidStatus, WebSocketException

        give_up = time.monotonic() + self.patience
        while True:
            replica = self._replicas.least_busy()
            if replica is not None:
                try:
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
                except InvalidStatus as error:
                    refusal = error.response
                    raise from_problem(refusal.status_code, _json(bytes(refusal.body or b"")), self.service) from error
                except (OSError, WebSocketException):
                    pass
            if time.monotonic() > give_up:
                raise self._away()
            await asyncio.sleep(_RETRY_PAUSE)

    async def _measured(
        self, method: str, path: str, content: bytes, limit: float, idempotent: bool, kept: _Kept | None
    ) -> httpx.Response:
        """Sends a request within `limit` seconds; records it in the metrics and in `steps`."""
        started = time.perf_counter()
        status = "none"
        try:
            async with asyncio.timeout(limit):
                response = await self._send(method, path, content, idempotent, kept)
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
        return response

    async def _send(
        self, method: str, path: str, content: bytes, idempotent: bool, kept: _Kept | None
    ) -> httpx.Response:
        """Sends a request until a replica answers it."""
        request = httpx.Request(
            method, f"http://{self.service}{path}", headers=self._headers(content, kept), content=content
        )
        # Counted from the first failure: a long-polling call may have been waiting long by then.
        give_up: float | None = None
        while True:
            replica = self._replicas.least_busy()
            if replica is not None:
                try:
                    return await replica.exchange(request)
                except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                    if not (idempotent or isinstance(error, httpx.ConnectError)):
                        raise Unavailable(
                            f"{self.service} went away during {method} {path}, which is not safe to repeat",
                            hint="look before you try again",
                        ) from error
                    metrics.CALL_RETRIES.labels(self.service).inc()
            give_up = give_up or time.monotonic() + self.patience
            if time.monotonic() > give_up:
                raise self._away()
            await asyncio.sleep(_RETRY_PAUSE)

    def _headers(self, content: bytes, kept: _Kept | None) -> dict[str, str]:
        headers = {"host": self.service, "content-length": str(len(content)), **_context_headers()}
        if content:
            headers["content-type"] = "application/json"
        if kept is not None:
            headers["if-none-match"] = kept.etag
        return headers

    def _away(self) -> Unavailable:
        return Unavailable(
            f"{self.service} is away: no replica answers in {self._replicas.folder}",
            hint="see its log, or start it",
        )


def _context_headers() -> dict[str, str]:
    call = context.current()
    if call is None:
        return {}
    return {context.REQUEST_ID_HEADER: call.request_id, context.TRACEPARENT_HEADER: call.traceparent}


def _json(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None

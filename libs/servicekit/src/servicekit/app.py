"""The FastAPI application of a service: its own routes, and those that every service has."""

import errno
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError, ValidationException, WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from servicekit import context, logs, metrics
from servicekit.errors import CrispError, InvalidArgument, PermissionDenied, ResourceExhausted, Unavailable, to_problem

Readiness = Callable[[], Awaitable[None]]
_PLACES_OF_FIELDS = ("body", "path", "query", "header")
_SHOWN = 200  # characters of a wrong value that the error repeats, and of a path in the log
_log = logs.get()


def create_app(service: str, routers: Iterable[APIRouter], ready: Readiness) -> FastAPI:
    """Builds the application of a service.

    While the service cannot work, `ready` raises an error that says what is missing.
    """
    app = FastAPI(title=service, version="1", docs_url="/docs", redoc_url=None)
    for router in routers:
        app.include_router(router)
    app.include_router(_common_routes(ready))
    app.add_exception_handler(CrispError, _crisp_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(WebSocketRequestValidationError, _refused_stream)  # type: ignore[arg-type]
    app.add_exception_handler(OSError, _full_disk)
    app.add_exception_handler(sqlite3.OperationalError, _full_disk)
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_middleware(CallMiddleware)
    return app


def unless_same(version: Callable[[], str]) -> dict[str, Any]:
    """Returns the arguments that make a GET route conditional (RFC 9110, 13.1.2).

    `version` returns the entity tag of the current answer. A client that sends this tag in
    If-None-Match gets 304 without a body.
    """

    async def check(response: Response, if_none_match: Annotated[str, Header()] = "") -> None:
        tag = f'"{version()}"'
        if if_none_match == tag:
            raise HTTPException(304, headers={"etag": tag})
        response.headers["etag"] = tag

    return {
        "dependencies": [Depends(check)],
        "responses": {304: {"description": "Nothing has changed since If-None-Match's ETag"}},
    }


async def only_root(request: Request) -> None:
    """Refuses callers other than root; a dependency of routes that take a path on the host.

    The gateway's user may call all other routes (SO_PEERCRED, see servicekit.server).
    """
    uid = getattr(request.state, "peer_uid", None)
    if uid not in (0, os.geteuid()):
        raise PermissionDenied(
            f"{request.method} {request.url.path} takes a path on this host, so only root may call it",
            hint="call it as root, for instance by crispctl",
        )


def _common_routes(ready: Readiness) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Liveness: answers as long as the event loop runs."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Readiness: 503 with the reason while something that this service needs is missing."""
        try:
            await ready()
        except CrispError as error:
            raise Unavailable(error.message) from error
        return {"status": "ok"}

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return router


def _problem(error: CrispError) -> JSONResponse:
    return JSONResponse(to_problem(error), status_code=error.status, media_type="application/problem+json")


async def _crisp_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, CrispError)
    return _problem(error)


async def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _problem(_invalid(error))


async def _refused_stream(socket: WebSocket, error: WebSocketRequestValidationError) -> None:
    """Answers the handshake of a WebSocket whose path is wrong."""
    await socket.send_denial_response(_problem(_invalid(error)))


def _invalid(error: ValidationException) -> InvalidArgument:
    """Returns the first fault as an error that names the field; `path.id` is the field `id`."""
    first: dict[str, Any] = dict(error.errors()[0])
    where, *inside = (str(part) for part in first["loc"])
    field = ".".join(inside if where in _PLACES_OF_FIELDS else (where, *inside))
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return InvalidArgument(f"{field} = {shown}: {first['msg']}", hint="see /docs for what it takes", field=field)


async def _full_disk(request: Request, error: Exception) -> Response:
    """Reports a full disk, quota or database as RESOURCE_EXHAUSTED; raises other errors again."""
    where = _what_is_full(request.app.title, error)
    if where is None:
        raise error
    _log.error("disk-full", method=request.method, path=request.url.path, error=str(error))
    hint = "free some on its disk, as by removing images"
    return _problem(ResourceExhausted(f"no room for {where}: {error}", hint=hint))


def _what_is_full(service: str, error: Exception) -> str | None:
    match error:
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return str(error.filename or "a file")
        case sqlite3.OperationalError(sqlite_errorcode=sqlite3.SQLITE_FULL):
            return f"the database of {service}"
        case _:
            return None


async def _unexpected_error(request: Request, error: Exception) -> Response:
    _log.error("unexpected-error", method=request.method, path=request.url.path, exc_info=error)
    return JSONResponse(
        {
            "type": "about:blank",
            "title": type(error).__name__,
            "status": 500,
            "detail": f"{type(error).__name__}: {error}",
            "code": "INTERNAL",
        },
        status_code=500,
        media_type="application/problem+json",
    )


class CallMiddleware:
    """Sets the context of each call, measures the call, and logs one line about it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one HTTP request or one WebSocket."""
        match scope["type"]:
            case "http":
                _enter_context(scope)
                await self._request(scope, receive, send)
            case "websocket":
                _enter_context(scope)
                await self._stream(scope, receive, send)
            case _:
                await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 500

        async def send_timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed = (time.perf_counter() - started) * 1000
                message["headers"] = [*message["headers"], (b"server-timing", b"total;dur=%.2f" % elapsed)]
            await send(message)

        metrics.IN_FLIGHT.inc()
        try:
            await self._app(scope, receive, send_timed)
        finally:
            metrics.IN_FLIGHT.dec()
            _record(scope, status, time.perf_counter() - started)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        try:
            await self._app(scope, receive, send)
        finally:
            _log.info("stream-closed", path=scope["path"][:_SHOWN], ms=round((time.perf_counter() - started) * 1000, 2))


def _enter_context(scope: Scope) -> None:
    headers = dict(scope["headers"])
    context.enter(
        headers.get(b"x-request-id", b"").decode("latin-1"), headers.get(b"traceparent", b"").decode("latin-1")
    )


def _record(scope: Scope, status: int, seconds: float) -> None:
    """Counts and logs a request; successful reads are logged at level debug."""
    method = scope["method"]
    route = getattr(scope.get("route"), "path", "unmatched")
    metrics.REQUESTS.labels(route, method, str(status)).observe(seconds)
    log = _log.info if method != "GET" or status >= 500 else _log.debug
    log("request-served", method=method, path=scope["path"][:_SHOWN], status=status, ms=round(seconds * 1000, 2))

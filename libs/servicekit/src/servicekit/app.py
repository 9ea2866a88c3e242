"""The FastAPI application of a service: its routes, plus what every service shows of itself."""

import errno
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from servicekit import context, logs, metrics
from servicekit.errors import CrispError, InvalidArgument, ResourceExhausted, Unavailable, to_problem

Readiness = Callable[[], Awaitable[None]]
_log = logs.get()


def create_app(service: str, routers: Iterable[APIRouter], ready: Readiness) -> FastAPI:
    """Puts a service together. `ready` raises an error that says what is missing as long as the service can't work."""
    app = FastAPI(title=service, version="1", docs_url="/docs", redoc_url=None)
    for router in routers:
        app.include_router(router)
    app.include_router(_own_routes(ready))
    app.add_exception_handler(CrispError, _crisp_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(OSError, _full_disk)
    app.add_exception_handler(sqlite3.OperationalError, _full_disk)
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_middleware(CallMiddleware)
    return app


def unless_same(version: Callable[[], str]) -> dict[str, Any]:
    """What a GET route needs to be conditional (RFC 9110, 13.1.2): 304 without a body for whoever has this `version` of the answer."""

    async def check(response: Response, if_none_match: Annotated[str, Header()] = "") -> None:
        tag = f'"{version()}"'
        if if_none_match == tag:
            raise HTTPException(304, headers={"etag": tag})
        response.headers["etag"] = tag

    return {
        "dependencies": [Depends(check)],
        "responses": {304: {"description": "Nothing has changed since If-None-Match's ETag"}},
    }


def _own_routes(ready: Readiness) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Alive: the event loop turns."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Ready: what this service needs is there. 503 and the reason if not."""
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
    first: dict[str, Any] = dict(error.errors()[0])
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    return _problem(
        InvalidArgument(f"{field} = {first.get('input')!r}: {first['msg']}; see /docs for what it takes", field=field)
    )


async def _full_disk(request: Request, error: Exception) -> Response:
    """A full disk by that name, whoever has met it; anything else stays unexpected."""
    where = None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "a file"
    elif isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        where = f"the database of {request.app.title}"
    if where is None:
        raise error
    _log.error("disk-full", method=request.method, path=request.url.path, error=str(error))
    return _problem(ResourceExhausted(f"no room for {where}: {error}; free some on its disk, as by removing images"))


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
    """Enters the call's context, measures it, and logs one line for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        context.enter(
            headers.get(b"x-request-id", b"").decode("latin-1"), headers.get(b"traceparent", b"").decode("latin-1")
        )
        started = time.perf_counter()
        if scope["type"] == "websocket":
            try:
                await self._app(scope, receive, send)
            finally:
                _log.info("stream", path=scope["path"], ms=round((time.perf_counter() - started) * 1000, 2))
            return
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
            elapsed = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            metrics.REQUESTS.labels(route, scope["method"], str(status)).observe(elapsed)
            level = _log.info if scope["method"] != "GET" or status >= 500 else _log.debug
            level("request", method=scope["method"], path=scope["path"], status=status, ms=round(elapsed * 1000, 2))

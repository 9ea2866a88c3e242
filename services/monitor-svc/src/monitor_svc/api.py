"""monitor-svc's routes."""

from collections.abc import AsyncIterator
from functools import partial

from fastapi import APIRouter, Query, WebSocket
from fastapi.responses import StreamingResponse

from crisp_proto.monitor import (
    EventList,
    ExecRequest,
    ExecResult,
    MonitorRequest,
    Note,
    Process,
    ProcessList,
    StopRequest,
)
from crisp_proto.streams import AttachRequest, ExecStreamRequest, LogRequest, Session, SessionToken
from monitor_svc import sessions
from monitor_svc.monitors import Monitors
from monitor_svc.store import Store
from servicekit import served_channels
from servicekit.app import unless_same

_EVENTS_AT_ONCE = 500
_LOOK_SECONDS = 1  # for events that another replica wrote


def routes(monitors: Monitors, store: Store) -> APIRouter:
    """Everything under /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/monitors", **unless_same(store.version))
    async def list_monitors() -> ProcessList:
        """All processes."""
        return ProcessList(processes=monitors.all())

    @router.put("/monitors/{id}")
    async def create_monitor(id: str, request: MonitorRequest) -> Process:
        """Has conmon create a container; the same again answers what there is."""
        return await monitors.create(id, request)

    @router.get("/monitors/{id}")
    async def get_monitor(id: str) -> Process:
        """A container's process."""
        return monitors.get(id)

    @router.post("/monitors/{id}/stop")
    async def stop(id: str, request: StopRequest) -> Process:
        """Ends a container: the signal, then after the grace time SIGKILL."""
        return await monitors.stop(id, request)

    @router.post("/monitors/{id}/exec")
    async def exec_sync(id: str, request: ExecRequest) -> ExecResult:
        """Runs a command in a container and waits for it. Not idempotent."""
        return await monitors.exec(id, request)

    @router.websocket("/monitors/{id}/exec")
    async def exec_stream(id: str, socket: WebSocket) -> None:
        """Runs a command with the client's streams."""
        await served_channels.serve(socket, ExecStreamRequest, partial(monitors.exec_stream, id))

    @router.websocket("/monitors/{id}/attach")
    async def attach(id: str, socket: WebSocket) -> None:
        """Joins the client's streams to the container's."""
        await served_channels.serve(socket, AttachRequest, partial(monitors.attach, id))

    @router.websocket("/monitors/{id}/log")
    async def log(id: str, socket: WebSocket) -> None:
        """The container's log, and if wanted what follows."""
        await served_channels.serve(socket, LogRequest, partial(monitors.log, id))

    @router.post("/sessions", status_code=201)
    async def create_session(session: Session) -> SessionToken:
        """Keeps what a client may do, and answers the token that the client must show."""
        return sessions.issue(store, session)

    @router.post("/sessions/redeem")
    async def redeem_session(token: SessionToken) -> Session:
        """What a token stands for; it is used up by that."""
        return sessions.redeem(store, token)

    @router.post("/monitors/{id}/reopen", status_code=204)
    async def reopen(id: str) -> None:
        """Opens the container's log file anew."""
        await monitors.reopen_log(id)

    @router.delete("/monitors/{id}", status_code=204)
    async def remove(id: str) -> None:
        """Kills what still runs and forgets it; fine if there is nothing."""
        await monitors.remove(id)

    @router.get("/events")
    async def list_events(
        after: int = Query(0, ge=0),
        limit: int = Query(_EVENTS_AT_ONCE, ge=0, le=_EVENTS_AT_ONCE),
        wait: float = Query(0, ge=0, le=60),
    ) -> EventList:
        """Events after a cursor, oldest first. If there is none, waits for one for up to `wait` seconds."""
        return await monitors.journal(after, limit, wait)

    @router.post("/events", status_code=204)
    async def note(note: Note) -> None:
        """Writes down what the gateway saw happen; the same twice in a row is one event."""
        await monitors.note(note)

    @router.get("/events/stream", response_class=StreamingResponse)
    async def stream_events(after: int = Query(0, ge=0)) -> StreamingResponse:
        """Events after a cursor and all later ones, as server-sent events whose id is the cursor."""
        return StreamingResponse(_stream(monitors, store, after), media_type="text/event-stream")

    return router


async def _stream(monitors: Monitors, store: Store, cursor: int) -> AsyncIterator[str]:
    while not monitors.draining:
        for event in store.events(cursor, _EVENTS_AT_ONCE):
            cursor = event.cursor
            yield f"id: {cursor}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
        await monitors.until_changed(_LOOK_SECONDS)

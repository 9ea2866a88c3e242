"""monitor-svc's routes."""

from collections.abc import AsyncIterator
from functools import partial

from fastapi import APIRouter, Query, WebSocket
from fastapi.responses import StreamingResponse

from crisp_proto.ids import Id
from crisp_proto.monitor import (
    Event,
    EventList,
    ExecRequest,
    ExecResult,
    Note,
    Process,
    ProcessList,
    StopRequest,
)
from crisp_proto.streams import AttachRequest, ExecStreamRequest, LogRequest, Session, SessionToken
from monitor_svc import sessions
from monitor_svc.container_io import ContainerIO
from monitor_svc.journal import BATCH
from monitor_svc.monitors import Monitors
from monitor_svc.store import Store
from servicekit import served_channels
from servicekit.app import unless_same


def routes(store: Store, monitors: Monitors, io: ContainerIO) -> APIRouter:
    """Returns the routes under /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/monitors", **unless_same(store.version))
    async def list_monitors() -> ProcessList:
        """Returns all processes."""
        return ProcessList(processes=monitors.all())

    @router.put("/monitors/{id}")
    async def create_monitor(id: Id) -> Process:
        """Makes conmon create a container as runtime-svc has recorded it.

        If there is a process with this id, returns it.
        """
        return await monitors.create(id)

    @router.get("/monitors/{id}")
    async def get_monitor(id: Id) -> Process:
        """Returns a container's process."""
        return monitors.get(id)

    @router.post("/monitors/{id}/stop")
    async def stop(id: Id, request: StopRequest) -> Process:
        """Ends a container: sends the signal, and SIGKILL after the grace time."""
        return await monitors.stop(id, request)

    @router.post("/monitors/{id}/exec")
    async def exec_sync(id: Id, request: ExecRequest) -> ExecResult:
        """Runs a command in a container and waits for it. Not idempotent."""
        return await io.exec(id, request)

    @router.websocket("/monitors/{id}/exec")
    async def exec_stream(id: Id, socket: WebSocket) -> None:
        """Runs a command on the client's streams."""
        await served_channels.serve(socket, ExecStreamRequest, partial(io.exec_stream, id))

    @router.websocket("/monitors/{id}/attach")
    async def attach(id: Id, socket: WebSocket) -> None:
        """Joins the client's streams to the container's."""
        await served_channels.serve(socket, AttachRequest, partial(io.attach, id))

    @router.websocket("/monitors/{id}/log")
    async def log(id: Id, socket: WebSocket) -> None:
        """Sends the container's log, and what follows if wanted."""
        await served_channels.serve(socket, LogRequest, partial(io.log, id))

    @router.post("/sessions", status_code=201)
    async def create_session(session: Session) -> SessionToken:
        """Keeps what a client may do, and returns the token that the client must present."""
        return sessions.issue(store, session)

    @router.post("/sessions/redeem")
    async def redeem_session(token: SessionToken) -> Session:
        """Returns the session of a token, and invalidates the token."""
        return sessions.redeem(store, token)

    @router.post("/monitors/{id}/reopen", status_code=204)
    async def reopen(id: Id) -> None:
        """Reopens the container's log file."""
        await io.reopen_log(id)

    @router.delete("/monitors/{id}", status_code=204)
    async def remove(id: Id) -> None:
        """Kills and forgets a container; fine if there is none."""
        await monitors.remove(id)

    @router.get("/events")
    async def list_events(
        after: int = Query(0, ge=0),
        limit: int = Query(BATCH, ge=0, le=BATCH),
        wait: float = Query(0, ge=0, le=60),
    ) -> EventList:
        """Returns events after a cursor, oldest first.

        If there is none, waits up to `wait` seconds for one.
        """
        return await store.journal.read(after, limit, wait)

    @router.post("/events", status_code=204)
    async def note(note: Note) -> None:
        """Records an event that the gateway reports; a repeated report is ignored."""
        store.journal.note(note)

    @router.get("/events/stream", response_class=StreamingResponse)
    async def stream_events(after: int = Query(0, ge=0)) -> StreamingResponse:
        """Sends all events after a cursor, as server-sent events whose id is the cursor."""
        return StreamingResponse(_sent(store.journal.follow(after)), media_type="text/event-stream")

    return router


async def _sent(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Formats events as server-sent events (HTML Standard, section 9.2)."""
    async for event in events:
        yield f"id: {event.cursor}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"

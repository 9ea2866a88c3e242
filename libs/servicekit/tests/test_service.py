"""A whole service on its socket, and the client that calls it."""

import asyncio
import contextlib
import errno
import os
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, Depends, WebSocket
from pydantic import BaseModel

from crisp_proto.ids import Id
from servicekit import client as client_module
from servicekit import context, server
from servicekit.app import only_root, unless_same
from servicekit.client import ServiceClient, steps
from servicekit.errors import DeadlineExceeded, Internal, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from servicekit.server import Frontend
from servicekit.settings import NodeSettings, Section, Settings


class Echo(BaseModel):
    """A request that is sent back as the reply."""

    text: str


class Nothing(Section):
    """No settings."""


def frontend(replica: str, release: asyncio.Event | None = None) -> Frontend:
    router = APIRouter(prefix="/v1")
    written: list[str] = []

    @router.post("/words")
    async def write(body: Echo) -> None:
        written.append(body.text)

    @router.get("/words", **unless_same(lambda: f"{replica}-{len(written)}"))
    async def words() -> Echo:
        return Echo(text=" ".join(written))

    @router.post("/echo")
    async def echo(body: Echo) -> Echo:
        return body

    @router.get("/who")
    async def who() -> Echo:
        return Echo(text=replica)

    @router.get("/absent")
    async def absent() -> Echo:
        raise NotFound("there is no such thing; look elsewhere", field="thing")

    @router.get("/broken")
    async def broken() -> Echo:
        raise ValueError("a mistake")

    @router.get("/full/disk")
    async def full_disk() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/state/layer")

    @router.get("/full/database")
    async def full_database() -> None:
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.execute("PRAGMA max_page_count = 1")
            database.execute("CREATE TABLE words (word TEXT)")

    @router.get("/slow")
    async def slow() -> Echo:
        assert release is not None
        await release.wait()
        return Echo(text=replica)

    @router.get("/context")
    async def shown() -> Echo:
        call = context.current()
        assert call is not None
        return Echo(text=f"{call.request_id} {call.trace_id}")

    @router.get("/things/{id}")
    async def thing(id: Id) -> Echo:
        return Echo(text=id)

    @router.websocket("/things/{id}/stream")
    async def stream(id: Id, socket: WebSocket) -> None:
        await socket.accept()

    @router.post("/path", dependencies=[Depends(only_root)])
    async def path() -> Echo:
        return Echo(text="read")

    async def ready() -> None:
        if replica == "unready":
            raise Unavailable("the cable is out; plug it in")

    return Frontend([router], ready)


@asynccontextmanager
async def running(run: Path, replica: str = "0", release: asyncio.Event | None = None) -> AsyncIterator[None]:
    settings = Settings(node=NodeSettings(run_dir=run, group=str(os.getgid())), own=Nothing(), replica=replica)
    async with server.listening("demo", settings, frontend(replica, release)):
        await wait_until_listening(run / "demo" / f"{replica}.sock")
        yield


def raw_client(run: Path, replica: str = "0") -> httpx.AsyncClient:
    """A plain HTTP client, as any other program has it."""
    transport = httpx.AsyncHTTPTransport(uds=str(run / f"demo/{replica}.sock"), verify=False)
    return httpx.AsyncClient(transport=transport, base_url="http://demo")


async def wait_until_listening(path: Path) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(path)
            except OSError:
                await asyncio.sleep(0.005)
            else:
                writer.close()
                return


@pytest.fixture
async def caller(tmp_path: Path) -> AsyncIterator[ServiceClient]:
    caller = ServiceClient("demo", tmp_path)
    yield caller
    await caller.close()


async def test_a_call_returns_the_reply_and_is_recorded(tmp_path: Path, caller: ServiceClient) -> None:
    noted: list[client_module.Step] = []
    steps.set(noted)
    async with running(tmp_path):
        assert (await caller.call("POST", "/v1/echo", Echo, Echo(text="täxt"))).text == "täxt"
    assert [(step.service, step.method, step.path) for step in noted] == [("demo", "POST", "/v1/echo")]
    assert noted[0].milliseconds > 0


async def test_no_call_searches_for_a_module_that_is_not_installed(
    tmp_path: Path, caller: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each search costs 65 µs, and httpcore searched for sniffio four times per call."""
    missed: list[str] = []

    class Last:
        def find_spec(self, name: str, *_: object) -> None:
            missed.append(name)

    async with running(tmp_path):
        await caller.call("GET", "/v1/who", Echo)
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Last()])
        await caller.call("GET", "/v1/who", Echo)
    assert missed == []


async def test_errors_keep_their_kind_and_field(tmp_path: Path, caller: ServiceClient) -> None:
    async with running(tmp_path):
        with pytest.raises(NotFound, match="look elsewhere") as caught:
            await caller.call("GET", "/v1/absent", Echo)
        assert caught.value.field == "thing"
        with pytest.raises(InvalidArgument, match="text"):
            await caller.call("POST", "/v1/echo", Echo, context_free())
        with pytest.raises(Internal, match="a mistake"):
            await caller.call("GET", "/v1/broken", Echo)
        with pytest.raises(ResourceExhausted, match="no room for /state/layer: .*No space left on device"):
            await caller.call("GET", "/v1/full/disk", Echo)
        with pytest.raises(ResourceExhausted, match="no room for the database of .*: database or disk is full"):
            await caller.call("GET", "/v1/full/database", Echo)


def context_free() -> BaseModel:
    class Other(BaseModel):
        other: int = 1

    return Other()


async def test_a_wrong_id_is_named_also_for_a_websocket(tmp_path: Path, caller: ServiceClient) -> None:
    async with running(tmp_path):
        for path in ("/v1/things/x", "/v1/things/" + "A" * 64, "/v1/things/" + "a" * 64 + "%0A"):
            with pytest.raises(InvalidArgument, match="id = '.*': String should match pattern") as caught:
                await caller.call("GET", path, Echo)
            assert caught.value.field == "id"
            with pytest.raises(InvalidArgument, match="id = ") as caught:
                await caller.connect(f"{path}/stream", Echo(text="x"))
            assert caught.value.field == "id"
        with pytest.raises(InvalidArgument) as caught:
            await caller.call("GET", f"/v1/things/{'x' * 10_000}", Echo)
        assert len(caught.value.message) < 500
        with pytest.raises(Internal, match="answered 403"):
            await caller.connect("/v1/no/such/stream", Echo(text="x"))
        assert (await caller.call("GET", f"/v1/things/{'a' * 64}", Echo)).text == "a" * 64


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_route_with_a_path_is_for_root(tmp_path: Path, caller: ServiceClient) -> None:
    async with running(tmp_path):
        assert (await caller.call("POST", "/v1/path", Echo)).text == "read"
        script = (
            "import os,socket,sys; s=socket.socket(socket.AF_UNIX); os.setgroups([]); os.setgid(int(sys.argv[2])); "
            "os.chdir(os.path.dirname(sys.argv[1])); os.setuid(64999); s.connect(os.path.basename(sys.argv[1]))\n"
            "s.sendall(b'POST /v1/path HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n')\nfor piece in iter(lambda: s.recv(9999), b''): print(piece.decode())"
        )
        socket_path = tmp_path / "demo/0.sock"
        socket_path.chmod(0o666)
        process = await asyncio.create_subprocess_exec(
            "/usr/bin/python3", "-c", script, str(socket_path), str(os.getgid()), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    assert b" 403 " in output
    assert b"so only root may call it" in output


async def test_request_id_and_trace_id_travel_with_a_call(tmp_path: Path, caller: ServiceClient) -> None:
    async with running(tmp_path):
        call = context.enter("my-request", f"00-{'a' * 32}-{'b' * 16}-01")
        answer = await caller.call("GET", "/v1/context", Echo)
    assert answer.text == f"my-request {'a' * 32}"
    assert call.parent_span_id == "b" * 16


async def test_a_kept_reply_is_returned_again_until_it_changes(tmp_path: Path, caller: ServiceClient) -> None:
    async with running(tmp_path, "a"):
        first = await caller.call("GET", "/v1/words", Echo, keep=True)
        assert await caller.call("GET", "/v1/words", Echo, keep=True) is first
        assert await caller.call("GET", "/v1/words", Echo) is not first
        await caller.call("POST", "/v1/words", None, Echo(text="new"))
        assert (await caller.call("GET", "/v1/words", Echo, keep=True)).text == "new"
    async with running(tmp_path, "b"):  # a successor with another answer
        assert (await caller.call("GET", "/v1/words", Echo, keep=True)).text == ""


async def test_an_unchanged_answer_has_no_body(tmp_path: Path) -> None:
    async with running(tmp_path), raw_client(tmp_path) as http:
        whole = await http.get("/v1/words")
        assert whole.headers["etag"] == '"0-0"'
        same = await http.get("/v1/words", headers={"if-none-match": '"0-0"'})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", '"0-0"')
        assert (await http.get("/v1/words", headers={"if-none-match": '"0-1"'})).status_code == 200


async def test_without_a_replica_the_error_is_unavailable_and_names_the_folder(
    tmp_path: Path, caller: ServiceClient
) -> None:
    caller.patience = 0.1
    with pytest.raises(Unavailable, match=str(tmp_path / "demo")):
        await caller.call("GET", "/v1/who", Echo)


async def test_a_service_without_replicas_is_unavailable_at_the_deadline_too(caller: ServiceClient) -> None:
    with pytest.raises(Unavailable, match="demo is away"):
        await caller.call("GET", "/v1/who", Echo, deadline=0.1)


async def test_a_service_that_does_not_answer_exceeds_the_deadline(tmp_path: Path, caller: ServiceClient) -> None:
    release = asyncio.Event()
    async with running(tmp_path, release=release):
        with pytest.raises(DeadlineExceeded, match="/v1/slow"):
            await caller.call("GET", "/v1/slow", Echo, deadline=0.1)
        release.set()


async def test_a_draining_replica_finishes_requests_in_flight_and_new_ones_go_to_another(
    tmp_path: Path, caller: ServiceClient
) -> None:
    release = asyncio.Event()
    first = running(tmp_path, "first", release)
    await first.__aenter__()
    slow = asyncio.create_task(caller.call("GET", "/v1/slow", Echo))
    while not any(replica.in_flight for replica in caller._replicas.known.values()):
        await asyncio.sleep(0.005)
    async with running(tmp_path, "second"):
        draining = asyncio.create_task(first.__aexit__(None, None, None))
        while (tmp_path / "demo/first.sock").exists():
            await asyncio.sleep(0.005)
        assert (await caller.call("GET", "/v1/who", Echo)).text == "second"
        release.set()
        assert (await slow).text == "first"
        await draining


async def test_a_call_waits_for_a_replica_that_starts_late(tmp_path: Path, caller: ServiceClient) -> None:
    waiting = asyncio.create_task(caller.call("GET", "/v1/who", Echo))
    await asyncio.sleep(0)
    async with running(tmp_path, "late"):
        assert (await waiting).text == "late"


async def test_a_replica_that_starts_within_a_tick_of_the_last_look_is_found(
    tmp_path: Path, caller: ServiceClient
) -> None:
    """The kernel's clock ticks every few milliseconds, so two changes may leave the same time."""
    folder = tmp_path / "demo"
    folder.mkdir()
    tick = time.time_ns() + 60_000_000_000  # still within this tick, however slow the machine is
    os.utime(folder, ns=(tick, tick))
    with pytest.raises(Unavailable):
        await caller.call("GET", "/v1/who", Echo, deadline=0.01)
    async with running(tmp_path):
        os.utime(folder, ns=(tick, tick))
        assert (await caller.call("GET", "/v1/who", Echo, deadline=10)).text == "0"


async def test_patience_starts_when_a_replica_goes_away(tmp_path: Path, caller: ServiceClient) -> None:
    """A long-polling call may already be older than that when its replica dies."""
    caller.patience = 1
    (tmp_path / "demo").mkdir()
    path = tmp_path / "demo/short-lived.sock"

    async def die(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.2)
        path.unlink()
        writer.close()

    async with await asyncio.start_unix_server(die, path) as short_lived:
        waiting = asyncio.create_task(caller.call("GET", "/v1/who", Echo))
        while path.exists():
            await asyncio.sleep(0.01)
        short_lived.close()
        await asyncio.sleep(0.1)
        async with running(tmp_path, "successor"):
            assert (await waiting).text == "successor"


async def test_a_socket_without_a_listener_is_skipped(tmp_path: Path, caller: ServiceClient) -> None:
    async with running(tmp_path, "alive"):
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(tmp_path / "demo/dead.sock"))
        dead.close()
        for _ in range(5):
            assert (await caller.call("GET", "/v1/who", Echo)).text == "alive"


async def test_every_service_has_health_metrics_and_documentation(tmp_path: Path) -> None:
    async with running(tmp_path), raw_client(tmp_path) as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        assert (await http.get("/readyz")).status_code == 200
        assert "crisp_request_seconds" in (await http.get("/metrics")).text
        assert (await http.get("/docs")).status_code == 200
        problem = await http.get("/v1/absent")
        assert problem.headers["content-type"] == "application/problem+json"
        assert problem.json()["code"] == "NOT_FOUND"
        assert "total;dur=" in problem.headers["server-timing"]
    async with running(tmp_path, "unready"), raw_client(tmp_path, "unready") as http:
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.json()["detail"]) == (503, "the cable is out; plug it in")


async def test_only_root_and_the_group_may_use_the_socket(tmp_path: Path) -> None:
    async with running(tmp_path):
        status = (tmp_path / "demo/0.sock").stat()
        assert status.st_mode & 0o777 == 0o660
        assert status.st_gid == os.getgid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_connection_of_another_user_is_aborted(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o011) if folder.is_relative_to("/tmp/pytest-of-root") else None
    async with running(tmp_path):
        path = tmp_path / "demo/0.sock"
        path.chmod(0o666)
        script = (
            "import os,socket,sys; os.setgroups([]); os.setgid(64999); os.setuid(64999); s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "try: s.sendall(b'GET /healthz HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n'); print(len(s.recv(100)))\nexcept OSError: print(0)"
        )
        process = await asyncio.create_subprocess_exec(
            "/usr/bin/python3", "-c", script, str(path), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    assert output == b"0\n"


def test_systemd_is_notified_of_readiness(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        server.notify(str(tmp_path / "notify"), "READY=1")
        assert listener.recv(100) == b"READY=1"

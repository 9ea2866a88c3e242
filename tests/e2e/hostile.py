"""A client of the services' sockets that is the gateway's user, and hostile bodies for any route.

Bodies are made from the services' OpenAPI documents: each text field in turn gets a hostile value.
"""

import copy
import ctypes
import http.client
import itertools
import json
import os
import platform
import socket
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncinotify import Inotify, Mask

from crisplab.node import Node

_SYSCALLS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}  # setgroups, setresgid, setresuid
Step = str | int
AS_KEY = "the key itself"
"""The last step to a text that is the key of a table instead of a value."""
Document = Any
SECRET = "what only root may read"


def connect_as(user: int, group: int, path: Path) -> socket.socket:
    """Returns a connection to a unix socket that this user has made.

    Only one thread becomes that user: the kernel keeps credentials per thread, and remembers those
    that were in force when the connection was made (SO_PEERCRED).
    """
    connected: list[socket.socket | OSError] = []

    def connect() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        groups, resgid, resuid = _SYSCALLS[platform.machine()]
        for number, *arguments in ((groups, 0, None), (resgid, group, group, group), (resuid, user, user, user)):
            if libc.syscall(number, *arguments) != 0:
                connected.append(OSError(ctypes.get_errno(), "can't become another user"))
                return
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(os.fspath(path))
        except OSError as error:
            connected.append(error)
        else:
            connected.append(made)

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
    if isinstance(connected[0], OSError):
        raise connected[0]
    return connected[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """A service's answer."""

    status: int
    text: str

    @property
    def document(self) -> Document:
        """The answer's JSON; None if it has none."""
        return json.loads(self.text) if self.text else None


class Intruder:
    """Sends any request to any service of a node, as the gateway's user."""

    def __init__(self, node: Node) -> None:
        self._node = node
        user, _, group = node.gateway_user.partition(":")
        self._user, self._group = int(user), int(group)

    def send(
        self, service: str, method: str, path: str, body: Document = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends a request with this very path: nothing is normalized or escaped."""
        connection = http.client.HTTPConnection(service, timeout=120)
        connection.sock = connect_as(self._user, self._group, self._node.run / service / "0.sock")
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in {"content-type": "application/json", **(headers or {})}.items():
                connection.putheader(name, value)
            connection.putheader("content-length", str(len(content or b"")))
            connection.endheaders(content)
            response = connection.getresponse()
            return Answer(response.status, response.read().decode())
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Route:
    """A route of a service, and the schema of its body if it takes one."""

    service: str
    method: str
    path: str
    body: Mapping[str, Any] | None
    queries: tuple[str, ...]
    components: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The name of the body's model; "" without a body."""
        return str(self.body["$ref"]).rpartition("/")[2] if self.body else ""

    def text_fields(self) -> Iterator[tuple[Step, ...]]:
        """Yields where the body may hold text: names of fields, 0 for the first of a list."""
        if self.body is not None:
            yield from self._text_in(self.body, ())

    def _text_in(self, schema: Mapping[str, Any], at: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
        if "$ref" in schema:
            schema = self.components[schema["$ref"].rpartition("/")[2]]
        for option in schema.get("anyOf", ()):
            yield from self._text_in(option, at)
        if schema.get("type") == "string":
            yield at
        for name, inner in schema.get("properties", {}).items():
            yield from self._text_in(inner, (*at, name))
        if isinstance(schema.get("items"), dict):
            yield from self._text_in(schema["items"], (*at, 0))
        if isinstance(schema.get("additionalProperties"), dict):
            yield from self._text_in(schema["additionalProperties"], (*at, "key"))
            yield (*at, AS_KEY)


def routes(intruder: Intruder, service: str) -> list[Route]:
    """Returns all routes of a service's own, from the OpenAPI document that it serves."""
    document = intruder.send(service, "GET", "/openapi.json").document
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            body = content.get("application/json", {}).get("schema")
            queries = tuple(entry["name"] for entry in operation.get("parameters", ()) if entry["in"] == "query")
            components = document["components"]["schemas"]
            found.append(Route(service, method.upper(), path, body, queries, components))
    return found


def with_text(base: Document, at: tuple[Step, ...], text: str) -> Document:
    """Returns a copy of a document that has `text` at this place; makes what is missing above."""
    document = copy.deepcopy(base)
    here = document
    for step, following in itertools.pairwise(at):
        missing: Document = [] if isinstance(following, int) else {}
        if isinstance(here, list):
            if not here:
                here.append(missing)
            here = here[0]
        else:
            if not here.get(step):
                here[step] = missing
            here = here[step]
    if isinstance(here, list):
        here[:] = [text]
    elif at[-1] == AS_KEY:
        here[text] = "1"
    else:
        here[at[-1]] = text
    return document


class Canary:
    """A folder outside of the services', with a program, a secret, a checkpoint and a layout."""

    def __init__(self, folder: Path, image: str) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        (folder / "run").write_text(f"#!/bin/sh\n: > {folder}/ran\n")
        (folder / "run").chmod(0o755)
        (folder / "secret").write_text(SECRET)
        (folder / "pod.json").write_text(f'{{"pod": "{SECRET}", "containers": {{}}}}')
        (folder / "index.json").write_text(f'{{"manifests": "{SECRET}"}}')
        (folder / "config.dump").write_text(f'{{"id": "x", "name": "x", "rootfsImage": "{image}"}}')
        with tarfile.open(folder / "checkpoint.tar", "w") as archive:
            archive.add(folder / "config.dump", "config.dump")
        self.before = self._state()
        self.before = self._state()
        self._inotify = Inotify()
        for entry in folder.iterdir():
            if entry.name != "secret":  # a profile that CRI names may be read
                self._inotify.add_watch(entry, Mask.OPEN)

    def texts(self) -> Iterator[str]:
        """Yields hostile values of a text."""
        yield f"{self.folder}/run"
        yield f"{self.folder}/made/new"
        yield f"x/../../../../../../../../../../..{self.folder}/made"
        yield f"$({self.folder}/run);{self.folder}/run\n{self.folder}/run"
        yield f"{self.folder}/checkpoint.tar"
        yield str(self.folder)

    def check(self, about: object) -> None:
        """Fails if anything there was made, changed, run or opened."""
        assert self._state() == self.before, about
        opened = []
        self._inotify.sync_timeout = 0
        while (event := self._inotify.sync_get()) is not None:
            opened.append(event.path)
        assert not opened, about

    def _state(self) -> dict[str, tuple[int, int, int]]:
        """Returns what lstat(2) says; the kernel sets ctime at every change."""
        found = {}
        for here, _, names in os.walk(self.folder):
            for name in (".", *names):
                path = Path(here, name)
                status = path.lstat()
                found[str(path)] = (status.st_ctime_ns, status.st_mode, status.st_size)
        return found

"""What tests wait for and compare with."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
import httpx

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone
from crisplab.cri import Cri

T = TypeVar("T")
NO_FOLDERS = '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}'
"""A seccomp profile under which no folder can be made."""


def wait_for(
    ask: Callable[[], T | None], *, seconds: float = 20, ignore: type[Exception] | tuple[type[Exception], ...] = ()
) -> T:
    """The first answer that is true; asks every 20 ms. Fails after `seconds`."""
    deadline = time.monotonic() + seconds * clone.SLOWNESS
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            answer = ask()
        except ignore as error:
            last = error
        else:
            if answer:
                return answer
        time.sleep(0.02)
    raise AssertionError(f"nothing came within {seconds} s") from last


def when(path: str) -> str:
    """The part of a script that waits for a file."""
    return f"while ! test -e {path}; do sleep 0.1; done;"


def exited(client: Cri, container: str) -> cri.ContainerStatus | None:
    """The status of a container once it has ended, for `until`."""
    status = client.status(container)
    return status if status.state == cri.CONTAINER_EXITED else None


def network_condition(client: Cri, timeout: float = 20) -> cri.RuntimeCondition:
    """What the node says of its network (Status)."""
    status = client.runtime.Status(cri.StatusRequest(), timeout=timeout).status
    return next(condition for condition in status.conditions if condition.type == "NetworkReady")


def page(address: str, timeout: float = 5) -> str:
    """What a web server says at its root. verify: nothing is encrypted there, and to load the certificate authorities takes 20 ms."""
    return httpx.get(f"http://{address}/", timeout=timeout, trust_env=False, verify=False).raise_for_status().text


def page_once_up(address: str, timeout: float = 5) -> str:
    """The same of a web server that may not listen yet."""
    return wait_for(partial(page, address, timeout), ignore=httpx.HTTPError)


def error_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The code and message that a call is refused with."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call succeeded")


@contextmanager
def refused(code: grpc.StatusCode, text: str = "") -> Iterator[None]:
    """A call in the block must be refused with this code, and with this in its message."""
    try:
        yield
    except grpc.RpcError as error:
        assert error.code() is code, error.details()
        assert text in (error.details() or "")
        return
    raise AssertionError("the call succeeded")


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """The code that a call is refused with."""
    return error_of(call)[0]


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a CRI log file."""

    time: str
    stream: str
    tag: str
    text: str


def log_lines(path: Path) -> list[LogLine]:
    """The lines of a log file so far."""
    if not path.exists():
        return []
    return [LogLine(*line.split(" ", 3)) for line in path.read_text().splitlines()]


def output_of(path: Path) -> str:
    """A container's standard output so far; pieces of a line (P) are put together."""
    return "".join(
        line.text + ("" if line.tag == "P" else "\n") for line in log_lines(path) if line.stream == "stdout"
    ).rstrip("\n")

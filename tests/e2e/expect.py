"""Conditions to wait for, and calls that must be refused."""

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
"""A seccomp profile that forbids to make folders."""


def wait_for(
    ask: Callable[[], T | None], *, seconds: float = 20, ignore: type[Exception] | tuple[type[Exception], ...] = ()
) -> T:
    """Asks every 20 ms and returns the first answer that is true; fails after `seconds`."""
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
    """Returns the part of a shell script that waits for a file."""
    return f"while ! test -e {path}; do sleep 0.1; done;"


def exited(client: Cri, container: str) -> cri.ContainerStatus | None:
    """Returns a container's status if it has ended, for `wait_for`."""
    status = client.status(container)
    return status if status.state == cri.CONTAINER_EXITED else None


def network_condition(client: Cri, timeout: float = 20) -> cri.RuntimeCondition:
    """Returns the condition NetworkReady of Status."""
    status = client.runtime.Status(cri.StatusRequest(), timeout=timeout).status
    return next(condition for condition in status.conditions if condition.type == "NetworkReady")


def page(address: str, timeout: float = 5) -> str:
    """Returns a web server's root page.

    verify=False saves 20 ms of loading certificate authorities: the connection is not encrypted.
    """
    return httpx.get(f"http://{address}/", timeout=timeout, trust_env=False, verify=False).raise_for_status().text


def page_once_up(address: str, timeout: float = 5) -> str:
    """Returns the root page of a web server that may not listen yet."""
    return wait_for(partial(page, address, timeout), ignore=httpx.HTTPError)


def error_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Returns the code and message of a call that must fail."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call succeeded")


@contextmanager
def refused(code: grpc.StatusCode, text: str = "") -> Iterator[None]:
    """Checks that a call in the block fails with this code and this text in its message."""
    try:
        yield
    except grpc.RpcError as error:
        assert error.code() is code, error.details()
        assert text in (error.details() or "")
        return
    raise AssertionError("the call succeeded")


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """Returns the code of a call that must fail."""
    return error_of(call)[0]


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a CRI log file."""

    time: str
    stream: str
    tag: str
    text: str


def log_lines(path: Path) -> list[LogLine]:
    """Returns the lines that a log file has so far."""
    if not path.exists():
        return []
    return [LogLine(*line.split(" ", 3)) for line in path.read_text().splitlines()]


def output_of(path: Path) -> str:
    """Returns a container's standard output so far; the pieces of a line (tag P) are joined."""
    return "".join(
        line.text + ("" if line.tag == "P" else "\n") for line in log_lines(path) if line.stream == "stdout"
    ).rstrip("\n")

"""Crash points: their names, how to arm one, and how a client such as kubelet retries after it."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc

from crisplab import clone
from crisplab.node import Node

T = TypeVar("T")


def crashpoints() -> list[str]:
    """Returns the names of all crash points in the services' sources."""
    sources = (clone.ROOT / "services").glob("*/src/**/*.py")
    return sorted({name for file in sources for name in re.findall(r'crashpoint\("([a-z-]+)"\)', file.read_text())})


def arm(node: Node, point: str) -> Path:
    """Arms a point and returns its file, which a process removes when it dies there."""
    file = Path(node.environment["CRISP_CRASHPOINTS"]) / point
    file.touch()
    return file


def retried(call: Callable[[], T]) -> T:
    """Repeats a call for up to a minute while a service is away, as kubelet does.

    Any other error is raised.
    """
    deadline = time.monotonic() + 60
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(0.1)

"""Crash points: which there are, how one is armed, and how a client like kubelet gets over it."""

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
    """The names in the services' sources."""
    sources = (clone.ROOT / "services").glob("*/src/*/*.py")
    return sorted({name for file in sources for name in re.findall(r'crashpoint\("([a-z-]+)"\)', file.read_text())})


def arm(node: Node, point: str) -> Path:
    """The file that stands for the armed point; gone once a process has died there."""
    file = Path(node.environment["CRISP_CRASHPOINTS"]) / point
    file.touch()
    return file


def retried(call: Callable[[], T]) -> T:
    """As kubelet does it: the same call again while the runtime is away. Nothing else is forgiven."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(0.1)

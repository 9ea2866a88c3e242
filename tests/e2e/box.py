"""A running pod for tests of Exec, Attach and PortForward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config

SUCCESS = {"metadata": {}, "status": "Success"}
"""What the error channel carries when a command or an attached container ended with 0."""
CLOSE_STDIN = bytes([255, 0])
"""The message of WebSocket protocol v5 that ends stdin (channel 0)."""


@dataclass(frozen=True)
class Box:
    """A running pod with containers of several kinds."""

    client: Cri
    pod: str
    sleeper: str
    cat: str
    logs: Path
    image: str
    config: cri.PodSandboxConfig

    def exec(self, *command: str, tty: bool = False, stdin: bool = False, container: str = "") -> str:
        """Returns the URL of an Exec."""
        request = cri.ExecRequest(
            container_id=container or self.sleeper, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty
        )
        return self.client.runtime.Exec(request, timeout=self.client.timeout).url

    def attach(self, container: str, *, tty: bool = False, stdin: bool = True) -> str:
        """Returns the URL of an Attach."""
        request = cri.AttachRequest(container_id=container, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
        return self.client.runtime.Attach(request, timeout=self.client.timeout).url

    def forward(self, *ports: int) -> str:
        """Returns the URL of a PortForward."""
        return self.client.runtime.PortForward(
            cri.PortForwardRequest(pod_sandbox_id=self.pod, port=ports), timeout=self.client.timeout
        ).url

    def run(self, name: str, *command: str, **more: Any) -> str:
        """Starts one more container and returns its id."""
        return self.client.run(self.pod, container_config(self.image, command, name=name, **more), self.config)


@contextmanager
def running_box(client: Cri, world: World, logs: Path) -> Iterator[Box]:
    """Keeps the pod running for as long as the block lasts."""
    config = pod_config("streams", log_directory=logs)
    with client.pod(config) as pod:
        web = client.run(pod, container_config(world.image, name="web"), config)
        cat = client.run(pod, container_config(world.image, ["cat"], name="cat", stdin=True), config)
        yield Box(client, pod, web, cat, logs, world.image, config)

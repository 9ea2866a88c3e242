"""Flows of Exec, Attach and PortForward: check the request, and return a URL for one use.

The URL is good for a minute.
"""

import asyncio
from collections.abc import Sequence

from cri_gateway import lookup
from cri_gateway.services import Services
from crisp_proto.monitor import ProcessState
from crisp_proto.runtime import Container, PodState
from crisp_proto.streams import Session, SessionKind
from servicekit.errors import FailedPrecondition, InvalidArgument


class Sessions:
    """Opens sessions in monitor-svc. `base` is the streaming server's URL."""

    def __init__(self, services: Services, base: str) -> None:
        self._services = services
        self._base = base

    async def open_exec(self, session: Session) -> str:
        """Returns the URL for a command in a container.

        `session.id` may be a unique prefix of the container's id.
        """
        if not session.command:
            raise InvalidArgument("cmd is empty", hint="give the command to run", field="cmd")
        _check_streams(session)
        container = await self._running_container(session.id)
        return await self._url(session.model_copy(update={"id": container.id}))

    async def open_attach(self, session: Session) -> str:
        """Returns the URL for a container's own input and output.

        `session.id` may be a unique prefix of the container's id.
        """
        _check_streams(session)
        container = await self._running_container(session.id)
        tty = container.config.tty
        if session.tty != tty:
            raise InvalidArgument(
                f"tty = {session.tty}: the container was created with tty = {tty}, and this must match", field="tty"
            )
        return await self._url(session.model_copy(update={"id": container.id}))

    async def open_port_forward(self, pod_id: str, ports: Sequence[int]) -> str:
        """Returns the URL for ports of a pod. `pod_id` may be a unique prefix of an id."""
        for port in ports:
            if not 1 <= port <= 65535:
                raise InvalidArgument(f"port = {port}: a number from 1 to 65535", field="port")
        pod = await self._services.runtime.pod(await lookup.pod_id(self._services.runtime, pod_id))
        if pod.state is not PodState.READY:
            raise FailedPrecondition(f"pod {pod.id} is not ready: it was stopped", field="pod_sandbox_id")
        return await self._url(
            Session(
                kind=SessionKind.PORT_FORWARD, id=pod.id, ports=list(ports), node_network=pod.config.on_node_network
            )
        )

    async def _running_container(self, text: str) -> Container:
        container_id = await lookup.container_id(self._services.runtime, text)
        container, process = await asyncio.gather(
            self._services.runtime.container(container_id), self._services.monitor.process(container_id)
        )
        if process.state is not ProcessState.ALIVE or not container.started_at:
            raise FailedPrecondition(f"container {container_id} is not running", field="container_id")
        return container

    async def _url(self, session: Session) -> str:
        token = (await self._services.monitor.create_session(session)).token
        return f"{self._base}/{session.kind}/{token}"


def _check_streams(session: Session) -> None:
    if not (session.stdin or session.stdout or session.stderr):
        raise InvalidArgument(
            "none of stdin, stdout and stderr is asked for", hint="ask for one at least", field="stdout"
        )
    if session.tty and session.stderr:
        raise InvalidArgument("stderr = true with tty = true: a terminal has one output, stdout", field="stderr")

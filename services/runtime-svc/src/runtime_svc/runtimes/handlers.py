"""RuntimeClass handlers: the OCI runtimes that this node offers, and what each can do."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from crisp_proto.runtime import Container, Handler
from runtime_svc.runtimes import features
from runtime_svc.runtimes.features import Features
from runtime_svc.runtimes.oci_runtime import OciRuntime
from runtime_svc.settings import HandlerSettings, RuntimeSettings
from servicekit.errors import FailedPrecondition, InvalidArgument


class Handlers:
    """The handlers of the settings; those without an executable are refused and not listed."""

    def __init__(self, settings: RuntimeSettings, run: Path) -> None:
        self._settings = settings
        self._runtimes = {
            name: OciRuntime(name, handler.path, handler.root or run / "oci" / name, settings.runtime_timeout)
            for name, handler in settings.handlers.items()
        }
        for runtime in self._runtimes.values():
            runtime.root.mkdir(parents=True, exist_ok=True)
        self._probes: dict[tuple[Path, int], asyncio.Task[Features]] = {}

    def get(self, name: str) -> OciRuntime:
        """Returns the runtime of a handler; an empty name stands for the default one.

        Raises InvalidArgument.
        """
        runtime = self._runtimes.get(name or self._settings.default_handler)
        if runtime is None:
            raise InvalidArgument(
                f"runtime handler {name!r} is unknown",
                hint=f"this node has: {', '.join(sorted(self._runtimes))}",
                field="runtime_handler",
            )
        if not _is_installed(runtime.path):
            raise InvalidArgument(
                f"runtime handler {runtime.name!r}: {runtime.path} is not there",
                hint="install it or correct runtime.handlers",
                field="runtime_handler",
            )
        return runtime

    def of(self, container: Container) -> OciRuntime:
        """Returns the runtime that made a container, with its state, whatever the settings say now.

        If its executable is gone, that of another handler with the same name is used. Raises
        FailedPrecondition if there is none, or if the container's record could not be read.
        """
        made = OciRuntime.by_command(container.launch.runtime, self._settings.runtime_timeout)
        if made is None:
            raise FailedPrecondition(
                f"the record of container {container.id} could not be read: all that can be done with it is to remove it"
            )
        same_name = [runtime.path for runtime in self._runtimes.values() if runtime.path.name == made.path.name]
        for path in (made.path, *same_name):
            if _is_installed(path):
                return replace(made, path=path)
        raise FailedPrecondition(
            f"{made.path}, which made container {container.id}, is not there",
            hint="install it again, or name it in runtime.handlers",
        )

    def to_remove(self, container: Container, handler: str) -> OciRuntime:
        """Returns the runtime to remove a container with: its own, or that of its row's `handler`.

        Raises FailedPrecondition or InvalidArgument if this node has neither.
        """
        is_known = OciRuntime.by_command(container.launch.runtime, self._settings.runtime_timeout) is not None
        return self.of(container) if is_known else self.get(handler)

    def states_of(self, container: Container) -> list[Path]:
        """Returns the folders that may hold the OCI runtime's state of a container."""
        made = OciRuntime.by_command(container.launch.runtime, self._settings.runtime_timeout)
        roots = [runtime.root for runtime in self._runtimes.values()] + ([made.root] if made else [])
        return [root / container.id for root in roots]

    def settings(self, name: str) -> HandlerSettings:
        """Returns the settings of a known handler."""
        return self._settings.handlers[name or self._settings.default_handler]

    async def features(self, runtime: OciRuntime) -> Features:
        """Returns what a runtime can do here.

        Probes each version of its executable once, and again if the probe failed.
        """
        version = (runtime.path, runtime.path.stat().st_mtime_ns)
        probe = self._probes.get(version)
        if probe is None or (probe.done() and (probe.cancelled() or probe.exception())):
            # In a task of its own: a caller that gives up must not end the probe for the others.
            probe = self._probes[version] = asyncio.create_task(features.probe(runtime, self._settings.pause))
        return await asyncio.shield(probe)

    async def probe_all(self) -> None:
        """Probes every runtime that is installed."""
        await asyncio.gather(
            *(self.features(runtime) for runtime in self._runtimes.values() if _is_installed(runtime.path))
        )

    async def close(self) -> None:
        """Cancels running probes; each removes its trial container."""
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)

    async def all(self) -> list[Handler]:
        """Returns what Status reports.

        kubelet expects the default handler under its own name and under the empty one.
        """
        found = []
        for name, runtime in sorted(self._runtimes.items()):
            if not _is_installed(runtime.path):
                continue
            can = await self.features(runtime)
            default = name == self._settings.default_handler
            found += [
                Handler(
                    name=shown,
                    runtime=str(runtime.path),
                    default=default,
                    recursive_read_only_mounts=can.recursive_read_only,
                    user_namespaces=can.user_namespaces,
                    no_checkpoint=can.no_checkpoint or "",
                )
                for shown in (("", name) if default else (name,))
            ]
        return found


def _is_installed(executable: Path) -> bool:
    return os.access(executable, os.X_OK)

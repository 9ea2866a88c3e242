"""RuntimeClass handlers: which OCI runtimes this node offers, and what each can do."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from crisp_proto.runtime import Container, Handler
from runtime_svc import features
from runtime_svc.features import Features
from runtime_svc.oci_runtime import OciRuntime
from runtime_svc.settings import HandlerSettings, RuntimeSettings
from servicekit.errors import FailedPrecondition, InvalidArgument


class Handlers:
    """The handlers of the settings whose executables are installed."""

    def __init__(self, settings: RuntimeSettings, run: Path) -> None:
        self._settings = settings
        self._runtimes = {
            name: OciRuntime(name, handler.path, handler.root or run / "oci" / name, settings.runtime_timeout)
            for name, handler in settings.handlers.items()
        }
        for runtime in self._runtimes.values():
            runtime.root.mkdir(parents=True, exist_ok=True)
        self._asked: dict[tuple[Path, int], asyncio.Task[Features]] = {}

    def get(self, name: str) -> OciRuntime:
        """The runtime of a handler; empty means the default one. Raises InvalidArgument."""
        runtime = self._runtimes.get(name or self._settings.default_handler)
        if runtime is None:
            raise InvalidArgument(
                f"runtime handler {name!r} is unknown; this node has: {', '.join(sorted(self._runtimes))}",
                field="runtime_handler",
            )
        if not _is_installed(runtime.path):
            raise InvalidArgument(
                f"runtime handler {runtime.name!r}: {runtime.path} is not there; install it or correct runtime.handlers",
                field="runtime_handler",
            )
        return runtime

    def of(self, container: Container) -> OciRuntime:
        """The runtime that made a container, with its state, whatever the settings say by now.

        If its executable is gone, a handler's of the same name will do. Raises FailedPrecondition if there is none, or no readable record.
        """
        if not container.launch.runtime:
            raise FailedPrecondition(
                f"the record of container {container.id} could not be read: all that can be done with it is to remove it"
            )
        made = OciRuntime.by_command(container.launch.runtime, self._settings.runtime_timeout)
        for path in (
            made.path,
            *(runtime.path for runtime in self._runtimes.values() if runtime.path.name == made.path.name),
        ):
            if _is_installed(path):
                return replace(made, path=path)
        raise FailedPrecondition(
            f"{made.path}, which made container {container.id}, is not there; install it again, or name it in runtime.handlers"
        )

    def settings(self, name: str) -> HandlerSettings:
        """A known handler's settings."""
        return self._settings.handlers[name or self._settings.default_handler]

    async def features(self, runtime: OciRuntime) -> Features:
        """What a runtime can do here; asked once for each version of its executable, and again if it could not be asked."""
        version = (runtime.path, runtime.path.stat().st_mtime_ns)
        asking = self._asked.get(version)
        if asking is None or (asking.done() and (asking.cancelled() or asking.exception())):
            # Not the caller's own task: one who gives up must not end it for the others.
            asking = self._asked[version] = asyncio.create_task(features.ask(runtime, self._settings.pause))
        return await asyncio.shield(asking)

    async def ask_all(self) -> None:
        """Asks every runtime that is installed."""
        await asyncio.gather(
            *(self.features(runtime) for runtime in self._runtimes.values() if _is_installed(runtime.path))
        )

    async def close(self) -> None:
        """Ends trials that are under way; each takes its container with it."""
        for asking in self._asked.values():
            asking.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def all(self) -> list[Handler]:
        """What Status reports: the default handler under its own name and under the empty one, as kubelet expects."""
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
                    no_checkpoint=can.no_checkpoint,
                )
                for shown in (("", name) if default else (name,))
            ]
        return found


def _is_installed(executable: Path) -> bool:
    return os.access(executable, os.X_OK)

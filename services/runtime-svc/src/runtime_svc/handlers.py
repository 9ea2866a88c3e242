"""RuntimeClass handlers: which OCI runtimes this node offers, and what each can do."""

import os
from pathlib import Path

from crisp_proto.runtime import Handler
from runtime_svc.oci_runtime import OciRuntime
from runtime_svc.settings import RuntimeSettings
from servicekit.errors import InvalidArgument


class Handlers:
    """The handlers of the settings whose executables are installed."""

    def __init__(self, settings: RuntimeSettings, run: Path) -> None:
        self._default = settings.default_handler
        self._runtimes = {
            name: OciRuntime(name, handler.path, run / "oci" / name, settings.runtime_timeout)
            for name, handler in settings.handlers.items()
        }
        for runtime in self._runtimes.values():
            runtime.root.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> OciRuntime:
        """The runtime of a handler; empty means the default one. Raises InvalidArgument."""
        runtime = self._runtimes.get(name or self._default)
        if runtime is None:
            raise InvalidArgument(
                f"runtime handler {name!r} is unknown; this node has: {', '.join(sorted(self._runtimes))}", field="runtime_handler"
            )
        if not os.access(runtime.path, os.X_OK):
            raise InvalidArgument(
                f"runtime handler {runtime.name!r}: {runtime.path} is not there; install it or correct runtime.handlers",
                field="runtime_handler",
            )
        return runtime

    def all(self) -> list[Handler]:
        """What Status reports: the default handler under its own name and under the empty one, as kubelet expects."""
        installed = {name: runtime for name, runtime in sorted(self._runtimes.items()) if os.access(runtime.path, os.X_OK)}
        return [
            # Neither feature is promised before the runtime itself has been asked.
            Handler(
                name=shown,
                runtime=str(runtime.path),
                default=name == self._default,
                recursive_read_only_mounts=False,
                user_namespaces=False,
            )
            for name, runtime in installed.items()
            for shown in (("", name) if name == self._default else (name,))
        ]

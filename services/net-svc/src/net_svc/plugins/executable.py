"""CNI plugins run as executables (CNI spec sections 2 and 3)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from net_svc.cni import Document, NetworkConfiguration, PodRef, Result, parse_json, result_from
from net_svc.plugins.interface import Plugin
from servicekit import logs
from servicekit.errors import FailedPrecondition, Internal
from servicekit.linux.programs import Finished, run

_log = logs.get()


def find(kind: str, bin_dirs: Sequence[Path]) -> Path:
    """Returns the executable of a plugin type. Raises FailedPrecondition."""
    for folder in bin_dirs:
        path = folder / kind
        if "/" not in kind and os.access(path, os.X_OK):
            return path
    raise FailedPrecondition(
        f"CNI plugin {kind!r} is in none of {', '.join(map(str, bin_dirs))}",
        hint="install it (Debian: containernetworking-plugins) or correct cni_bin_dirs",
    )


class ExecutablePlugin(Plugin):
    """A plugin that is found in net.cni_bin_dirs and run for each ADD and DEL."""

    def __init__(
        self, plugin: Document, network: NetworkConfiguration, bin_dirs: Sequence[Path], timeout: float
    ) -> None:
        self._plugin = plugin
        self._network = network
        self._bin_dirs = bin_dirs
        self._timeout = timeout

    async def add(self, pod: PodRef, previous: Result | None) -> Result | None:
        """Runs ADD; a plugin that prints no result passes the previous one on."""
        return await self._execute("ADD", pod, previous)

    async def delete(self, pod: PodRef) -> None:
        """Runs DEL.

        An uninstalled plugin is logged and skipped: it must not keep pods from being removed (CNI
        spec section 2: DEL should succeed).
        """
        try:
            await self._execute("DEL", pod, None)
        except FailedPrecondition as error:
            _log.error("cni-delete-skipped", plugin=self._plugin["type"], attachment=pod.id, error=error.message)

    async def _execute(self, command: str, pod: PodRef, previous: Result | None) -> Result | None:
        path = find(self._plugin["type"], self._bin_dirs)
        config = json.dumps(self._config(pod, previous)).encode()
        finished = await run([str(path)], deadline=self._timeout, stdin=config, env=self._environment(command, pod))
        printed = _printed(finished)
        if finished.returncode != 0:
            raise Internal(
                f"CNI plugin {self._plugin['type']} of network {self._network.name} failed at {command} for pod {pod.namespace}/{pod.name}: {_fault(finished, printed)}"
            )
        return previous if printed is None else result_from(printed, self._network.version)

    def _config(self, pod: PodRef, previous: Result | None) -> Document:
        """Returns the plugin's configuration with what libcni adds to it (CNI spec section 3)."""
        config: Document = {**self._plugin, "name": self._network.name, "cniVersion": self._network.version}
        wanted = config.pop("capabilities", None) or {}
        if wanted.get("portMappings") and pod.port_mappings:
            config["runtimeConfig"] = {"portMappings": list(pod.port_mappings)}
        if previous is not None:
            config["prevResult"] = previous.to_document()
        return config

    def _environment(self, command: str, pod: PodRef) -> dict[str, str]:
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.id,
            "CNI_NETNS": pod.netns,
            "CNI_IFNAME": pod.interface,
            "CNI_PATH": ":".join(map(str, self._bin_dirs)),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name};K8S_POD_INFRA_CONTAINER_ID={pod.id};K8S_POD_UID={pod.uid}",
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        }


def _printed(finished: Finished) -> Document | None:
    """Returns the JSON object that a plugin printed, if it did."""
    try:
        document = parse_json(finished.stdout)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _fault(finished: Finished, printed: Document | None) -> str | None:
    """Returns what a plugin says about its failure (CNI spec section 5, Error)."""
    if printed is not None:
        return printed.get("msg") or printed.get("details")
    return (finished.stderr or finished.stdout).decode(errors="replace").strip()[:500]

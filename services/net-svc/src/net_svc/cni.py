"""CNI network configurations and plugin results (CNI spec 0.3.1 to 1.1), and plugins run as the spec says, by exec."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servicekit import logs
from servicekit.errors import FailedPrecondition, Internal
from servicekit.linux.programs import run

SUPPORTED_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
_log = logs.get()

Document = dict[str, Any]
"""JSON whose shape is the CNI spec's; read through the functions here only."""


@dataclass(frozen=True, slots=True)
class NetworkConfiguration:
    """A network: its plugins in order (CNI spec section 1), and the file that it comes from."""

    name: str
    version: str
    plugins: tuple[Document, ...]
    origin: str

    def to_json(self) -> str:
        """The configuration list, as it is kept for the DEL of what was added by it."""
        return json.dumps({"cniVersion": self.version, "name": self.name, "plugins": list(self.plugins)})


@dataclass(frozen=True, slots=True)
class PodRef:
    """Whom a plugin is called for (CNI spec section 2: parameters)."""

    id: str
    netns: str
    namespace: str
    name: str
    uid: str
    port_mappings: tuple[Document, ...] = ()
    interface: str = "eth0"


@dataclass(slots=True)
class Result:
    """What a chain of plugins has made so far (CNI spec section 5)."""

    version: str
    interfaces: list[Document] = field(default_factory=list)
    ips: list[Document] = field(default_factory=list)
    routes: list[Document] = field(default_factory=list)
    dns: Document = field(default_factory=dict)

    def to_document(self) -> Document:
        """As prevResult has it; versions before 1.0 name each address's family."""
        ips = self.ips
        if self.version.startswith("0."):
            ips = [{"version": "6" if ":" in ip["address"] else "4", **ip} for ip in ips]
        return {
            "cniVersion": self.version,
            "interfaces": self.interfaces,
            "ips": ips,
            "routes": self.routes,
            "dns": self.dns,
        }


def result_from(document: Document, version: str) -> Result:
    """A Result out of what a plugin printed."""
    return Result(
        version,
        list(document.get("interfaces") or []),
        [{key: value for key, value in ip.items() if key != "version"} for ip in document.get("ips") or []],
        list(document.get("routes") or []),
        dict(document.get("dns") or {}),
    )


def load_configuration(folder: Path) -> NetworkConfiguration | None:
    """The first valid file by name, as libcni and kubelet's other runtimes choose; None if the folder has no file.

    Raises FailedPrecondition that names each file and its fault if there are files, but no valid one.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".conflist", ".conf", ".json"))
    except FileNotFoundError:
        return None
    faults = []
    for path in files:
        try:
            return parse_configuration(path.read_text(), str(path))
        except (OSError, FailedPrecondition) as error:
            faults.append(str(error))
            _log.warning("cni-configuration-refused", file=str(path), fault=str(error))
    if faults:
        raise FailedPrecondition(
            f"no valid CNI configuration in {folder}: {'; '.join(faults)}; correct or remove it", field="cni_conf_dir"
        )
    return None


def parse_configuration(text: str, origin: str) -> NetworkConfiguration:
    """A configuration list, or a single plugin's configuration. Raises FailedPrecondition that says what is wrong."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise FailedPrecondition(f"{origin} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FailedPrecondition(f"{origin} is not a JSON object")
    plugins = document.get("plugins", [document])
    name, version = document.get("name"), document.get("cniVersion", "")
    if not name or not isinstance(name, str):
        raise FailedPrecondition(f"{origin} lacks a name")
    if version not in SUPPORTED_VERSIONS:
        raise FailedPrecondition(
            f"{origin}: cniVersion {version!r} is not supported; use one of {', '.join(SUPPORTED_VERSIONS)}"
        )
    if (
        not isinstance(plugins, list)
        or not plugins
        or not all(isinstance(plugin, dict) and isinstance(plugin.get("type"), str) for plugin in plugins)
    ):
        raise FailedPrecondition(f"{origin}: plugins must be a list of objects that each have a type")
    return NetworkConfiguration(name, version, tuple(plugins), origin)


def find_plugin(kind: str, bin_dirs: Sequence[Path]) -> Path:
    """The executable of a plugin type. Raises FailedPrecondition."""
    for folder in bin_dirs:
        path = folder / kind
        if "/" not in kind and os.access(path, os.X_OK):
            return path
    raise FailedPrecondition(
        f"CNI plugin {kind!r} is in none of {', '.join(map(str, bin_dirs))}; install it (Debian: containernetworking-plugins) or correct cni_bin_dirs"
    )


async def execute(
    command: str,
    plugin: Document,
    network: NetworkConfiguration,
    pod: PodRef,
    previous: Result | None,
    bin_dirs: Sequence[Path],
    timeout: float,
) -> Result | None:
    """Runs one plugin of a network for ADD or DEL (CNI spec sections 2 and 3) and answers its result, if it printed one."""
    path = find_plugin(plugin["type"], bin_dirs)
    config: Document = {**plugin, "name": network.name, "cniVersion": network.version}
    wanted = plugin.get("capabilities") or {}
    config.pop("capabilities", None)
    if wanted.get("portMappings") and pod.port_mappings:
        config["runtimeConfig"] = {"portMappings": list(pod.port_mappings)}
    if previous is not None:
        config["prevResult"] = previous.to_document()
    env = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod.id,
        "CNI_NETNS": pod.netns,
        "CNI_IFNAME": pod.interface,
        "CNI_PATH": ":".join(map(str, bin_dirs)),
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name};K8S_POD_INFRA_CONTAINER_ID={pod.id};K8S_POD_UID={pod.uid}",
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    }
    finished = await run([str(path)], deadline=timeout, stdin=json.dumps(config).encode(), env=env)
    try:
        printed = json.loads(finished.stdout) if finished.stdout.strip() else None
    except ValueError:
        printed = None
    if finished.returncode != 0:
        message = (
            printed.get("msg") or printed.get("details")
            if isinstance(printed, dict)
            else (finished.stderr or finished.stdout).decode(errors="replace").strip()[:500]
        )
        raise Internal(
            f"CNI plugin {plugin['type']} of network {network.name} failed at {command} for pod {pod.namespace}/{pod.name}: {message}"
        )
    return result_from(printed, network.version) if isinstance(printed, dict) else previous

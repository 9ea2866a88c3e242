"""CNI's documents: network configurations and plugin results (CNI spec 0.3.1 to 1.1)."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servicekit import logs
from servicekit.errors import FailedPrecondition
from servicekit.linux import files

SUPPORTED_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
_MAX_BYTES = 1 << 20
_log = logs.get()

Document = dict[str, Any]
"""JSON whose shape the CNI spec defines."""


@dataclass(frozen=True, slots=True)
class NetworkConfiguration:
    """A network: its plugins in order (CNI spec section 1), and the file it comes from."""

    name: str
    version: str
    plugins: tuple[Document, ...]
    origin: str

    def to_json(self) -> str:
        """Returns the configuration list, which is stored until the DEL of what it added."""
        return json.dumps({"cniVersion": self.version, "name": self.name, "plugins": list(self.plugins)})


@dataclass(frozen=True, slots=True)
class PodRef:
    """The pod that a plugin is called for (CNI spec section 2, parameters).

    `netns` is the path of its namespace; `port_mappings` are in the form of CNI's portMappings.
    """

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
        """Returns the result in the form of prevResult.

        Versions before 1.0 name the family of each address.
        """
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
    """Reads the result that a plugin printed."""
    return Result(
        version,
        list(document.get("interfaces") or []),
        [{key: value for key, value in ip.items() if key != "version"} for ip in document.get("ips") or []],
        list(document.get("routes") or []),
        dict(document.get("dns") or {}),
    )


def parse_json(text: str | bytes) -> Any:
    """Parses JSON. Raises ValueError, also for a document that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def load_configuration(folder: Path) -> NetworkConfiguration | None:
    """Returns the first valid configuration by file name, as libcni does; None without any file.

    Raises FailedPrecondition if there are files but none is valid; it names each file and its
    fault.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".conflist", ".conf", ".json"))
    except FileNotFoundError:
        return None
    faults = []
    for path in paths:
        try:
            return parse_configuration(files.read_regular(path, limit=_MAX_BYTES), str(path))
        except (OSError, FailedPrecondition) as error:
            faults.append(str(error))
            _log.warning("cni-configuration-refused", file=str(path), fault=str(error))
    if faults:
        raise FailedPrecondition(
            f"no valid CNI configuration in {folder}: {'; '.join(faults)}",
            hint="correct or remove it",
            field="cni_conf_dir",
        )
    return None


def parse_configuration(text: str | bytes, origin: str) -> NetworkConfiguration:
    """Parses a configuration list, or the configuration of a single plugin.

    Raises FailedPrecondition with the fault; `origin` names the source in that message.
    """
    try:
        document = parse_json(text)
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
            f"{origin}: cniVersion {version!r} is not supported", hint=f"use one of {', '.join(SUPPORTED_VERSIONS)}"
        )
    if not _are_plugins(plugins):
        raise FailedPrecondition(f"{origin}: plugins must be a list of objects that each have a type")
    return NetworkConfiguration(name, version, tuple(plugins), origin)


def _are_plugins(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(plugin, dict) and isinstance(plugin.get("type"), str) for plugin in value)

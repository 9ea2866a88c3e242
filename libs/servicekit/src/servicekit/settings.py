"""Settings: a TOML file, drop-ins, the environment and flags, each overriding the one before.

    /etc/crisp/crisp.toml            [node], [image], [runtime], [net], [monitor], [gateway]
    /etc/crisp/crisp.toml.d/*.toml   in the order of their names
    CRISP_IMAGE_PULL_TIMEOUT=60      section and key, upper case
    --set image.pull_timeout=60      highest

An unknown key is an error that names the file and the nearest key that exists; so is a value of the wrong type.
"""

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servicekit.errors import InvalidArgument
from servicekit.logs import LogFormat, LogLevel

SECTIONS = ("node", "image", "runtime", "net", "monitor", "gateway")
DEFAULT_FILE = Path("/etc/crisp/crisp.toml")


class Section(BaseModel):
    """The settings of one concern; pydantic checks types, `load` checks names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeSettings(Section):
    """What all services of a node have in common."""

    run_dir: Path = Field(Path("/run/crisp"), description="Sockets and whatever dies with the boot")
    state_dir: Path = Field(Path("/var/lib/crisp"), description="Whatever outlives a reboot; one folder a service")
    group: str = Field("crisp", description="Group (name or number) that may talk to the sockets, besides root")
    log_format: LogFormat = "json"
    log_level: LogLevel = "info"


S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Settings(Generic[S]):
    """The node's settings and one service's own."""

    node: NodeSettings
    own: S
    replica: str


def load(
    section: str, model: type[S], arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> Settings[S]:
    """Reads all sources. Raises InvalidArgument that names the source, the key and what would be right."""
    parser = argparse.ArgumentParser(description=f"crisp: the service whose settings are in [{section}]")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(environment.get("CRISP_CONFIG", DEFAULT_FILE)),
        help="settings file; its drop-ins are in the folder FILE.d",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting; may be repeated"
    )
    parser.add_argument(
        "--replica", default=environment.get("CRISP_REPLICA", "0"), help="name of this replica's socket (default 0)"
    )
    flags = parser.parse_args(arguments)

    models: dict[str, type[Section]] = {"node": NodeSettings, section: model}
    values: dict[str, dict[str, Any]] = {name: {} for name in models}
    origins: dict[tuple[str, str], str] = {}

    def take(name: str, key: str, value: Any, origin: str) -> None:
        _check_section(name, origin)
        if name not in models:
            return
        if key not in models[name].model_fields:
            raise InvalidArgument(
                f"{origin}: [{name}] has no key {key!r}{_nearest(key, models[name].model_fields)}",
                field=f"{name}.{key}",
            )
        values[name][key] = (
            _from_text(value, models[name].model_fields[key].annotation) if isinstance(value, _Text) else value
        )
        origins[name, key] = origin

    for file in _files(flags.config):
        for name, table in _read(file).items():
            if not isinstance(table, dict):
                raise InvalidArgument(
                    f"{file}: {name!r} stands outside of any section; put it under one of [{'], ['.join(SECTIONS)}]",
                    field=name,
                )
            _check_section(name, str(file))
            for key, value in table.items():
                take(name, key, value, str(file))
    for variable, text in environment.items():
        prefix, _, rest = variable.partition("_")
        name, _, key = rest.lower().partition("_")
        if prefix == "CRISP" and name in SECTIONS and key:
            take(name, key, _Text(text), f"environment variable {variable}")
    for assignment in flags.set:
        path, equals, text = assignment.partition("=")
        name, dot, key = path.partition(".")
        if not (equals and dot):
            raise InvalidArgument(f"--set {assignment}: write it as SECTION.KEY=VALUE", field="--set")
        take(name, key, _Text(text), f"flag --set {path}")

    return Settings(
        node=_validated(NodeSettings, "node", values["node"], origins),
        own=_validated(model, section, values[section], origins),
        replica=flags.replica,
    )


def _check_section(name: str, origin: str) -> None:
    if name not in SECTIONS:
        raise InvalidArgument(f"{origin}: there is no section [{name}]{_nearest(name, SECTIONS)}", field=name)


def _files(config: Path) -> list[Path]:
    if not config.exists() and config != DEFAULT_FILE:
        raise InvalidArgument(
            f"the settings file {config} does not exist; make it or leave out --config", field="--config"
        )
    drop_ins = sorted(Path(f"{config}.d").glob("*.toml"))
    return [*([config] if config.exists() else []), *drop_ins]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file}: {error}", field=str(file)) from error


class _Text(str):
    """A value from the environment or a flag, whose type its field decides."""


def _from_text(text: str, annotation: Any) -> Any:
    """What a TOML file would make of it: 5 is a number, ["a"] a list. Where a string is wanted, and for anything else, the text itself."""
    if annotation is str:
        return str(text)
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return str(text)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it may have: {', '.join(known)}"


M = TypeVar("M", bound=Section)


def _validated(model: type[M], name: str, values: dict[str, Any], origins: dict[tuple[str, str], str]) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # keys that do not go together
            raise InvalidArgument(f"settings: {name}: {first['msg']}", field=name) from error
        key = str(first["loc"][0])
        raise InvalidArgument(
            f"{origins.get((name, key), 'settings')}: {name}.{key} = {first['input']!r}: {first['msg']}",
            field=f"{name}.{key}",
        ) from error

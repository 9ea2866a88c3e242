"""Settings: a TOML file, drop-ins, the environment and flags, each overriding the one before.

    /etc/crisp/crisp.toml            [node], [image], [runtime], [net], [monitor], [gateway]
    /etc/crisp/crisp.toml.d/*.toml   in the order of their names
    CRISP_IMAGE_PULL_TIMEOUT=60      section and key in upper case
    --set image.pull_timeout=60      overrides all others

An unknown key is an error that names its source and the nearest known key. A value of the wrong
type is an error as well.
"""

import argparse
import difflib
import itertools
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from servicekit.errors import InvalidArgument
from servicekit.logs import LogFormat, LogLevel
from servicekit.places import Places

SECTIONS = ("node", "image", "runtime", "net", "monitor", "gateway")
DEFAULT_FILE = Path("/etc/crisp/crisp.toml")


class Section(BaseModel):
    """The settings of one concern. pydantic checks their types, `load` their names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeSettings(Section):
    """The settings that all services of a node share."""

    run_dir: Path = Field(Path("/run/crisp"), description="Sockets and whatever dies with the boot")
    state_dir: Path = Field(Path("/var/lib/crisp"), description="Whatever outlives a reboot; one folder a service")
    group: str = Field("crisp", description="Group (name or number) that may talk to the sockets, besides root")
    log_format: LogFormat = "json"
    log_level: LogLevel = "info"
    checkpoint_dirs: list[Path] = Field(
        [Path("/var/lib/kubelet/checkpoints")],
        description="Folders that checkpoints are written to and restored from; / allows any",
    )

    @property
    def places(self) -> Places:
        """Where each service keeps what others read."""
        return Places(self.run_dir, self.state_dir)


S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Settings(Generic[S]):
    """The settings of the node and of one service, and the name of this replica."""

    node: NodeSettings
    own: S
    replica: str


@dataclass(frozen=True, slots=True)
class _Assignment:
    """One key that one source sets. The type of its field decides how a text is parsed."""

    section: str
    key: str
    value: Any
    origin: str
    is_text: bool = False


def load(
    section: str, model: type[S], arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> Settings[S]:
    """Reads all sources.

    Raises InvalidArgument that names the source, the key and what would be right.
    """
    flags = _parse_flags(section, arguments, environment)
    found = _Found({"node": NodeSettings, section: model})
    for assignment in itertools.chain(_in_files(flags.config), _in_environment(environment), _in_flags(flags.set)):
        found.take(assignment)
    return Settings(
        node=found.validated("node", NodeSettings), own=found.validated(section, model), replica=flags.replica
    )


def _parse_flags(section: str, arguments: Sequence[str] | None, environment: Mapping[str, str]) -> argparse.Namespace:
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
    return parser.parse_args(arguments)


def _in_files(config: Path) -> Iterator[_Assignment]:
    for file in _files(config):
        for section, table in _read(file).items():
            if not isinstance(table, dict):
                raise InvalidArgument(
                    f"{file}: {section!r} stands outside of any section",
                    hint=f"put it under one of [{'], ['.join(SECTIONS)}]",
                    field=section,
                )
            _check_section(section, str(file))
            for key, value in table.items():
                yield _Assignment(section, key, value, str(file))


def _in_environment(environment: Mapping[str, str]) -> Iterator[_Assignment]:
    for variable, text in environment.items():
        prefix, _, rest = variable.partition("_")
        section, _, key = rest.lower().partition("_")
        if prefix == "CRISP" and section in SECTIONS and key:
            yield _Assignment(section, key, text, f"environment variable {variable}", is_text=True)


def _in_flags(assignments: Iterable[str]) -> Iterator[_Assignment]:
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        section, dot, key = path.partition(".")
        if not (equals and dot):
            raise InvalidArgument(f"--set {assignment}: write it as SECTION.KEY=VALUE", field="--set")
        yield _Assignment(section, key, text, f"flag --set {path}", is_text=True)


class _Found:
    """The values found so far for the sections of one service, and their origins."""

    def __init__(self, models: Mapping[str, type[Section]]) -> None:
        self._models = models
        self._values: dict[str, dict[str, Any]] = {section: {} for section in models}
        self._origins: dict[tuple[str, str], str] = {}

    def take(self, assignment: _Assignment) -> None:
        """Overrides a key; ignores the sections of other services. Raises InvalidArgument."""
        section, key, origin = assignment.section, assignment.key, assignment.origin
        _check_section(section, origin)
        if section not in self._models:
            return
        fields = self._models[section].model_fields
        if key not in fields:
            raise InvalidArgument(
                f"{origin}: [{section}] has no key {key!r}", hint=_nearest(key, fields), field=f"{section}.{key}"
            )
        value = assignment.value
        self._values[section][key] = _from_text(value, fields[key].annotation) if assignment.is_text else value
        self._origins[section, key] = origin

    def validated(self, section: str, model: type[S]) -> S:
        """Returns a section as its model.

        Raises InvalidArgument that names the source of a bad value.
        """
        try:
            return model.model_validate(self._values[section])
        except ValidationError as error:
            raise self._invalid(section, error.errors()[0]) from error

    def _invalid(self, section: str, fault: ErrorDetails) -> InvalidArgument:
        if not fault["loc"]:  # each value is valid, but they do not go together
            return InvalidArgument(f"settings: {section}: {fault['msg']}", field=section)
        key = str(fault["loc"][0])
        origin = self._origins.get((section, key), "settings")
        return InvalidArgument(
            f"{origin}: {section}.{key} = {fault['input']!r}: {fault['msg']}", field=f"{section}.{key}"
        )


def _check_section(section: str, origin: str) -> None:
    if section not in SECTIONS:
        raise InvalidArgument(
            f"{origin}: there is no section [{section}]", hint=_nearest(section, SECTIONS), field=section
        )


def _files(config: Path) -> list[Path]:
    if not config.exists() and config != DEFAULT_FILE:
        raise InvalidArgument(
            f"the settings file {config} does not exist", hint="make it or leave out --config", field="--config"
        )
    drop_ins = sorted(Path(f"{config}.d").glob("*.toml"))
    return [*([config] if config.exists() else []), *drop_ins]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file}: {error}", field=str(file)) from error


def _from_text(text: str, annotation: Any) -> Any:
    """Parses a text as a TOML file would: 5 is a number, ["a"] a list.

    Returns the text itself for a field of type str, and if it is no TOML value.
    """
    if annotation is str:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown name: the nearest known one, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"it may have: {', '.join(names)}"

"""The hosts to ask for an image, and their credentials.

See containers-registries.conf(5), version 2, and containers-auth.json(5).
"""

import base64
import binascii
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp_proto.image_name import ImageName
from servicekit.errors import InvalidArgument, PermissionDenied

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host to ask, with its port, and the repository's name there.

    `insecure` allows plain http and unknown certificates.
    """

    host: str
    repository: str
    insecure: bool

    @property
    def api_host(self) -> str:
        """The host that serves the distribution API, which Docker Hub has under another name."""
        return "registry-1.docker.io" if self.host == "docker.io" else self.host


@dataclass(frozen=True, slots=True)
class _Registry:
    """One [[registry]] table. `mirrors` are locations, each with its `insecure`."""

    prefix: str
    location: str
    insecure: bool
    blocked: bool
    mirrors: tuple[tuple[str, bool], ...]

    def endpoint(self, location: str, insecure: bool, name: ImageName) -> Endpoint:
        """Returns where `location`, which stands for the prefix, has the repository."""
        rest = f"/{name.path}" if self.prefix.startswith("*.") else name.repository.removeprefix(self.prefix)
        return _endpoint(f"{location}{rest}", insecure)


class RegistriesConf:
    """The file and its drop-ins, read anew for each pull so that an edit needs no restart."""

    def __init__(self, path: Path, auth_file: Path) -> None:
        self._path = path
        self._auth_file = auth_file

    def default_registry(self) -> str:
        """Returns the first of unqualified-search-registries, else docker.io.

        Raises InvalidArgument if the configuration is wrong.
        """
        search = self._load().get("unqualified-search-registries", [])
        return str(search[0]) if search else "docker.io"

    def full_name(self, familiar: str) -> ImageName:
        """Parses a name as people write it. Raises InvalidArgument."""
        try:
            return ImageName.from_familiar(familiar, self.default_registry())
        except ValueError as error:
            raise InvalidArgument(
                str(error),
                hint="write it as registry/repository:tag or registry/repository@sha256:…",
                field="image",
            ) from error

    def endpoints(self, name: ImageName) -> list[Endpoint]:
        """Returns the mirrors, then the registry itself.

        Raises PermissionDenied if the name is blocked, InvalidArgument if the configuration is
        wrong.
        """
        registry = self._registry_of(name)
        if registry is None:
            return [_endpoint(name.repository, insecure=False)]
        if registry.blocked:
            raise PermissionDenied(
                f"{name.repository} is blocked by prefix {registry.prefix!r} in {self._path}", field="image"
            )
        mirrors = [registry.endpoint(location, insecure, name) for location, insecure in registry.mirrors]
        if registry.location and not registry.prefix.startswith("*."):
            return [*mirrors, registry.endpoint(registry.location, registry.insecure, name)]
        return [*mirrors, _endpoint(name.repository, registry.insecure)]

    def credentials(self, repository: str) -> tuple[str, str] | None:
        """Returns user and password for a repository from auth.json.

        The most specific entry counts. Raises InvalidArgument if the file is damaged.
        """
        try:
            auths = json.loads(self._auth_file.read_text()).get("auths", {})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidArgument(
                f"{self._auth_file} is not readable as containers-auth.json: {error}", field="auth_file"
            ) from error
        key = repository
        while key:
            if key in auths and auths[key].get("auth"):
                return decode_basic(str(auths[key]["auth"]), str(self._auth_file))
            key = key.rpartition("/")[0]
        return None

    def _registry_of(self, name: ImageName) -> _Registry | None:
        """Returns the table with the longest prefix of `name`; of equal ones, the last."""
        tables = [table for table in self._load()["registry"] if _covers(_prefix(table), name)]
        if not tables:
            return None
        table = max(reversed(tables), key=lambda table: len(_prefix(table)))
        try:
            mirrors = tuple((str(entry["location"]), bool(entry.get("insecure"))) for entry in table.get("mirror", []))
        except KeyError as error:
            raise InvalidArgument(
                f"{self._path}: a mirror of {_prefix(table)!r} lacks {error}",
                hint="see containers-registries.conf(5)",
                field=str(self._path),
            ) from error
        location = str(table.get("location") or "")
        return _Registry(_prefix(table), location, bool(table.get("insecure")), bool(table.get("blocked")), mirrors)

    def _load(self) -> dict[str, Any]:
        """Merges the files: a later one wins, except that all [[registry]] tables are kept."""
        merged: dict[str, Any] = {"registry": []}
        for file in [self._path, *sorted(Path(f"{self._path}.d").glob("*.conf"))]:
            try:
                table = tomllib.loads(file.read_text())
            except FileNotFoundError:
                continue
            except (OSError, tomllib.TOMLDecodeError) as error:
                raise InvalidArgument(
                    f"{file}: {error}", hint="see containers-registries.conf(5)", field=str(file)
                ) from error
            merged["registry"].extend(table.pop("registry", []))
            merged.update(table)
        return merged


def decode_basic(auth: str, where: str) -> tuple[str, str]:
    """Decodes base64(user:password).

    `where` says in messages where it comes from. Raises InvalidArgument.
    """
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidArgument(f"auth in {where} is not base64 of user:password", field="auth") from error
    if not colon:
        raise InvalidArgument(f"auth in {where} has no colon between user and password", field="auth")
    return user, password.rstrip("\0")


def _prefix(table: dict[str, Any]) -> str:
    return str(table.get("prefix") or table.get("location", ""))


def _covers(prefix: str, name: ImageName) -> bool:
    if prefix.startswith("*."):
        return name.host.endswith(prefix[1:])
    return bool(prefix) and (name.repository == prefix or name.repository.startswith(prefix + "/"))


def _endpoint(location: str, insecure: bool) -> Endpoint:
    """Splits host/repository; a registry on a port of the loopback interface is always insecure."""
    host, _, repository = location.partition("/")
    return Endpoint(host, repository, insecure or host.rpartition(":")[0] in _LOOPBACK)

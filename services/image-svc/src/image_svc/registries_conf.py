"""Which hosts to ask for an image: containers-registries.conf(5), version 2, and containers-auth.json(5)."""

import base64
import binascii
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_svc.references import Reference
from servicekit.errors import InvalidArgument, PermissionDenied


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host to ask and the repository's name there. `insecure` allows plain http and unknown certificates."""

    host: str
    repository: str
    insecure: bool


class RegistriesConf:
    """The file and its drop-ins, read anew for each pull so that an edit needs no restart."""

    def __init__(self, path: Path, auth_file: Path) -> None:
        self._path = path
        self._auth_file = auth_file

    def default_registry(self) -> str:
        """The first of unqualified-search-registries, else docker.io."""
        search = self._load().get("unqualified-search-registries", [])
        return str(search[0]) if search else "docker.io"

    def endpoints(self, reference: Reference) -> list[Endpoint]:
        """Mirrors first, then the registry itself. Raises PermissionDenied where it is blocked."""
        best: dict[str, Any] = {}
        for table in self._load().get("registry", []):
            prefix = str(table.get("prefix") or table.get("location", ""))
            if _covers(prefix, reference.name) and len(prefix) >= len(
                str(best.get("prefix") or best.get("location", ""))
            ):
                best = table
        prefix = str(best.get("prefix") or best.get("location", ""))
        if best.get("blocked"):
            raise PermissionDenied(f"{reference.name} is blocked by prefix {prefix!r} in {self._path}", field="image")
        rest = reference.name[len(prefix) :] if best and not prefix.startswith("*.") else None
        location = str(best.get("location") or "")
        own = f"{location}{rest}" if location and rest is not None else reference.name
        return [
            *(
                _endpoint(
                    f"{mirror['location']}{f'/{reference.repository}' if rest is None else rest}",
                    bool(mirror.get("insecure")),
                )
                for mirror in best.get("mirror", [])
            ),
            _endpoint(own, bool(best.get("insecure"))),
        ]

    def credentials(self, name: str) -> tuple[str, str] | None:
        """User and password for registry/repository from auth.json: the most specific entry counts."""
        try:
            auths = json.loads(self._auth_file.read_text()).get("auths", {})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidArgument(
                f"{self._auth_file} is not readable as containers-auth.json: {error}", field="auth_file"
            ) from error
        key = name
        while key:
            if key in auths and auths[key].get("auth"):
                return decode_basic(str(auths[key]["auth"]), str(self._auth_file))
            key = key.rpartition("/")[0]
        return None

    def _load(self) -> dict[str, Any]:
        merged: dict[str, Any] = {"registry": []}
        for file in [self._path, *sorted(Path(f"{self._path}.d").glob("*.conf"))]:
            try:
                table = tomllib.loads(file.read_text())
            except FileNotFoundError:
                continue
            except (OSError, tomllib.TOMLDecodeError) as error:
                raise InvalidArgument(f"{file}: {error}; see containers-registries.conf(5)", field=str(file)) from error
            merged["registry"].extend(table.pop("registry", []))
            merged.update(table)
        return merged


def decode_basic(auth: str, where: str) -> tuple[str, str]:
    """User and password out of base64(user:password)."""
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidArgument(f"auth in {where} is not base64 of user:password", field="auth") from error
    if not colon:
        raise InvalidArgument(f"auth in {where} has no colon between user and password", field="auth")
    return user, password.rstrip("\0")


def _covers(prefix: str, name: str) -> bool:
    if prefix.startswith("*."):
        return name.partition("/")[0].partition(":")[0].endswith(prefix[1:])
    return bool(prefix) and (name == prefix or name.startswith(prefix + "/"))


def _endpoint(name: str, insecure: bool) -> Endpoint:
    host, _, repository = name.partition("/")
    return Endpoint(host, repository, insecure or host.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]"))

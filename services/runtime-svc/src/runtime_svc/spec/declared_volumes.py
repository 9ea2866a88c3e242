"""The volumes that an image declares (VOLUME, OCI image spec, config.md, Volumes).

Such a path is a writable folder with the image's content and its owner. It is in the container's
writable layer, and is removed and measured with that. Under a read-only root it is mounted on
itself: the mount stays writable when the OCI runtime makes the root read-only.

A mount of the request on the path, or on a folder above it, wins: what a pod keeps in a volume of
its own must not be hidden by a folder that dies with the container.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_svc.spec import oci
from servicekit import logs
from servicekit.linux import files
from servicekit.linux.root_paths import resolve_in_root

_PATH_MAX = 4096
_log = logs.get()


@dataclass(frozen=True, slots=True)
class DeclaredVolumes:
    """The declared paths; `owner` (uid and gid on the node) gets those that the image lacks.

    `writable` tells whether they are writable under a read-only root, too.
    """

    paths: Sequence[str] = ()
    owner: tuple[int, int] = (0, 0)
    writable: bool = True


NO_VOLUMES = DeclaredVolumes()


def plan(volumes: DeclaredVolumes, rootfs: Path, taken: Collection[str], *, readonly: bool) -> list[oci.Mount]:
    """Makes the folders that the image lacks, and returns the mounts that keep all writable.

    Paths on or below those in `taken` are left alone. What cannot be a folder is logged and left
    out: whoever runs an image cannot correct it.
    """
    found: dict[str, oci.Mount] = {}
    for path in volumes.paths:
        try:
            inside = _inside(rootfs, path)
            if inside is None or _is_taken(inside, taken):
                continue
            _make(f"{rootfs}{inside}", volumes.owner)
        except (OSError, ValueError) as error:  # ValueError: it holds a NUL
            _log.warning("image-volume-ignored", path=path[:200], error=str(error)[:200])
            continue
        found[inside] = _mount(rootfs, inside)
    return list(found.values()) if readonly and volumes.writable else []


def _inside(rootfs: Path, path: str) -> str | None:
    """Returns the path in the container, without links; None for the root itself."""
    if len(os.fsencode(path)) >= _PATH_MAX:
        raise ValueError("longer than a path can be")
    return os.fspath(resolve_in_root(rootfs, path))[len(os.fspath(rootfs)) :].rstrip("/") or None


def _is_taken(inside: str, taken: Collection[str]) -> bool:
    return any(f"{inside}/".startswith(f"{above.rstrip('/')}/") for above in taken)


def _make(target: str, owner: tuple[int, int]) -> None:
    """Makes the folder and those above it, with their owner; a file or folder that is there stays.

    No link is on the way: it was resolved, and nothing runs in this root filesystem yet.
    """
    for folder in reversed(list(_missing(target))):
        files.make_folder(Path(folder), mode=0o755, owner=owner)


def _missing(target: str) -> Iterator[str]:
    while not os.path.lexists(target):
        yield target
        target = os.path.dirname(target)


def _mount(rootfs: Path, inside: str) -> oci.Mount:
    options = ["rbind", "rprivate", "rw"]
    return {"destination": inside, "type": "bind", "source": f"{rootfs}{inside}", "options": options}

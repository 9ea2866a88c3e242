"""The mounts of the pod's files: /etc/resolv.conf, hostname, hosts and localtime."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from runtime_svc.spec import oci
from servicekit.linux.root_paths import resolve_in_root

_ZONE = "/etc/localtime"


def plan(files: Mapping[str, Path], rootfs: Path, taken: Collection[str], *, readonly: bool) -> list[oci.Mount]:
    """Returns a mount for each file by its path in the container, except on paths in `taken`.

    Links in the image are resolved, so that a path has one name for everybody. A file whose path
    the image has made unreachable, by links in a circle, is left out.
    """
    found: list[oci.Mount] = []
    for path, source in files.items():
        try:
            target = _resolved(rootfs, path)
            inside = _resolved(rootfs, path, follow_last=path != _ZONE)
        except OSError:
            continue
        if target not in taken:
            if path == _ZONE:
                _replace_link(rootfs, inside)
            found.append(_mount(inside, source, readonly=readonly))
    return found


def _resolved(rootfs: Path, path: str, *, follow_last: bool = True) -> str:
    return os.fspath(resolve_in_root(rootfs, path, follow_last=follow_last))[len(os.fspath(rootfs)) :]


def _replace_link(rootfs: Path, inside: str) -> None:
    """Removes the link from the container's writable layer; the OCI runtime makes a file instead.

    What is mounted on the link's target would also change the zone that the target is for.
    """
    target = f"{rootfs}{inside}"
    if os.path.islink(target):
        os.unlink(target)


def _mount(destination: str, source: Path, *, readonly: bool) -> oci.Mount:
    options = ["rbind", "rprivate", "ro" if readonly else "rw", "nosuid", "nodev", "noexec"]
    return {"destination": destination, "type": "bind", "source": str(source), "options": options}

"""OCI hooks that the node's administrator has for some containers: JSON files in folders (oci-hooks(5), version 1.0.0)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servicekit.errors import FailedPrecondition

Document = dict[str, Any]
_STAGES = {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}


def add(document: Document, folders: Sequence[Path], annotations: dict[str, str], *, bind_mounts: bool) -> None:
    """Adds the hooks whose conditions the container meets. A file of a later folder replaces one of the same name before it.

    Raises FailedPrecondition that names a file that can't be used: a container must not run without a hook that it may need.
    """
    files = {path.name: path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.json"))}
    for name in sorted(files):
        _add(document, files[name], annotations, bind_mounts)


def _add(document: Document, path: Path, annotations: dict[str, str], bind_mounts: bool) -> None:
    try:
        entry = json.loads(path.read_text())
        if entry["version"] != "1.0.0":
            raise ValueError(f"version {entry['version']!r} is not 1.0.0")
        hook, stages = entry["hook"], entry["stages"]
        if not str(hook["path"]).startswith("/"):
            raise ValueError(f"hook.path = {hook['path']!r} is not absolute")
        unknown = set(stages) - _STAGES
        if unknown or not stages:
            raise ValueError(f"stages = {stages}: of {', '.join(sorted(_STAGES))}")
        wanted = _matches(entry.get("when") or {}, document["process"]["args"], annotations, bind_mounts)
    except (OSError, ValueError, KeyError, TypeError, re.error) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else error
        raise FailedPrecondition(
            f"OCI hook {path}: {fault}; correct or remove the file (oci-hooks(5))", field="runtime.hooks_dirs"
        ) from error
    if wanted:
        for stage in stages:
            document.setdefault("hooks", {}).setdefault(stage, []).append(hook)


def _matches(when: Document, arguments: Sequence[str], annotations: dict[str, str], bind_mounts: bool) -> bool:
    """Whether all conditions that are given hold; none given is none met."""
    unknown = set(when) - {"always", "annotations", "commands", "hasBindMounts"}
    if unknown:
        raise ValueError(f"when has the unknown condition {', '.join(unknown)}")
    met = []
    if "always" in when:
        met.append(bool(when["always"]))
    if "hasBindMounts" in when:
        met.append(bool(when["hasBindMounts"]) == bind_mounts)
    if when.get("commands"):
        met.append(any(re.search(pattern, arguments[0]) for pattern in when["commands"]))
    for key, value in (when.get("annotations") or {}).items():
        met.append(any(re.search(key, name) and re.search(value, text) for name, text in annotations.items()))
    return bool(met) and all(met)

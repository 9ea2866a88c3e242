"""OCI hooks that the node's administrator configures for some containers.

They are JSON files in folders (oci-hooks(5), version 1.0.0).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_svc.spec import oci
from servicekit.errors import FailedPrecondition

_CONDITIONS = {"always", "annotations", "commands", "hasBindMounts"}


@dataclass(frozen=True, slots=True)
class Subject:
    """The container that conditions look at."""

    arguments: Sequence[str]
    annotations: Mapping[str, str]
    bind_mounts: bool


def add(spec: oci.Spec, folders: Sequence[Path], annotations: Mapping[str, str], *, bind_mounts: bool) -> None:
    """Adds the hooks whose conditions the container meets.

    A file of a later folder replaces one of the same name in an earlier folder. Raises
    FailedPrecondition that names a file that cannot be used: a container must not run without a
    hook that it may need.
    """
    subject = Subject(spec["process"]["args"], annotations, bind_mounts)
    files = {path.name: path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.json"))}
    for name in sorted(files):
        try:
            _add(spec, files[name], subject)
        except (OSError, ValueError, KeyError, TypeError, re.error) as error:
            fault = f"{error} is missing" if isinstance(error, KeyError) else error
            raise FailedPrecondition(
                f"OCI hook {files[name]}: {fault}",
                hint="correct or remove the file (oci-hooks(5))",
                field="runtime.hooks_dirs",
            ) from error


def _add(spec: oci.Spec, path: Path, subject: Subject) -> None:
    entry = json.loads(path.read_text())
    if entry["version"] != "1.0.0":
        raise ValueError(f"version {entry['version']!r} is not 1.0.0")
    hook, stages = entry["hook"], entry["stages"]
    if not str(hook["path"]).startswith("/"):
        raise ValueError(f"hook.path = {hook['path']!r} is not absolute")
    unknown = set(stages) - oci.STAGES
    if unknown or not stages:
        raise ValueError(f"stages = {stages}: of {', '.join(sorted(oci.STAGES))}")
    if _matches(entry.get("when") or {}, subject):
        for stage in stages:
            spec.setdefault("hooks", {}).setdefault(stage, []).append(hook)


def _matches(when: dict[str, Any], subject: Subject) -> bool:
    """Tells whether all given conditions hold; without any condition the hook is not added."""
    unknown = set(when) - _CONDITIONS
    if unknown:
        raise ValueError(f"when has the unknown condition {', '.join(unknown)}")
    met = []
    if "always" in when:
        met.append(bool(when["always"]))
    if "hasBindMounts" in when:
        met.append(bool(when["hasBindMounts"]) == subject.bind_mounts)
    if when.get("commands"):
        met.append(any(re.search(pattern, subject.arguments[0]) for pattern in when["commands"]))
    for key, value in (when.get("annotations") or {}).items():
        met.append(any(re.search(key, name) and re.search(value, text) for name, text in subject.annotations.items()))
    return bool(met) and all(met)

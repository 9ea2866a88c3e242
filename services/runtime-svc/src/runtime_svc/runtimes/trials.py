"""Tries out an OCI runtime: creates a container with a feature, and looks at its mount table."""

import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime_svc.runtimes.oci_runtime import OciRuntime
from runtime_svc.spec import oci
from servicekit import logs
from servicekit.errors import CrispError
from servicekit.linux import mount_table
from servicekit.linux.mount_table import Mounted
from servicekit.linux.programs import start

_TRIAL_SECONDS = 20
_INSIDE = "/trial"
_IDS: list[oci.IdMapping] = [{"containerID": 0, "hostID": 1 << 20, "size": 65536}]
_log = logs.get()


@dataclass(frozen=True, slots=True)
class _Trial:
    """A feature: how a configuration asks for it, and what shows in the container that it works.

    All mounts at and below /trial, at least `mounts` of them, have the option.
    """

    name: str
    ask: Callable[[oci.Spec], None]
    option: str
    mounts: int


async def recursive_read_only(runtime: OciRuntime, program: Path) -> bool:
    """Tells whether the runtime makes mounts read-only together with those below them.

    `program` is an executable that the trial container may name as its own.
    """
    return await _works(_Trial("trial-rro", _ask_recursive_read_only, "ro", mounts=2), runtime, program)


async def idmapped_mounts(runtime: OciRuntime, program: Path) -> bool:
    """Tells whether the runtime makes idmapped mounts in a user namespace."""
    return await _works(_Trial("trial-idmap", _ask_idmapped, "idmapped", mounts=1), runtime, program)


def _ask_recursive_read_only(spec: oci.Spec) -> None:
    # /dev has mounts below it (pts) on every machine: it and they must be read-only then.
    spec["mounts"].append(
        {"destination": _INSIDE, "type": "bind", "source": "/dev", "options": ["rbind", "ro", "rro", "rprivate"]}
    )


def _ask_idmapped(spec: oci.Spec) -> None:
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = _IDS
    spec["mounts"].append(
        {
            "destination": _INSIDE,
            "type": "bind",
            "source": spec["root"]["path"],
            "options": ["rbind"],
            "uidMappings": _IDS,
            "gidMappings": _IDS,
        }
    )


async def _works(trial: _Trial, runtime: OciRuntime, program: Path) -> bool:
    await runtime.delete(trial.name)  # what a killed predecessor left
    with tempfile.TemporaryDirectory(dir=runtime.root, prefix=f".{trial.name}-") as folder:
        bundle = Path(folder)
        _write_bundle(bundle, trial, program)
        try:
            mounts = list(mount_table.read(await _create(runtime, bundle, trial.name)))
        except (OSError, ValueError, CrispError) as error:
            said = (bundle / "said").read_text(errors="replace")[-300:] if (bundle / "said").exists() else ""
            _log.info("trial-failed", handler=runtime.name, trial=trial.name, said=said or str(error))
            return False
        finally:
            await runtime.delete(trial.name)
    found = _mounts_inside(mounts)
    return len(found) >= trial.mounts and all(trial.option in options for options in found.values())


def _write_bundle(bundle: Path, trial: _Trial, program: Path) -> None:
    bundle.chmod(0o755)
    rootfs = bundle / "rootfs"
    for inside in ("proc", "dev", _INSIDE.lstrip("/")):  # a user namespace of foreign ids could not make them
        (rootfs / inside).mkdir(parents=True)
    (rootfs / "program").touch()
    spec: oci.Spec = {
        "ociVersion": oci.VERSION,
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/program"], "cwd": "/"},
        "root": {"path": str(rootfs)},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/program", "type": "bind", "source": str(program), "options": ["rbind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}], "cgroupsPath": f"/crisp-{bundle.name}"},
    }
    trial.ask(spec)
    (bundle / "config.json").write_text(json.dumps(spec))


async def _create(runtime: OciRuntime, bundle: Path, name: str) -> int:
    """Has the runtime create the trial container, and returns its pid.

    Raises OSError, ValueError, TimeoutError or CrispError; the file `said` has what the runtime
    printed.
    """
    pid_file = bundle / "pid"
    # A file and no pipe, which the container would keep open.
    said = os.open(bundle / "said", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        command = [*runtime.command, "create", f"--bundle={bundle}", f"--pid-file={pid_file}", name]
        creating = start(command, stderr=said, start_new_session=True)
    finally:
        os.close(said)
    try:
        async with asyncio.timeout(_TRIAL_SECONDS):
            await creating.wait()
    finally:
        creating.kill_group()
        await creating.wait()
    return int(pid_file.read_text())


def _mounts_inside(mounts: list[Mounted]) -> dict[str, tuple[str, ...]]:
    """Returns the options of the mounts at and below /trial, by target.

    Of two mounts on one target the later counts.
    """
    return {mounted.target: mounted.options for mounted in mounts if f"{mounted.target}/".startswith(f"{_INSIDE}/")}

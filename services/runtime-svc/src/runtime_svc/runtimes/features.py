"""What an OCI runtime can do on this kernel: asked by `<runtime> features` (OCI runtime spec, features.md), never guessed.

One that has no such command (crun before 1.9) is asked by a trial: it creates a container with the feature, and the container's
own mount table tells whether it got it.
"""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime_svc.oci_runtime import OciRuntime
from servicekit import logs
from servicekit.errors import CrispError, Unimplemented
from servicekit.linux import mount_table
from servicekit.linux.programs import run, start

Document = dict[str, Any]
_TRIAL_SECONDS = 20
_INSIDE = "/trial"
_IDS = [{"containerID": 0, "hostID": 1 << 20, "size": 65536}]
_log = logs.get()


@dataclass(frozen=True, slots=True)
class Features:
    """What was found. no_checkpoint is the reason why the runtime can't checkpoint containers here; empty if it can."""

    recursive_read_only: bool
    idmapped_mounts: bool
    user_namespaces: bool
    no_checkpoint: str

    def demand_checkpoint(self) -> None:
        """Raises Unimplemented with the reason where containers can't be checkpointed and restored."""
        if self.no_checkpoint:
            raise Unimplemented(f"checkpoint and restore: {self.no_checkpoint}")


async def ask(runtime: OciRuntime, program: Path) -> Features:
    """Asks a runtime. `program` is one that a trial container may name as its own."""
    said = await _run([str(runtime.path), "features"])
    try:
        document: Document | None = json.loads(said) if said else None
    except ValueError:
        document = None
    if document is not None:
        linux = document.get("linux") or {}
        idmap = bool(((linux.get("mountExtensions") or {}).get("idmap") or {}).get("enabled"))
        rro = "rro" in (document.get("mountOptions") or ())
        users = idmap and "user" in (linux.get("namespaces") or ())
        checkpoint = (document.get("annotations") or {}).get("org.opencontainers.runc.checkpoint.enabled") == "true"
    else:
        rro, idmap = await asyncio.gather(
            _try(runtime, program, "trial-rro", _recursive_read_only), _try(runtime, program, "trial-idmap", _idmapped)
        )
        users, checkpoint = idmap, False
    checkpoint = checkpoint or "+CRIU" in await _run([str(runtime.path), "--version"])
    found = Features(rro, idmap, users, await _criu_fault() if checkpoint else f"{runtime.path} was built without CRIU")
    _log.info(
        "runtime-features",
        handler=runtime.name,
        asked="features" if document else "trial",
        **asdict(found),
    )
    return found


async def _criu_fault() -> str:
    """Why CRIU does not work on this kernel; empty if it does (criu(8), check)."""
    criu = shutil.which("criu")
    if criu is None:
        return "criu is not installed"
    try:
        finished = await run([criu, "check"], deadline=_TRIAL_SECONDS)
    except CrispError as error:
        return error.message
    if finished.returncode == 0:
        return ""
    lines = (finished.stderr + finished.stdout).decode(errors="replace").strip().splitlines()
    return f"`criu check` fails on this kernel: {lines[0] if lines else finished.returncode}"


def _recursive_read_only(document: Document) -> str:
    # /dev has mounts below it (pts) on every machine: both, it and they, must be read-only then.
    document["mounts"].append(
        {"destination": _INSIDE, "type": "bind", "source": "/dev", "options": ["rbind", "ro", "rro", "rprivate"]}
    )
    return "ro"


def _idmapped(document: Document) -> str:
    linux = document["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = _IDS
    document["mounts"].append(
        {
            "destination": _INSIDE,
            "type": "bind",
            "source": document["root"]["path"],
            "options": ["rbind"],
            "uidMappings": _IDS,
            "gidMappings": _IDS,
        }
    )
    return "idmapped"


async def _try(runtime: OciRuntime, program: Path, name: str, prepare: Callable[[Document], str]) -> bool:
    """Whether all mounts at _INSIDE, of a container that the runtime created, have the option that `prepare` asked for."""
    await runtime.delete(name)  # what a killed predecessor left
    with tempfile.TemporaryDirectory(dir=runtime.root, prefix=f".{name}-") as folder:
        Path(folder).chmod(0o755)
        rootfs = Path(folder, "rootfs")
        for name_inside in ("proc", "dev", _INSIDE.lstrip("/")):  # a user namespace of strange ids could not make them
            (rootfs / name_inside).mkdir(parents=True)
        (rootfs / "program").touch()
        document: Document = {
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/program"], "cwd": "/"},
            "root": {"path": str(rootfs)},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/program", "type": "bind", "source": str(program), "options": ["rbind", "ro"]},
            ],
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "pid"}],
                "cgroupsPath": f"/crisp-{os.path.basename(folder)}",
            },
        }
        option = prepare(document)
        Path(folder, "config.json").write_text(json.dumps(document))
        pid_file = Path(folder, "pid")
        try:
            said = os.open(
                f"{folder}/said", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            )  # no pipe: the container would keep it open
            try:
                command = [*runtime.command, "create", f"--bundle={folder}", f"--pid-file={pid_file}", name]
                creating = start(command, stderr=said, start_new_session=True)
            finally:
                os.close(said)
            try:
                async with asyncio.timeout(_TRIAL_SECONDS):
                    await creating.wait()
            finally:
                creating.kill_group()
                await creating.wait()
            mounts = mount_table.read(int(pid_file.read_text()))
        except (OSError, ValueError, CrispError) as error:
            _log.info(
                "trial-failed",
                handler=runtime.name,
                trial=name,
                said=Path(folder, "said").read_text(errors="replace")[-300:] or str(error),
            )
            return False
        finally:
            await runtime.delete(name)
        options = {
            mounted.target: mounted.options for mounted in mounts if f"{mounted.target}/".startswith(f"{_INSIDE}/")
        }
        expected = 2 if prepare is _recursive_read_only else 1
        return len(options) >= expected and all(option in entry for entry in options.values())


async def _run(command: list[str]) -> str:
    """What a command printed; empty if it failed."""
    try:
        finished = await run(command, deadline=_TRIAL_SECONDS)
    except CrispError:
        return ""
    return finished.stdout.decode(errors="replace") if finished.returncode == 0 else ""

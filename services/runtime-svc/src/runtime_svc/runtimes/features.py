"""What an OCI runtime can do on this kernel: probed, never guessed.

Runtimes answer to `<runtime> features` (OCI runtime spec, features.md); those without that command
(crun before 1.9) are tried out. `criu check` tells whether CRIU works on this kernel.
"""

import asyncio
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime_svc.runtimes import trials
from runtime_svc.runtimes.oci_runtime import OciRuntime
from servicekit import logs
from servicekit.errors import CrispError, Unimplemented
from servicekit.linux.programs import run

_PROBE_SECONDS = 20
_CHECKPOINT = "org.opencontainers.runc.checkpoint.enabled"
_log = logs.get()


@dataclass(frozen=True, slots=True)
class Features:
    """What a runtime can do.

    `no_checkpoint` says why it cannot checkpoint containers here; None if it can.
    """

    recursive_read_only: bool
    idmapped_mounts: bool
    user_namespaces: bool
    no_checkpoint: str | None

    def demand_checkpoint(self) -> None:
        """Raises Unimplemented with the reason if the runtime cannot checkpoint and restore."""
        if self.no_checkpoint is not None:
            raise Unimplemented(f"checkpoint and restore: {self.no_checkpoint}")


async def probe(runtime: OciRuntime, program: Path) -> Features:
    """Finds out what a runtime can do.

    `program` is an executable that a trial container may name as its own.
    """
    answer = _parse(await _output([str(runtime.path), "features"]))
    if answer is not None:
        recursive_read_only, idmapped_mounts, user_namespaces = _declared(answer)
    else:
        recursive_read_only, idmapped_mounts = await asyncio.gather(
            trials.recursive_read_only(runtime, program), trials.idmapped_mounts(runtime, program)
        )
        user_namespaces = idmapped_mounts
    found = Features(
        recursive_read_only, idmapped_mounts, user_namespaces, await _checkpoint_fault(runtime, answer or {})
    )
    asked = "trial" if answer is None else "features"
    _log.info("runtime-probed", handler=runtime.name, asked=asked, **asdict(found))
    return found


def _parse(answer: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(answer)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _declared(answer: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Returns whether the answer has rro, idmapped mounts and user namespaces."""
    linux = answer.get("linux") or {}
    idmap = bool(((linux.get("mountExtensions") or {}).get("idmap") or {}).get("enabled"))
    return (
        "rro" in (answer.get("mountOptions") or ()),
        idmap,
        idmap and "user" in (linux.get("namespaces") or ()),
    )


async def _checkpoint_fault(runtime: OciRuntime, answer: dict[str, Any]) -> str | None:
    """Returns why the runtime cannot checkpoint containers here; None if it can."""
    is_declared = (answer.get("annotations") or {}).get(_CHECKPOINT) == "true"
    if not is_declared and "+CRIU" not in await _output([str(runtime.path), "--version"]):
        return f"{runtime.path} was built without CRIU"
    return await _criu_fault()


async def _criu_fault() -> str | None:
    """Returns why CRIU does not work on this kernel; None if it does (criu(8), check)."""
    criu = shutil.which("criu")
    if criu is None:
        return "criu is not installed"
    try:
        finished = await run([criu, "check"], deadline=_PROBE_SECONDS)
    except CrispError as error:
        return error.message
    if finished.returncode == 0:
        return None
    lines = (finished.stderr + finished.stdout).decode(errors="replace").strip().splitlines()
    return f"`criu check` fails on this kernel: {lines[0] if lines else finished.returncode}"


async def _output(command: list[str]) -> str:
    """Returns what a command prints; "" if it fails."""
    try:
        finished = await run(command, deadline=_PROBE_SECONDS)
    except CrispError:
        return ""
    return finished.stdout.decode(errors="replace") if finished.returncode == 0 else ""

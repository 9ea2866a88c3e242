"""Block I/O classes and RDT classes, which a pod's annotations name as for CRI-O and containerd.

Sources: OCI runtime spec, config-linux.md, blockIO and intelRdt; kernel's filesystems/resctrl.rst.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime_svc.settings import BlockIoClass, RuntimeSettings
from runtime_svc.spec import oci
from servicekit.errors import FailedPrecondition, InvalidArgument

RESCTRL = Path("/sys/fs/resctrl")
_NO_RDT_CLASSES = {".", "..", "info", "mon_data", "mon_groups"}
_CLASSES_FIELD = "runtime.blockio_classes"


@dataclass(frozen=True, slots=True)
class ResourceClasses:
    """What a container's classes add to linux.resources and to linux; None without a class."""

    block_io: oci.BlockIo | None
    rdt: oci.IntelRdt | None


def choose(pod_annotations: Mapping[str, str], container: str, settings: RuntimeSettings) -> ResourceClasses:
    """Finds the classes for a container (by its name) in its pod's annotations.

    Raises InvalidArgument or FailedPrecondition that names a class.
    """
    block_io = _annotated(pod_annotations, "blockio.resources.beta.kubernetes.io", container)
    rdt = _annotated(pod_annotations, "rdt.resources.beta.kubernetes.io", container)
    return ResourceClasses(
        _block_io(block_io, settings.blockio_classes) if block_io else None, _rdt(rdt) if rdt else None
    )


def _annotated(annotations: Mapping[str, str], prefix: str, container: str) -> str | None:
    return annotations.get(f"{prefix}/container.{container}") or annotations.get(f"{prefix}/pod")


def _rdt(name: str) -> oci.IntelRdt:
    if "/" in name or name in _NO_RDT_CLASSES:
        raise InvalidArgument(
            f"RDT class {name!r}: the name of a folder of {RESCTRL} that is a class", field="annotations"
        )
    if not (RESCTRL / name).is_dir():
        raise FailedPrecondition(
            f"RDT class {name!r} is not on this node: {RESCTRL / name} must exist, on a processor that has RDT",
            field="annotations",
        )
    return {"closID": name}


def _block_io(name: str, classes: Mapping[str, BlockIoClass]) -> oci.BlockIo:
    if name not in classes:
        raise InvalidArgument(
            f"block I/O class {name!r} is not configured (runtime.blockio_classes)",
            hint=f"there are: {', '.join(classes) or 'none'}",
            field="annotations",
        )
    chosen = classes[name]
    found: oci.BlockIo = {}
    if chosen.weight is not None:
        found["weight"] = chosen.weight
    if chosen.weights:
        found["weightDevice"] = [{**_device(path), "weight": weight} for path, weight in chosen.weights.items()]
    if chosen.read_bytes:
        found["throttleReadBpsDevice"] = _rates(chosen.read_bytes)
    if chosen.write_bytes:
        found["throttleWriteBpsDevice"] = _rates(chosen.write_bytes)
    if chosen.read_operations:
        found["throttleReadIOPSDevice"] = _rates(chosen.read_operations)
    if chosen.write_operations:
        found["throttleWriteIOPSDevice"] = _rates(chosen.write_operations)
    return found


def _rates(rates: Mapping[str, int]) -> list[oci.BlockIoDevice]:
    return [{**_device(path), "rate": rate} for path, rate in rates.items()]


def _device(path: str) -> oci.BlockIoDevice:
    """Returns a block device's numbers. Raises FailedPrecondition if this node lacks the device."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise FailedPrecondition(f"{_CLASSES_FIELD}: {path}: {error.strerror}", field=_CLASSES_FIELD) from error
    if not stat.S_ISBLK(status.st_mode):
        raise FailedPrecondition(f"{_CLASSES_FIELD}: {path} is no block device", field=_CLASSES_FIELD)
    return {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}

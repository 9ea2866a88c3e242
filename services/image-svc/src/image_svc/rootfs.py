"""Root filesystems of containers: an overlay of an image's layers and a writable layer of the container's own.

    <run>/rootfs/<id>/                   where it is mounted
    <state>/containers/<id>/upper, work  its writable layer

The row comes before the mount and goes after the unmount, so whatever a crash leaves has a row, and the same request again
finishes it.
"""

import asyncio
import os
import shutil
import time
from pathlib import Path

from crisp_proto.image import DiskUse, FilesystemInfo, Rootfs, RootfsRequest, WritableLayers
from image_svc import overlay
from image_svc.images import Images
from image_svc.store import Store
from servicekit.crashpoints import crashpoint
from servicekit.errors import Internal, NotFound
from servicekit.tasks import Turns

_USAGE_SECONDS = 10  # how long a reading of a writable layer is good for: it walks the whole tree


class RootfsMounts:
    """All root filesystems of this node."""

    def __init__(self, store: Store, images: Images, state: Path, run: Path) -> None:
        self._store = store
        self._images = images
        self._layers = state / "layers"
        self._containers = state / "containers"
        self._mounts = run / "rootfs"
        # Layer 0 is the empty folder that stands in for an image without layers: overlayfs wants a lower one.
        for folder in (self._containers, self._mounts, self._layers / "0"):
            folder.mkdir(parents=True, exist_ok=True)
        self._turns = Turns()
        self._usages: dict[str, DiskUse] = {}

    async def mount(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        """Mounts a root filesystem for the image; the same id again answers what is mounted. Raises NotFound for an unknown image."""
        return await self._turns.take(rootfs_id, "mount", lambda: self._mount(rootfs_id, request))

    async def _mount(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        known = self._store.rootfs(rootfs_id)
        if known is None:
            image = self._images.get(request.image)
            rootfs = Rootfs(
                id=rootfs_id,
                path=str(self._mounts / rootfs_id),
                image_id=image.id,
                config=image.config,
            )
            layers = self._store.add_rootfs(rootfs_id, image.id, rootfs.model_dump_json())
            if layers is None:
                raise NotFound(f"image {request.image} was removed meanwhile; pull it again", field="image")
        else:
            rootfs, layers = Rootfs.model_validate_json(known[0]), known[1]
        crashpoint("rootfs-recorded")
        target = Path(rootfs.path)
        if not overlay.is_mounted(target):
            own = self._containers / rootfs_id
            for folder in (target, own / "upper", own / "work"):
                folder.mkdir(parents=True, exist_ok=True)
            (own / "upper").chmod(0o755)
            try:
                await overlay.mount(self._layers, layers or [0], own / "upper", own / "work", target)
            except OSError as error:
                await self._remove(rootfs_id)
                raise Internal(
                    f"root filesystem of {rootfs_id}: {error}; does this kernel have overlayfs, and is {self._containers} on a file system that it can use?"
                ) from error
        crashpoint("rootfs-mounted")
        return rootfs

    async def remove(self, rootfs_id: str) -> None:
        """Unmounts and deletes; fine if there is none."""
        await self._turns.take(rootfs_id, "remove", lambda: self._remove(rootfs_id))

    async def _remove(self, rootfs_id: str) -> None:
        target, own = self._mounts / rootfs_id, self._containers / rootfs_id
        known = self._store.rootfs(rootfs_id)
        if known is None and not target.exists() and not own.exists():
            return
        await asyncio.to_thread(_delete, target, own)
        crashpoint("rootfs-deleted")
        self._store.remove_rootfs(rootfs_id)
        self._usages.pop(rootfs_id, None)
        if known is not None and self._store.drop_unused_layers():
            await self._images.sweep()

    def get(self, rootfs_id: str) -> Rootfs:
        """A root filesystem's record. Raises NotFound."""
        known = self._store.rootfs(rootfs_id)
        if known is None:
            raise NotFound(f"there is no root filesystem {rootfs_id}")
        return Rootfs.model_validate_json(known[0])

    def ages(self) -> dict[str, float]:
        """Ids of all root filesystems and their age in seconds."""
        return self._store.rootfs_ages()

    # Disk use

    async def writable_layers(self) -> WritableLayers:
        """Disk use of each writable layer, read anew where the last reading is over ten seconds old."""
        fresh = time.time_ns() - _USAGE_SECONDS * 1_000_000_000
        for rootfs_id in self._store.rootfs_ages():
            known = self._usages.get(rootfs_id)
            if known is None or known.timestamp < fresh:
                upper = self._containers / rootfs_id / "upper"
                self._usages[rootfs_id] = await asyncio.to_thread(_disk_use, upper, self._containers)
        return WritableLayers(layers=dict(self._usages))

    async def filesystem_info(self) -> FilesystemInfo:
        """What all images and what all writable layers take."""
        size, inodes = self._store.disk_use()
        layers = (await self.writable_layers()).layers.values()
        now = time.time_ns()
        return FilesystemInfo(
            images=DiskUse(timestamp=now, mountpoint=str(self._layers), used_bytes=size, inodes_used=inodes),
            containers=DiskUse(
                timestamp=now,
                mountpoint=str(self._containers),
                used_bytes=sum(use.used_bytes for use in layers),
                inodes_used=sum(use.inodes_used for use in layers),
            ),
        )


def _delete(target: Path, own: Path) -> None:
    overlay.unmount(target)
    if target.exists():
        target.rmdir()
    shutil.rmtree(own, ignore_errors=True)


def _disk_use(folder: Path, mountpoint: Path) -> DiskUse:
    size = inodes = 0
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                status = os.lstat(os.path.join(here, name))
            except FileNotFoundError:
                continue
            size += status.st_blocks * 512
            inodes += 1
    return DiskUse(timestamp=time.time_ns(), mountpoint=str(mountpoint), used_bytes=size, inodes_used=inodes)

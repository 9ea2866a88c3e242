"""Root filesystems of containers: an overlay of an image's layers and a writable layer of the container's own.

    <run>/rootfs/<id>/                   where it is mounted
    <run>/volumes/<id>/<number>/         where the images of its image volumes are mounted, read-only
    <run>/idmapped/<id>/                 its layers as its user namespace's own, while it is being mounted
    <state>/containers/<id>/upper, work  its writable layer

The row comes before the mount and goes after the unmount, so whatever a crash leaves has a row, and the same request again
finishes it.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from crisp_proto.checkpoint import is_archive
from crisp_proto.image import (
    DiskUse,
    FileSystem,
    FilesystemInfo,
    Rootfs,
    RootfsRequest,
    UserNamespaceOwner,
    WritableLayers,
)
from image_svc import changes, overlay
from image_svc.images import Images
from image_svc.overlay import Stack
from image_svc.store import Store
from servicekit.crashpoints import crashpoint
from servicekit.errors import CrispError, FailedPrecondition, Internal, InvalidArgument, NotFound
from servicekit.linux import mount_table
from servicekit.linux.root_paths import resolve_in_root
from servicekit.tasks import KeyedQueue

_USAGE_SECONDS = 10  # how long a reading of a writable layer is good for: it walks the whole tree


class RootfsMounts:
    """All root filesystems of this node."""

    def __init__(self, store: Store, images: Images, state: Path, run: Path) -> None:
        self._store = store
        self._images = images
        self._layers = state / "layers"
        self._containers = state / "containers"
        self._mounts = run / "rootfs"
        self._volumes = run / "volumes"
        self._idmapped = run / "idmapped"
        # Layer 0 is the empty folder that stands in for an image without layers: overlayfs wants a lower one.
        for folder in (self._containers, self._mounts, self._volumes, self._idmapped, self._layers / "0"):
            folder.mkdir(parents=True, exist_ok=True)
        self._queue = KeyedQueue()
        self._usages: dict[str, DiskUse] = {}

    async def mount(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        """Mounts a root filesystem for the image; the same id again answers what is mounted. Raises NotFound for an unknown image."""
        return await self._queue.run(rootfs_id, "mount", lambda: self._mount(rootfs_id, request))

    async def _mount(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        known = self._store.rootfs(rootfs_id)
        if known is None:
            image = self._images.get(await self._image_name(request.image))
            volumes = {number: self._images.get(volume.image).id for number, volume in request.volumes.items()}
            rootfs = Rootfs(id=rootfs_id, path=str(self._mounts / rootfs_id), image_id=image.id, config=image.config)
            if not self._store.add_rootfs(rootfs_id, image.id, volumes, rootfs.model_dump_json()):
                raise NotFound(
                    f"image {request.image}, or one of its volumes, was removed meanwhile; pull it again", field="image"
                )
        else:
            rootfs = Rootfs.model_validate_json(known)
        crashpoint("rootfs-recorded")
        try:
            await self._mount_layers(rootfs, request)
            sub_paths = {number: volume.sub_path for number, volume in request.volumes.items()}
            rootfs = rootfs.model_copy(
                update={
                    "volumes": await self._mount_volumes(rootfs_id, sub_paths, request.user_namespace, request.label)
                }
            )
        except (OSError, CrispError) as error:
            if known is None:  # else a container may be running in it, and only this repetition of its request is wrong
                await self._remove(rootfs_id)
            if isinstance(error, CrispError):
                raise
            raise Internal(
                f"root filesystem of {rootfs_id}: {error}; does this kernel have overlayfs, and is {self._containers} on a file system that it can use?"
            ) from error
        crashpoint("rootfs-mounted")
        return rootfs

    async def _image_name(self, image: str) -> str:
        """The image itself, or the one that a checkpoint was taken of."""
        return await asyncio.to_thread(changes.image_of, Path(image)) if is_archive(image) else image

    async def _mount_layers(self, rootfs: Rootfs, request: RootfsRequest) -> None:
        target, own, owner = Path(rootfs.path), self._containers / rootfs.id, request.user_namespace
        if overlay.is_mounted(target):
            return
        for folder in (target, own / "upper", own / "work"):
            folder.mkdir(parents=True, exist_ok=True)
        (own / "upper").chmod(0o755)
        if owner is not None:
            os.chown(own / "upper", owner.uids[0].host_id, owner.gids[0].host_id)
        if is_archive(request.image):
            await asyncio.to_thread(changes.unpack, Path(request.image), own / "upper")
        with self._owned(rootfs.id, self._store.layers_of_rootfs(rootfs.id) or [0], owner) as stack:
            await overlay.mount(stack, own / "upper", own / "work", target, request.label)

    def _owned(
        self, rootfs_id: str, layers: Sequence[int], owner: UserNamespaceOwner | None
    ) -> AbstractContextManager[Stack]:
        """The layers as their owner's user namespace sees them, while they are being mounted."""
        stack = Stack(self._layers, layers)
        return (
            nullcontext(stack)
            if owner is None
            else overlay.idmapped(stack, Path(owner.path), self._idmapped / rootfs_id)
        )

    async def _mount_volumes(
        self, rootfs_id: str, sub_paths: Mapping[int, str], owner: UserNamespaceOwner | None, label: str
    ) -> dict[int, str]:
        """Mounts the images of the volumes; answers the wanted folder of each. Raises InvalidArgument for one that is not in the image."""
        found = {}
        for number, sub_path in sub_paths.items():
            target = self._volumes / rootfs_id / str(number)
            if not overlay.is_mounted(target):
                target.mkdir(parents=True, exist_ok=True)
                layers = [0, *self._store.layers_of_rootfs(rootfs_id, volume=number)]  # two at least
                with self._owned(rootfs_id, layers, owner) as stack:
                    await overlay.mount_readonly(stack, target, label)
            field = f"mounts[{number}].image_sub_path"
            try:
                wanted = resolve_in_root(target, sub_path)
                wanted.stat()
            except OSError as error:
                raise InvalidArgument(
                    f"{field} = {sub_path!r}: the image has no such path ({error.strerror})", field=field
                ) from error
            found[number] = str(wanted)
        return found

    async def remove(self, rootfs_id: str) -> None:
        """Unmounts and deletes; fine if there is none."""
        await self._queue.run(rootfs_id, "remove", lambda: self._remove(rootfs_id))

    async def _remove(self, rootfs_id: str) -> None:
        target, own = self._mounts / rootfs_id, self._containers / rootfs_id
        known = self._store.rootfs(rootfs_id)
        if known is None and not target.exists() and not own.exists():
            return
        await asyncio.to_thread(self._delete, rootfs_id)
        crashpoint("rootfs-deleted")
        self._store.remove_rootfs(rootfs_id)
        self._usages.pop(rootfs_id, None)
        if known is not None and self._store.drop_unused_layers():
            await self._images.sweep()

    def _delete(self, rootfs_id: str) -> None:
        overlay.discard(self._idmapped / rootfs_id)
        overlay.discard(self._volumes / rootfs_id)
        target = self._mounts / rootfs_id
        overlay.unmount(target)
        if target.exists():
            target.rmdir()
        shutil.rmtree(self._containers / rootfs_id, ignore_errors=True)

    def get(self, rootfs_id: str) -> Rootfs:
        """A root filesystem's record. Raises NotFound."""
        known = self._store.rootfs(rootfs_id)
        if known is None:
            raise NotFound(f"there is no root filesystem {rootfs_id}")
        return Rootfs.model_validate_json(known)

    def ages(self) -> dict[str, float]:
        """Ids of all root filesystems and their age in seconds."""
        return self._store.rootfs_ages()

    async def save_changes(self, rootfs_id: str, path: str) -> None:
        """Writes what the container has changed into a tar at `path`. Raises NotFound, FailedPrecondition."""
        self.get(rootfs_id)
        try:
            await asyncio.to_thread(changes.write, self._containers / rootfs_id / "upper", Path(path))
        except OSError as error:
            raise FailedPrecondition(
                f"the changes of {rootfs_id} can't be written to {path}: {error}", field="path"
            ) from error

    # Disk use

    async def writable_layers(self) -> WritableLayers:
        """Disk use of each writable layer, read anew where the last reading is over ten seconds old."""
        fresh = time.time_ns() - _USAGE_SECONDS * 1_000_000_000
        for rootfs_id in self._store.rootfs_ages():
            known = self._usages.get(rootfs_id)
            if known is None or known.timestamp < fresh:
                upper = self._containers / rootfs_id / "upper"
                self._usages[rootfs_id] = await asyncio.to_thread(_disk_use, upper, self._containers)
        return WritableLayers(layers=dict(self._usages), on=_file_system(self._containers))

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


def _file_system(folder: Path) -> FileSystem:
    status, device = os.statvfs(folder), os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    source = next((mounted.source for mounted in mount_table.read() if mounted.device == number), "")
    return FileSystem(
        device=source, size=status.f_blocks * status.f_frsize, inodes=status.f_files, inodes_free=status.f_ffree
    )

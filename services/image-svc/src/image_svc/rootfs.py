"""Root filesystems of containers: overlays of an image's layers and a writable layer.

    <run>/rootfs/<id>/                   where it is mounted
    <run>/volumes/<id>/<number>/         where its image volumes are mounted, read-only
    <run>/idmapped/<id>/                 its layers in its user namespace, while it is being mounted
    <state>/containers/<id>/upper, work  its writable layer
    <state>/containers/<id>/changes.tar  what it has changed, while a checkpoint is being taken

The row is written before the mount and deleted after the unmount. So whatever a crash leaves has a
row, and the same request again finishes it.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from crisp_proto.checkpoint import is_archive
from crisp_proto.image import (
    DiskUse,
    FileSystem,
    FilesystemInfo,
    Rootfs,
    RootfsRequest,
    WritableLayers,
)
from image_svc import changes, layers, overlay, user_namespaces
from image_svc.images import Images
from image_svc.layers import Layers
from image_svc.overlay import Stack
from image_svc.store import Store
from image_svc.user_namespaces import PodUserNamespace
from servicekit import checkpoint_dirs
from servicekit.crashpoints import crashpoint
from servicekit.errors import CrispError, FailedPrecondition, Internal, InvalidArgument, NotFound
from servicekit.linux import files, mount_table, processes, trees
from servicekit.linux.files import unlink_quietly
from servicekit.linux.root_paths import resolve_in_root
from servicekit.settings import NodeSettings
from servicekit.tasks import KeyedQueue

_USAGE_SECONDS = 10  # a reading of a writable layer is kept this long, since it walks the whole tree


class RootfsMounts:
    """All root filesystems of this node."""

    def __init__(self, store: Store, images: Images, layers: Layers, node: NodeSettings) -> None:
        self._store = store
        self._images = images
        self._layers = layers
        self._places = node.places
        self._checkpoint_dirs = node.checkpoint_dirs
        self._containers = node.places.writable_layers
        self._mounts = node.places.rootfs
        self._volumes = node.places.image_volumes
        self._idmapped = node.run_dir / "image-svc" / "idmapped"
        for folder in (self._containers, self._mounts, self._volumes, self._idmapped):
            folder.mkdir(parents=True, exist_ok=True)
        self._queue = KeyedQueue(node.places.turns("image-svc"))
        self._usages: dict[str, DiskUse] = {}

    # Mounting

    async def mount(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        """Mounts a root filesystem; for an id that is mounted already, returns what there is.

        Raises NotFound for an unknown image, InvalidArgument, Internal.
        """
        return await self._queue.run(rootfs_id, "mount", lambda: self._mount(rootfs_id, request))

    async def _mount(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        known = self._store.rootfs(rootfs_id)
        rootfs = await self._record(rootfs_id, request) if known is None else known
        crashpoint("rootfs-recorded")
        try:
            await self._mount_layers(rootfs, request)
            volumes = await self._mount_volumes(rootfs_id, request)
        except (OSError, CrispError) as error:
            if known is None:  # otherwise a container may be running in it, and only this request is wrong
                await self._remove(rootfs_id)
            if isinstance(error, CrispError):
                raise
            raise Internal(
                f"root filesystem of {rootfs_id}: {error}",
                hint=f"does this kernel have overlayfs, and is {self._containers} on a file system that it can use?",
            ) from error
        crashpoint("rootfs-mounted")
        return rootfs.model_copy(update={"volumes": volumes})

    async def _record(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        """Writes the row, which keeps the layers from being swept. Raises NotFound."""
        image = self._images.get(await self._image_of(request))
        volumes = {number: self._images.get(volume.image).id for number, volume in request.volumes.items()}
        path = str(self._mounts / rootfs_id)
        rootfs = Rootfs(id=rootfs_id, path=path, image_id=image.id, config=image.config, volume_images=volumes)
        if not self._store.add_rootfs(rootfs, volumes):
            raise NotFound(
                f"image {request.image}, or one of its volumes, was removed meanwhile",
                hint="pull it again",
                field="image",
            )
        return rootfs

    async def _image_of(self, request: RootfsRequest) -> str:
        """Returns the image that the request names, or the one that its checkpoint was taken of."""
        image = request.image
        return await asyncio.to_thread(changes.image_of, self._archive(image)) if is_archive(image) else image

    def _archive(self, path: str) -> Path:
        return checkpoint_dirs.resolve(path, self._checkpoint_dirs, "image.image")

    async def _mount_layers(self, rootfs: Rootfs, request: RootfsRequest) -> None:
        target, own = self._mounts / rootfs.id, self._containers / rootfs.id
        if mount_table.is_mounted(target):
            return
        for folder in (target, own / "work"):
            folder.mkdir(parents=True, exist_ok=True)
        owner = self._owner(request)
        root_ids = None if owner is None else owner.root_ids
        upper = files.make_folder(own / "upper", owner=root_ids)
        if is_archive(request.image):
            await asyncio.to_thread(changes.unpack, self._archive(request.image), upper)
        numbers = self._store.layers_of_rootfs(rootfs.id) or [layers.EMPTY]
        with self._owned(rootfs.id, numbers, owner) as stack:
            await overlay.mount(stack, upper, own / "work", target, request.label)

    async def _mount_volumes(self, rootfs_id: str, request: RootfsRequest) -> dict[int, str]:
        """Mounts the images of the volumes, and returns the wanted path in each.

        Raises InvalidArgument, OSError.
        """
        found = {}
        for number, volume in request.volumes.items():
            target = self._volumes / rootfs_id / str(number)
            if not mount_table.is_mounted(target):
                target.mkdir(parents=True, exist_ok=True)
                numbers = [layers.EMPTY, *self._store.layers_of_volume(rootfs_id, number)]  # two at least
                with self._owned(rootfs_id, numbers, self._owner(request)) as stack:
                    await overlay.mount_readonly(stack, target, request.label)
            found[number] = _path_in_volume(target, number, volume.sub_path)
        return found

    def _owner(self, request: RootfsRequest) -> PodUserNamespace | None:
        """Returns the user namespace of the pod's own; None if the pod uses the node's."""
        return user_namespaces.of_pod(self._places, request.pod_id) if request.pod_id else None

    def _owned(
        self, rootfs_id: str, numbers: Sequence[int], owner: PodUserNamespace | None
    ) -> AbstractContextManager[Stack]:
        """The layers with the ids of their owner's user namespace, while they are being mounted."""
        stack = Stack(self._layers.folder, numbers)
        if owner is None:
            return nullcontext(stack)
        return overlay.idmapped(stack, owner.path, self._idmapped / rootfs_id)

    # Removing

    async def remove(self, rootfs_id: str) -> None:
        """Unmounts and deletes a root filesystem; fine if there is none.

        Raises FailedPrecondition while the container runs in it.
        """
        await self._queue.run(rootfs_id, "remove", lambda: self._remove(rootfs_id))

    async def _remove(self, rootfs_id: str) -> None:
        target, own = self._mounts / rootfs_id, self._containers / rootfs_id
        known = self._store.rootfs(rootfs_id)
        if known is None and not target.exists() and not own.exists():
            return
        pid = processes.read_pidfile(self._places.pidfile(rootfs_id))
        if pid is not None and processes.is_in_cgroup_of(pid, rootfs_id):
            raise FailedPrecondition(f"container {rootfs_id} runs in it, process {pid}", hint="stop it first")
        await asyncio.to_thread(self._delete, rootfs_id)
        crashpoint("rootfs-deleted")
        self._store.remove_rootfs(rootfs_id)
        self._usages.pop(rootfs_id, None)
        if known is not None and self._store.drop_unused_layers():
            await self._layers.sweep()

    def _delete(self, rootfs_id: str) -> None:
        overlay.discard(self._idmapped / rootfs_id)
        overlay.discard(self._volumes / rootfs_id)
        target = self._mounts / rootfs_id
        overlay.unmount(target)
        trees.remove_quietly(target)  # it is empty, unless somebody put something there
        trees.remove_quietly(self._containers / rootfs_id)

    # Asking

    def get(self, rootfs_id: str) -> Rootfs:
        """Returns a root filesystem's record. Raises NotFound."""
        known = self._store.rootfs(rootfs_id)
        if known is None:
            raise NotFound(f"there is no root filesystem {rootfs_id}")
        return known

    def ages(self) -> dict[str, float]:
        """Returns the ids of all root filesystems with their ages in seconds."""
        return self._store.rootfs_ages()

    async def save_changes(self, rootfs_id: str) -> None:
        """Writes what the container has changed into changes.tar, beside its writable layer.

        Raises NotFound, FailedPrecondition.
        """
        await self._queue.run(rootfs_id, "save", lambda: self._save_changes(rootfs_id))

    async def _save_changes(self, rootfs_id: str) -> None:
        self.get(rootfs_id)
        path = self._places.changes(rootfs_id)
        beside = path.with_name(f"{path.name}.part")
        try:
            await asyncio.to_thread(changes.write, self._containers / rootfs_id / "upper", beside)
            beside.rename(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise FailedPrecondition(f"the changes of {rootfs_id} can't be written to {path}: {error}") from error

    async def discard_changes(self, rootfs_id: str) -> None:
        """Deletes changes.tar; fine if there is none."""
        await self._queue.run(
            rootfs_id, "discard", lambda: asyncio.to_thread(unlink_quietly, self._places.changes(rootfs_id))
        )

    # Disk use

    async def writable_layers(self) -> WritableLayers:
        """Returns the disk use of each writable layer; a reading is up to ten seconds old."""
        fresh = time.time_ns() - _USAGE_SECONDS * 1_000_000_000
        for rootfs_id in self._store.rootfs_ages():
            known = self._usages.get(rootfs_id)
            if known is None or known.timestamp < fresh:
                upper = self._containers / rootfs_id / "upper"
                self._usages[rootfs_id] = await asyncio.to_thread(_disk_use, upper, self._containers)
        there = self._store.rootfs_ages()  # some may have been removed while others were read
        self._usages = {rootfs_id: use for rootfs_id, use in self._usages.items() if rootfs_id in there}
        return WritableLayers(layers=dict(self._usages), on=_file_system(self._containers))

    async def filesystem_info(self) -> FilesystemInfo:
        """Returns the disk use of all images, and that of all writable layers."""
        size, inodes = self._store.disk_use()
        uses = (await self.writable_layers()).layers.values()
        now = time.time_ns()
        return FilesystemInfo(
            images=DiskUse(timestamp=now, mountpoint=str(self._layers.folder), used_bytes=size, inodes_used=inodes),
            containers=DiskUse(
                timestamp=now,
                mountpoint=str(self._containers),
                used_bytes=sum(use.used_bytes for use in uses),
                inodes_used=sum(use.inodes_used for use in uses),
            ),
        )


def _path_in_volume(mounted: Path, number: int, sub_path: str) -> str:
    """Returns the host's path of `sub_path` in an image volume.

    Raises InvalidArgument if the image lacks it.
    """
    field = f"mounts[{number}].image_sub_path"
    try:
        wanted = resolve_in_root(mounted, sub_path)
        wanted.stat()
    except (OSError, ValueError) as error:  # ValueError for a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidArgument(f"{field} = {sub_path!r}: the image has no such path ({reason})", field=field) from error
    return str(wanted)


def _disk_use(folder: Path, mountpoint: Path) -> DiskUse:
    """Counts the blocks and inodes below a folder, in which a container may be at work."""
    size = inodes = 0
    with suppress(FileNotFoundError):  # the root filesystem may not be made yet, or be gone
        for entry in trees.walk(folder):
            size += entry.stat.st_blocks * 512
            inodes += 1
    return DiskUse(timestamp=time.time_ns(), mountpoint=str(mountpoint), used_bytes=size, inodes_used=inodes)


def _file_system(folder: Path) -> FileSystem:
    status, device = os.statvfs(folder), os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    source = next((mounted.source for mounted in mount_table.read() if mounted.device == number), "")
    return FileSystem(
        device=source, size=status.f_blocks * status.f_frsize, inodes=status.f_files, inodes_free=status.f_ffree
    )

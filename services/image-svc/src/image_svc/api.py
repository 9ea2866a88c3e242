"""image-svc's routes."""

from fastapi import APIRouter, Depends

from crisp_proto.ids import Id
from crisp_proto.image import (
    FilesystemInfo,
    Image,
    ImageList,
    LoadRequest,
    PullRequest,
    Rootfs,
    RootfsIds,
    RootfsRequest,
    WritableLayers,
)  # fmt: skip
from image_svc.images import Images
from image_svc.rootfs import RootfsMounts
from servicekit.app import only_root


def routes(images: Images, mounts: RootfsMounts) -> APIRouter:
    """Returns the routes under /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/images")
    async def list_images() -> ImageList:
        """Returns all images."""
        return ImageList(images=images.all())

    @router.get("/images/{name:path}")
    async def get_image(name: str) -> Image:
        """Returns the image with this name, id or unique beginning of an id."""
        return images.get(name)

    @router.delete("/images/{name:path}", status_code=204)
    async def remove_image(name: str) -> None:
        """Removes a name, and the image with its last one; by id, the image with all its names."""
        await images.remove(name)

    @router.post("/pulls")
    async def pull(request: PullRequest) -> Image:
        """Fetches an image from its registry; layers that are here already are not downloaded."""
        return await images.pull(request)

    @router.post("/loads", dependencies=[Depends(only_root)])
    async def load(request: LoadRequest) -> ImageList:
        """Loads the images of an OCI layout, or of a tar of one, from the disk. Only for root."""
        return ImageList(images=await images.load(request))

    @router.get("/rootfs")
    async def list_rootfs() -> RootfsIds:
        """Returns the ids and ages of all root filesystems."""
        return RootfsIds(ages=mounts.ages())

    @router.put("/rootfs/{id}")
    async def mount_rootfs(id: Id, request: RootfsRequest) -> Rootfs:
        """Mounts a container's root filesystem. Idempotent."""
        return await mounts.mount(id, request)

    @router.get("/rootfs/{id}")
    async def get_rootfs(id: Id) -> Rootfs:
        """Returns a root filesystem."""
        return mounts.get(id)

    @router.post("/rootfs/{id}/changes", status_code=204)
    async def save_changes(id: Id) -> None:
        """Writes what the container has changed into a tar, for a checkpoint."""
        await mounts.save_changes(id)

    @router.delete("/rootfs/{id}/changes", status_code=204)
    async def discard_changes(id: Id) -> None:
        """Deletes the tar once the checkpoint has it; fine if there is none."""
        await mounts.discard_changes(id)

    @router.delete("/rootfs/{id}", status_code=204)
    async def remove_rootfs(id: Id) -> None:
        """Unmounts and deletes a root filesystem; fine if there is none."""
        await mounts.remove(id)

    @router.get("/filesystem")
    async def filesystem() -> FilesystemInfo:
        """Returns the disk use of images and of containers."""
        return await mounts.filesystem_info()

    @router.get("/writable-layers")
    async def writable_layers() -> WritableLayers:
        """Returns the disk use of each container's writable layer."""
        return await mounts.writable_layers()

    return router

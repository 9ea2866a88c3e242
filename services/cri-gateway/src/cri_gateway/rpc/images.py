"""ImageService's methods. Each is one call to image-svc, so there is no flow between them."""

import json
import time

from cri_gateway.services import ImageService
from crisp_proto.cri import api_pb2
from crisp_proto.image import DiskUse, Image, PullRequest
from crisp_proto.image_name import MAX_LENGTH
from servicekit.errors import InvalidArgument, NotFound
from servicekit.linux import accounts


class ImageMethods:
    """Translates between CRI's messages and image-svc's models."""

    def __init__(self, image: ImageService) -> None:
        self._image = image

    async def list(self, request: api_pb2.ListImagesRequest) -> api_pb2.ListImagesResponse:
        """ListImages. A filter names one image."""
        if not request.filter.image.image:
            return api_pb2.ListImagesResponse(images=[to_message(image) for image in await self._image.images()])
        try:
            return api_pb2.ListImagesResponse(images=[to_message(await self._image.image(_name(request.filter.image)))])
        except NotFound:
            return api_pb2.ListImagesResponse()

    async def status(self, request: api_pb2.ImageStatusRequest) -> api_pb2.ImageStatusResponse:
        """ImageStatus. For an unknown image the answer has none."""
        try:
            image = await self._image.image(_name(request.image))
        except NotFound:
            return api_pb2.ImageStatusResponse()
        return api_pb2.ImageStatusResponse(image=to_message(image), info=_info(image) if request.verbose else None)

    async def pull(self, request: api_pb2.PullImageRequest) -> api_pb2.PullImageResponse:
        """PullImage."""
        auth = request.auth
        pulled = await self._image.pull(
            PullRequest(
                reference=_name(request.image),
                username=auth.username,
                password=auth.password,
                auth=auth.auth,
                identity_token=auth.identity_token,
                registry_token=auth.registry_token,
            )
        )
        return api_pb2.PullImageResponse(image_ref=pulled.id)

    async def remove(self, request: api_pb2.RemoveImageRequest) -> api_pb2.RemoveImageResponse:
        """RemoveImage. An unknown image is no error."""
        await self._image.remove(_name(request.image))
        return api_pb2.RemoveImageResponse()

    async def filesystem(self, _request: api_pb2.ImageFsInfoRequest) -> api_pb2.ImageFsInfoResponse:
        """ImageFsInfo."""
        info = await self._image.filesystem()
        return api_pb2.ImageFsInfoResponse(
            image_filesystems=[disk_use(info.images)], container_filesystems=[disk_use(info.containers)]
        )


def disk_use(use: DiskUse | None) -> api_pb2.FilesystemUsage:
    """Returns CRI's FilesystemUsage; without values if the use is not known."""
    if use is None:
        return api_pb2.FilesystemUsage(timestamp=time.time_ns())
    return api_pb2.FilesystemUsage(
        timestamp=use.timestamp,
        fs_id=api_pb2.FilesystemIdentifier(mountpoint=use.mountpoint),
        used_bytes=api_pb2.UInt64Value(value=use.used_bytes),
        inodes_used=api_pb2.UInt64Value(value=use.inodes_used),
    )


def _name(image: api_pb2.ImageSpec) -> str:
    if not image.image:
        raise InvalidArgument("image.image is empty; it names the image", field="image.image")
    if len(image.image) > MAX_LENGTH:
        raise InvalidArgument(
            f"image.image = {image.image[:100]!r}…: longer than the {MAX_LENGTH} characters of a reference",
            field="image.image",
        )
    return image.image


def to_message(image: Image) -> api_pb2.Image:
    """Returns CRI's Image."""
    user, _ = accounts.split_user(image.config.user)
    # kubelet runs an image as root if it is told neither id nor name. A number that is no id is
    # therefore told as a name: kubelet passes that on, and CreateContainer refuses it.
    uid = accounts.parse_id(user)
    return api_pb2.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=image.size,
        uid=None if uid is None else api_pb2.Int64Value(value=uid),
        username=user if uid is None else "",
        spec=api_pb2.ImageSpec(image=image.repo_tags[0] if image.repo_tags else image.id),
        pinned=image.pinned,
    )


def _info(image: Image) -> dict[str, str]:
    """Returns the document that a verbose status carries (crictl inspecti)."""
    document = {"config": image.config.model_dump(mode="json"), "labels": image.config.labels}
    return {"info": json.dumps(document)}

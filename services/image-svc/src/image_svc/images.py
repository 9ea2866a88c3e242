"""Images: finding them by any form of their name, listing, pulling, loading, removing."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from crisp_proto.image import Image, LoadRequest, PullRequest
from crisp_proto.image_name import ImageName, id_prefix, is_digest
from image_svc.layers import Layers
from image_svc.layout import Layout, open_layout
from image_svc.manifests import Manifest, Source, image_config, resolve
from image_svc.registries_conf import RegistriesConf
from image_svc.registry import Repository
from image_svc.settings import ImageSettings
from image_svc.store import Store, StoredImage
from servicekit import logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import InvalidArgument, NotFound, Unavailable
from servicekit.tasks import SingleFlight

_ATTEMPTS = 3  # at an image whose layers a sweep may remove before the image is recorded

_log = logs.get()


class Images:
    """The images of this node."""

    def __init__(self, store: Store, conf: RegistriesConf, settings: ImageSettings, layers: Layers) -> None:
        self._store = store
        self._conf = conf
        self._settings = settings
        self._layers = layers
        self._pulls = SingleFlight[str]()

    # Finding

    def all(self) -> list[Image]:
        """Returns all images."""
        return [self._shown(image) for image in self._store.images()]

    def get(self, text: str) -> Image:
        """Returns the image that `text` names: by name, by id, or by the unique beginning of an id.

        Raises NotFound, InvalidArgument.
        """
        return self._shown(self._find(text)[0])

    def _find(self, text: str) -> tuple[StoredImage, ImageName | None]:
        """Finds an image; also returns the name that it was found by, None if that was an id."""
        prefix = id_prefix(text)
        found = self._by_id(text, prefix) if prefix else None
        if found is not None:
            return found, None
        if prefix and is_digest(text):
            raise NotFound(f"there is no image with id {text}", hint="pull it first", field="image")
        name = self._conf.full_name(text)
        found = self._store.image_by_name(name)
        if found is None:
            raise NotFound(f"image {text} is not on this node", hint="pull it first", field="image")
        return found, name

    def _by_id(self, text: str, prefix: str) -> StoredImage | None:
        ids = self._store.ids_with_prefix(prefix)
        if len(ids) > 1:
            raise InvalidArgument(
                f"image id {text!r} is the beginning of several images' ids", hint="give more of it", field="image"
            )
        return self._store.image(ids[0]) if ids else None

    def _shown(self, image: StoredImage) -> Image:
        return Image(
            id=image.id,
            repo_tags=[str(name) for name in image.names if name.digest is None],
            repo_digests=[str(name) for name in image.names if name.digest is not None],
            size=image.size,
            pinned=any(str(name) in self._settings.pinned for name in image.names),
            config=image_config(image.config),
        )

    # Fetching

    async def pull(self, request: PullRequest) -> Image:
        """Fetches an image and returns it; identical pulls at the same time share one fetch."""
        name = self._conf.full_name(request.reference)
        key = (str(name), request.model_dump_json())
        return self.get(await self._pulls.run(key, lambda: self._pull(name, request)))

    async def _pull(self, name: ImageName, request: PullRequest) -> str:
        repository = Repository(name, self._conf, request, self._settings.pull_timeout)
        try:
            manifest = await self._layers.in_thread(lambda: resolve(repository, name.reference))
            digests = sorted({manifest.digest, manifest.index_digest})
            names = [name.with_digest(digest) for digest in digests]
            if name.digest is None:
                names.insert(0, name)
            await self._fetch(repository, manifest, names)
        finally:
            repository.close()
        _log.info(
            "image-pulled",
            reference=str(name),
            image=manifest.config_digest,
            layers=len(manifest.layers),
            bytes=manifest.size,
        )
        return manifest.config_digest

    async def load(self, request: LoadRequest) -> list[Image]:
        """Takes all images of an OCI layout, or of an archive of one, from this host's disk."""
        async with self._opened(Path(request.path)) as layout:
            return [
                self.get(await self._load(layout, digest, request.reference or name))
                for digest, name in layout.names().items()
            ]

    @asynccontextmanager
    async def _opened(self, path: Path) -> AsyncIterator[Layout]:
        opened = open_layout(path, self._layers.scratch)
        layout = await self._layers.in_thread(opened.__enter__)
        try:
            yield layout
        finally:
            await self._layers.in_thread(lambda: opened.__exit__(None, None, None))

    async def _load(self, layout: Layout, digest: str, familiar: str | None) -> str:
        if not familiar:
            raise InvalidArgument(
                f"the image {digest} in the layout has no name of its own", hint="give a reference", field="reference"
            )
        name = self._conf.full_name(familiar)
        manifest = await self._layers.in_thread(lambda: resolve(layout, digest))
        await self._fetch(layout, manifest, [name.with_tag(name.tag or "latest"), name.with_digest(digest)])
        return manifest.config_digest

    async def _fetch(self, source: Source, manifest: Manifest, names: Sequence[ImageName]) -> None:
        """Fetches the layers of an image, then records it with its names."""
        for _ in range(_ATTEMPTS):
            numbers = await self._layers.fetch_all(source, manifest)
            crashpoint("image-layers-unpacked")
            if self._store.add_image(manifest, numbers, names):
                return
        raise Unavailable(f"layers of {names[0]} were removed while it was pulled, three times", hint="pull again")

    # Removing

    async def remove(self, text: str) -> None:
        """Removes a name, and the image with its last one; by id, the image with all its names.

        An unknown image is fine. Layers that a container uses stay until the container is removed.
        """
        try:
            image, name = self._find(text)
        except NotFound:
            return
        if name is None:
            self._store.remove_image(image.id)
        else:
            self._store.remove_name(name)
        _log.info("image-removed", image=image.id, asked=text)
        await self._layers.sweep()

"""Images: finding them by any form of their name, listing, pulling, loading, removing."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from crisp_proto.image import Image, LoadRequest, PullRequest
from image_svc import references
from image_svc.layers import Unpacked, fetch_and_unpack
from image_svc.layout import Layout, open_layout
from image_svc.manifests import Layer, Manifest, Source, image_config, resolve
from image_svc.references import Reference
from image_svc.registries_conf import RegistriesConf
from image_svc.registry import Repository
from image_svc.settings import ImageSettings
from image_svc.store import Store, StoredImage
from servicekit import logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import InvalidArgument, NotFound, Unavailable
from servicekit.tasks import SingleFlight, gather_or_cancel

T = TypeVar("T")

_log = logs.get()


class Images:
    """The images of this node.

    <state>/layers/<number>/     a layer's tree, as overlayfs wants it
    <state>/scratch/<random>/    a layer being written (its writer holds a lock on the folder), or one being removed
    """

    def __init__(self, store: Store, conf: RegistriesConf, settings: ImageSettings, state: Path) -> None:
        self._store = store
        self._conf = conf
        self._settings = settings
        self._layers = state / "layers"
        self._scratch = state / "scratch"
        for folder in (self._layers, self._scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self._threads = ThreadPoolExecutor(max_workers=4 * settings.parallel_layers, thread_name_prefix="pull")
        self._pulls = SingleFlight[str]()
        self._fetches = SingleFlight[int]()

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # Finding

    def all(self) -> list[Image]:
        """All images."""
        return [self._shown(image) for image in self._store.images()]

    def get(self, text: str) -> Image:
        """The image that `text` names: a reference, an id or a unique beginning of one. Raises NotFound, InvalidArgument."""
        return self._shown(self._find(text))

    def _find(self, text: str) -> StoredImage:
        prefix = references.as_id_prefix(text)
        if prefix is not None:
            ids = self._store.ids_with_prefix(prefix)
            if len(ids) > 1:
                raise InvalidArgument(
                    f"image id {text!r} is the beginning of several images' ids; give more of it", field="image"
                )
            found = self._store.image(ids[0]) if ids else None
            if found is not None:
                return found
            if text.startswith("sha256:"):
                raise NotFound(f"there is no image with id {text}; pull it first", field="image")
        for name in _names(references.parse(text, self._conf.default_registry())):
            found = self._store.image_by_name(name)
            if found is not None:
                return found
        raise NotFound(f"image {text} is not on this node; pull it first", field="image")

    def _shown(self, image: StoredImage) -> Image:
        return Image(
            id=image.id,
            repo_tags=[name for name in image.names if "@" not in name],
            repo_digests=[name for name in image.names if "@" in name],
            size=image.size,
            pinned=any(name in self._settings.pinned for name in image.names),
            config=image_config(image.config),
        )

    # Fetching

    async def pull(self, request: PullRequest) -> Image:
        """Fetches an image and answers it; equal pulls at the same time are one."""
        reference = references.parse(request.reference, self._conf.default_registry())
        return self.get(
            await self._pulls.run((str(reference), request.model_dump_json()), lambda: self._pull(reference, request))
        )

    async def _pull(self, reference: Reference, request: PullRequest) -> str:
        repository = Repository(reference, self._conf, request, self._settings.pull_timeout)
        try:
            manifest = await self._in_thread(lambda: resolve(repository, reference.wanted))
            digests = {f"{reference.name}@{digest}" for digest in (manifest.digest, manifest.index_digest)}
            names = [
                *([f"{reference.name}:{reference.tag}"] if reference.tag and not reference.digest else []),
                *sorted(digests),
            ]
            await self._take(repository, manifest, names)
        finally:
            repository.close()
        _log.info(
            "pulled",
            reference=str(reference),
            image=manifest.config_digest,
            layers=len(manifest.layers),
            bytes=manifest.size,
        )
        return manifest.config_digest

    async def load(self, request: LoadRequest) -> list[Image]:
        """Takes all images of an OCI layout or an archive of one."""
        opened = open_layout(Path(request.path), self._scratch)
        layout = await self._in_thread(opened.__enter__)
        try:
            return [
                self.get(await self._load(layout, digest, request.reference or name))
                for digest, name in layout.names().items()
            ]
        finally:
            await self._in_thread(lambda: opened.__exit__(None, None, None))

    async def _load(self, layout: Layout, digest: str, name: str) -> str:
        if not name:
            raise InvalidArgument(
                f"the image {digest} in the layout has no name of its own; give a reference", field="reference"
            )
        reference = references.parse(name, self._conf.default_registry())
        manifest = await self._in_thread(lambda: resolve(layout, digest))
        await self._take(
            layout, manifest, [f"{reference.name}:{reference.tag or 'latest'}", f"{reference.name}@{digest}"]
        )
        return manifest.config_digest

    async def _take(self, source: Source, manifest: Manifest, names: list[str]) -> None:
        for _ in range(3):
            limit = asyncio.Semaphore(self._settings.parallel_layers)
            numbers = await gather_or_cancel(*(self._layer(source, layer, limit) for layer in manifest.layers))
            crashpoint("image-layers-unpacked")
            if self._store.add_image(manifest, numbers, names):
                return
        raise Unavailable(f"layers of {names[0]} were removed while it was pulled, three times; pull again")

    async def _layer(self, source: Source, layer: Layer, limit: asyncio.Semaphore) -> int:
        """The number of a layer that is ready, fetched if need be; one fetch for all who want it at the same time."""
        number, ready = self._store.reserve_layer(layer.diff_id)
        if ready:
            return number
        async with limit:
            return await self._fetches.run(layer.diff_id, lambda: self._fetch(source, layer, number))

    async def _fetch(self, source: Source, layer: Layer, number: int) -> int:
        unpacked = await self._in_thread(lambda: self._unpack(source, layer, self._layers / str(number)))
        self._store.layer_ready(number, unpacked)
        return number

    def _unpack(self, source: Source, layer: Layer, target: Path) -> Unpacked:
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tree = folder / "tree"
            tree.mkdir(mode=0o755)
            unpacked = fetch_and_unpack(source, layer, tree)
            if not target.exists():  # else another replica was first
                tree.rename(target)
            return unpacked
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # Removing

    async def remove(self, text: str) -> None:
        """By name: takes the name away, and the image with its last one. By id: the image and all its names. Unknown: nothing.

        Layers that a container still uses stay until it is removed.
        """
        try:
            image = self._find(text)
        except NotFound:
            return
        reference = (
            None
            if references.as_id_prefix(text) and text not in image.names
            else references.parse(text, self._conf.default_registry())
        )
        if reference is None:
            self._store.remove_image(image.id)
        else:
            for name in _names(reference):
                self._store.remove_name(name)
        _log.info("removed", image=image.id, asked=text)
        await self.sweep()

    async def sweep(self) -> None:
        """Removes layers that nothing uses, and leftovers of fetches that died (their lock is free)."""
        self._store.drop_unused_layers()
        folders = os.listdir(self._layers)  # before the rows: a folder's row is older than the folder
        unwanted = set(folders) - {str(number) for number in self._store.layer_numbers()} - {"0"}
        await self._in_thread(lambda: self._sweep_folders(unwanted))

    def _sweep_folders(self, unwanted: set[str]) -> None:
        for name in unwanted:
            with contextlib.suppress(OSError):
                (self._layers / name).rename(self._scratch / f"removed-{name}-{time.time_ns()}")
        for folder in self._scratch.iterdir():
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


def _names(reference: Reference) -> list[str]:
    """Under which names the store may have it; a digest beats a tag."""
    if reference.digest:
        return [f"{reference.name}@{reference.digest}"]
    return [f"{reference.name}:{reference.tag}"]

"""The unpacked layers of this node, each in a folder of its own.

    <state>/layers/<number>/     a layer's tree, in the form that overlayfs wants
    <state>/layers/0/            an empty folder
    <state>/scratch/             layers that are being unpacked or removed (image_svc.scratch)

overlayfs needs a lower layer, and an image may have none: layer 0 stands in for it. A layer is
unpacked below scratch/ and renamed into layers/ once its digests are right.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from image_svc.manifests import Layer, Manifest, Source
from image_svc.scratch import Scratch
from image_svc.store import Store
from image_svc.unpacking import Unpacked, fetch_and_unpack
from servicekit.tasks import SingleFlight, gather_or_cancel

T = TypeVar("T")

EMPTY = 0
"""The number of the empty layer, which has no row."""


class Layers:
    """Fetches layers, each at most once at a time, and removes those that nothing uses."""

    def __init__(self, store: Store, state: Path, parallel: int) -> None:
        self._store = store
        self._parallel = parallel
        self.folder = state / "layers"
        (self.folder / str(EMPTY)).mkdir(parents=True, exist_ok=True)
        self.scratch = Scratch(state / "scratch")
        self._threads = ThreadPoolExecutor(max_workers=4 * parallel, thread_name_prefix="pull")
        self._fetches = SingleFlight[int]()

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs blocking work in a thread of those that serve pulls."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def fetch_all(self, source: Source, manifest: Manifest) -> list[int]:
        """Fetches the missing layers of an image; returns the numbers of all, the lowest first."""
        limit = asyncio.Semaphore(self._parallel)
        numbers: list[int] = await gather_or_cancel(*(self._ensure(source, layer, limit) for layer in manifest.layers))
        return numbers

    async def _ensure(self, source: Source, layer: Layer, limit: asyncio.Semaphore) -> int:
        number, ready = self._store.reserve_layer(layer.diff_id)
        if ready:
            return number
        async with limit:
            return await self._fetches.run(layer.diff_id, lambda: self._fetch(source, layer, number))

    async def _fetch(self, source: Source, layer: Layer, number: int) -> int:
        unpacked = await self.in_thread(lambda: self._unpack(source, layer, self.folder / str(number)))
        self._store.set_layer_ready(number, unpacked)
        return number

    def _unpack(self, source: Source, layer: Layer, target: Path) -> Unpacked:
        with self.scratch.folder() as folder:
            tree = folder / "tree"
            tree.mkdir(mode=0o755)
            unpacked = fetch_and_unpack(source, layer, tree)
            if not target.exists():  # another replica may have been first
                tree.rename(target)
            return unpacked

    async def sweep(self) -> None:
        """Removes layers that nothing uses, and what killed processes left in scratch/."""
        self._store.drop_unused_layers()
        folders = os.listdir(self.folder)  # before the rows are read: a layer's row is older than its folder
        unwanted = set(folders) - {str(number) for number in (EMPTY, *self._store.layer_numbers())}
        await self.in_thread(lambda: self._sweep_folders(unwanted))

    def _sweep_folders(self, unwanted: set[str]) -> None:
        for name in unwanted:
            with contextlib.suppress(OSError):
                self.scratch.take(self.folder / name)
        self.scratch.sweep()

"""Checkpoints by CRIU through the OCI runtime; image-svc adds the writable layer in between.

    LOCATION                         the archive (crisp_proto.checkpoint), once it is whole
    LOCATION.part-ID/                what will be in it
    <state>/checkpoints/<container>  CRIU's images of a container that is to be restored

image-svc keeps the writable layer where servicekit.places says until the archive is written.

A container is frozen from `begin` to `finish`, so that memory and files fit together. Its row has
the latest time for that, and a lock on the folder shows that the process which froze it is alive.
Otherwise the sweep thaws the container and abandons the checkpoint.
"""

import asyncio
import contextlib
import shutil
import time
from functools import partial
from pathlib import Path

from crisp_proto import checkpoint
from crisp_proto.checkpoint import CheckpointRequest, PodCheckpoint, PodCheckpointRequest
from crisp_proto.runtime import Container, PodRequest
from runtime_svc import checkpoint_files
from runtime_svc.containers import Containers
from runtime_svc.pods import Pods
from runtime_svc.runtimes.handlers import Handlers
from runtime_svc.runtimes.oci_runtime import OciRuntime
from runtime_svc.store import Store
from servicekit import checkpoint_dirs, logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from servicekit.linux import files, trees
from servicekit.settings import NodeSettings
from servicekit.tasks import KeyedQueue, for_each

_PATIENCE_SECONDS = 60
"""How much longer than the dump itself a container may stay frozen."""
_MAX_POD_BYTES = 16 << 20
_log = logs.get()


class Checkpoints:
    """All checkpoints that are being taken."""

    def __init__(
        self, store: Store, pods: Pods, containers: Containers, handlers: Handlers, node: NodeSettings, timeout: float
    ) -> None:
        self._store = store
        self._pods = pods
        self._containers = containers
        self._handlers = handlers
        self._places = node.places
        self._allowed = node.checkpoint_dirs
        self._timeout = timeout
        self._locks: dict[str, contextlib.ExitStack] = {}
        self._queue = KeyedQueue()

    async def begin(self, container_id: str, request: CheckpointRequest) -> None:
        """Freezes a running container and dumps it; `finish` or `abandon` thaw it.

        NotFound: no such container. InvalidArgument: names the location. Unimplemented: CRIU does
        not work here. Unknown: the dump failed.
        """
        await self._queue.run(container_id, f"begin {request}", lambda: self._begin(container_id, request))

    async def _begin(self, container_id: str, request: CheckpointRequest) -> None:
        container = self._containers.get(container_id)
        runtime = self._handlers.of(container)
        (await self._handlers.features(runtime)).demand_checkpoint()
        location, timeout = self._resolve(request.location, "location"), request.timeout or self._timeout
        if not location.parent.is_dir() or location.is_dir():
            raise InvalidArgument(
                f"location = {request.location!r}: is no path of a file in a folder that exists",
                field="location",
            )
        await self._abandon_if_dead(container_id)
        if not self._store.begin_checkpoint(container_id, str(location), time.time() + timeout + _PATIENCE_SECONDS):
            raise FailedPrecondition(f"container {container_id} is being checkpointed already", field="container_id")
        part = checkpoint_files.part(location, container_id)
        crashpoint("checkpoint-recorded")
        try:
            await self._dump(container, runtime, part, timeout)
        except BaseException as error:
            await self._abandon(container_id)
            if isinstance(error, OSError):
                raise FailedPrecondition(
                    f"location = {request.location!r}: {error.strerror}", field="location"
                ) from error
            raise
        self._store.prolong_checkpoint(container_id, time.time() + _PATIENCE_SECONDS)

    def _resolve(self, path: str, field: str) -> Path:
        return checkpoint_dirs.resolve(path, self._allowed, field)

    async def _dump(self, container: Container, runtime: OciRuntime, part: Path, timeout: float) -> None:
        part.mkdir(mode=0o700)
        lock = self._locks[container.id] = contextlib.ExitStack()
        lock.enter_context(files.locked(part, wait=False))
        await runtime.pause(container.id)
        crashpoint("checkpoint-frozen")
        (part / checkpoint.IMAGES).mkdir()
        await runtime.checkpoint(container.id, part / checkpoint.IMAGES, part, timeout)
        crashpoint("checkpoint-dumped")
        shutil.copy(f"{container.launch.bundle}/config.json", part / checkpoint.SPEC)
        (part / checkpoint.CONFIG).write_text(checkpoint_files.describe(container, runtime).model_dump_json())

    async def finish(self, container_id: str) -> None:
        """Thaws the container and puts the archive in its place.

        Unavailable: the checkpoint has been abandoned. FailedPrecondition: image-svc has not saved
        the container's changes, or the archive cannot be written.
        """
        await self._queue.run(container_id, "finish", lambda: self._finish(container_id))

    async def _finish(self, container_id: str) -> None:
        found = self._store.checkpoint(container_id)
        if found is None:
            raise Unavailable(
                f"the checkpoint of container {container_id} took too long, or runtime-svc died meanwhile: it was given up",
                hint="ask again",
            )
        changes = self._places.changes(container_id)
        if not changes.is_file():
            raise FailedPrecondition(
                f"the changes of container {container_id} are not saved at {changes}",
                hint=f"have image-svc save them first: POST /v1/rootfs/{container_id}/changes",
            )
        await self._handlers.of(self._containers.get(container_id)).resume(container_id)
        crashpoint("checkpoint-thawed")
        location = Path(found.location)
        part = checkpoint_files.part(location, container_id)
        try:
            await asyncio.to_thread(checkpoint_files.pack, part, changes, location)
        except OSError as error:
            raise FailedPrecondition(f"location = {str(location)!r}: {error.strerror}", field="location") from error
        crashpoint("checkpoint-packed")
        await self._clear(container_id, location)

    async def abandon(self, container_id: str) -> None:
        """Thaws the container and removes what is not finished; fine if there is nothing."""
        await self._queue.run(container_id, "abandon", lambda: self._abandon(container_id))

    async def _abandon(self, container_id: str) -> None:
        found = self._store.checkpoint(container_id)
        if found is None:
            return
        with contextlib.suppress(NotFound):  # the container was removed meanwhile
            await self._handlers.of(self._containers.get(container_id)).resume(container_id)
        await self._clear(container_id, Path(found.location))

    async def _clear(self, container_id: str, location: Path) -> None:
        await asyncio.to_thread(trees.remove_quietly, checkpoint_files.part(location, container_id))
        self._store.end_checkpoint(container_id)
        self._unlock(container_id)

    def _unlock(self, container_id: str) -> None:
        lock = self._locks.pop(container_id, None)
        if lock is not None:
            lock.close()

    async def sweep(self) -> None:
        """Abandons checkpoints that are overdue, and those that a dead process began."""
        for container_id in self._locks.keys() - self._store.checkpoints().keys():  # another replica has finished it
            self._unlock(container_id)

        async def sweep_one(container_id: str) -> None:
            await self._queue.run(container_id, "sweep", partial(self._abandon_if_dead, container_id))

        await for_each("sweep", self._store.checkpoints(), sweep_one)

    async def _abandon_if_dead(self, container_id: str) -> None:
        found = self._store.checkpoint(container_id)
        if found is None:
            return
        if found.due < time.time() or not _is_locked(checkpoint_files.part(Path(found.location), container_id)):
            await self._abandon(container_id)
            _log.warning("checkpoint-abandoned", container=container_id, location=found.location)

    # Pods

    async def save_pod(self, pod_id: str, request: PodCheckpointRequest) -> PodCheckpoint:
        """Writes pod.json into a folder that has, or will have, the archives of these containers.

        NotFound: no such pod or container. InvalidArgument: the folder cannot be written to.
        """
        pod = self._pods.get(pod_id)
        containers = [self._containers.get(container_id) for container_id in request.container_ids]
        saved = PodCheckpoint(
            pod=PodRequest(config=pod.config, handler=pod.handler),
            containers={container.config.metadata.name: container.config for container in containers},
        )
        _check_names(saved)
        path = self._resolve(request.folder, "output_path") / checkpoint.POD
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            files.write_atomically(path, saved.model_dump_json(exclude_defaults=True))
        except OSError as error:
            raise InvalidArgument(f"output_path = {request.folder!r}: {error.strerror}", field="output_path") from error
        return saved

    def read_pod(self, folder: str) -> PodCheckpoint:
        """Reads pod.json. Raises InvalidArgument for a folder without one."""
        path = self._resolve(folder, "checkpoint_path") / checkpoint.POD
        try:
            saved = PodCheckpoint.model_validate_json(files.read_regular(path, limit=_MAX_POD_BYTES, follow=False))
        except (OSError, ValueError) as error:
            # The error of a parser would show the file's content.
            fault = error.strerror if isinstance(error, OSError) else f"{checkpoint.POD} is not crisp's"
            raise InvalidArgument(
                f"checkpoint_path = {folder!r}: no checkpoint of a pod: {fault}", field="checkpoint_path"
            ) from error
        _check_names(saved)
        return saved


def _check_names(saved: PodCheckpoint) -> None:
    """Raises InvalidArgument for a container whose name cannot be that of its archive."""
    for name in saved.containers:
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise InvalidArgument(
                f"container {name[:200]!r} can't be in a pod's checkpoint: its archive there would have this name",
                field="container_ids",
            )


def _is_locked(folder: Path) -> bool:
    try:
        with files.locked(folder, wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:  # the folder is gone
        return False

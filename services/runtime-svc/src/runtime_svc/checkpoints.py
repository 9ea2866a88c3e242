"""Checkpoints by CRIU through the OCI runtime: begun and finished here; in between image-svc adds what the container has changed.

    LOCATION                         the archive (crisp_proto.checkpoint), renamed into place when it is whole
    LOCATION.part-ID/                what will be in it
    <state>/checkpoints/<container>  CRIU's images of a container that is to be restored

From its begin to its finish a container is frozen, so that memory and files fit together. Its row says until when at the most,
and a lock on the folder tells that the one who froze it lives; else the sweep thaws it and gives the checkpoint up.
"""

import asyncio
import fcntl
import os
import shutil
import time
from functools import partial
from pathlib import Path

from crisp_proto import checkpoint
from crisp_proto.checkpoint import Checkpoint, CheckpointRequest, PodCheckpoint, PodCheckpointRequest
from crisp_proto.runtime import PodRequest
from runtime_svc import checkpoint_files
from runtime_svc.containers import Containers
from runtime_svc.handlers import Handlers
from runtime_svc.pods import Pods
from runtime_svc.store import Store
from servicekit import logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from servicekit.tasks import KeyedQueue, for_each

_PATIENCE_SECONDS = 60
"""How much longer than the dump itself a container may stay frozen."""
_log = logs.get()


class Checkpoints:
    """All checkpoints that are being taken."""

    def __init__(self, store: Store, pods: Pods, containers: Containers, handlers: Handlers, timeout: float) -> None:
        self._store = store
        self._pods = pods
        self._containers = containers
        self._handlers = handlers
        self._timeout = timeout
        self._locks: dict[str, int] = {}
        self._queue = KeyedQueue()

    async def begin(self, container_id: str, request: CheckpointRequest) -> Checkpoint:
        """Freezes a running container and dumps it. `finish` or `abandon` thaw it.

        NotFound: no such container. InvalidArgument names the location. Unimplemented: CRIU does not work here. Unknown: it failed.
        """
        return await self._queue.run(container_id, f"begin {request}", lambda: self._begin(container_id, request))

    async def _begin(self, container_id: str, request: CheckpointRequest) -> Checkpoint:
        container = self._containers.get(container_id)
        runtime = self._handlers.of(container)
        (await self._handlers.features(runtime)).demand_checkpoint()
        location, timeout = Path(request.location), request.timeout or self._timeout
        if not location.is_absolute() or not location.parent.is_dir() or location.is_dir():
            raise InvalidArgument(
                f"location = {request.location!r}: is no absolute path of a file in a folder that exists",
                field="location",
            )
        await self._give_up_if_dead(container_id)
        if not self._store.begin_checkpoint(container_id, str(location), time.time() + timeout + _PATIENCE_SECONDS):
            raise FailedPrecondition(f"container {container_id} is being checkpointed already", field="container_id")
        part = checkpoint_files.part(location, container_id)
        crashpoint("checkpoint-recorded")
        try:
            part.mkdir(mode=0o700)
            self._locks[container_id] = _lock(part)
            await runtime.pause(container_id)
            crashpoint("checkpoint-frozen")
            (part / checkpoint.IMAGES).mkdir()
            await runtime.checkpoint(container_id, part / checkpoint.IMAGES, part, timeout)
            crashpoint("checkpoint-dumped")
            shutil.copy(f"{container.launch.bundle}/config.json", part / checkpoint.SPEC)
            (part / checkpoint.CONFIG).write_text(checkpoint_files.describe(container, runtime).model_dump_json())
        except BaseException as error:
            await self._abandon(container_id)
            if isinstance(error, OSError):
                raise FailedPrecondition(
                    f"location = {request.location!r}: {error.strerror}", field="location"
                ) from error
            raise
        self._store.prolong_checkpoint(container_id, time.time() + _PATIENCE_SECONDS)
        return Checkpoint(changes=str(part / checkpoint.CHANGES))

    async def finish(self, container_id: str) -> None:
        """Thaws the container and puts the archive in its place. Unavailable: it has been given up."""
        await self._queue.run(container_id, "finish", lambda: self._finish(container_id))

    async def _finish(self, container_id: str) -> None:
        found = self._store.checkpoints().get(container_id)
        if found is None:
            raise Unavailable(
                f"the checkpoint of container {container_id} took too long, or runtime-svc died meanwhile: it was given up; ask again"
            )
        location = Path(found[0])
        await self._handlers.of(self._containers.get(container_id)).resume(container_id)
        crashpoint("checkpoint-thawed")
        try:
            await asyncio.to_thread(checkpoint_files.pack, checkpoint_files.part(location, container_id), location)
        except OSError as error:
            raise FailedPrecondition(f"location = {str(location)!r}: {error.strerror}", field="location") from error
        crashpoint("checkpoint-packed")
        await self._clear(container_id, location)

    async def abandon(self, container_id: str) -> None:
        """Thaws the container and removes what is not finished; fine if there is nothing."""
        await self._queue.run(container_id, "abandon", lambda: self._abandon(container_id))

    async def _abandon(self, container_id: str) -> None:
        found = self._store.checkpoints().get(container_id)
        if found is None:
            return
        try:
            await self._handlers.of(self._containers.get(container_id)).resume(container_id)
        except NotFound:
            pass  # the container was removed meanwhile
        await self._clear(container_id, Path(found[0]))

    async def _clear(self, container_id: str, location: Path) -> None:
        await asyncio.to_thread(shutil.rmtree, checkpoint_files.part(location, container_id), ignore_errors=True)
        self._store.end_checkpoint(container_id)
        self._unlock(container_id)

    def _unlock(self, container_id: str) -> None:
        lock = self._locks.pop(container_id, None)
        if lock is not None:
            os.close(lock)

    async def sweep(self) -> None:
        """Gives up what is overdue, and what a dead process had begun."""
        for container_id in self._locks.keys() - self._store.checkpoints().keys():  # another replica has finished it
            self._unlock(container_id)

        async def look(container_id: str) -> None:
            await self._queue.run(container_id, "sweep", partial(self._give_up_if_dead, container_id))

        await for_each("sweep", self._store.checkpoints(), look)

    async def _give_up_if_dead(self, container_id: str) -> None:
        location, due = self._store.checkpoints().get(container_id, ("", 0.0))
        if location and (due < time.time() or not _is_locked(checkpoint_files.part(Path(location), container_id))):
            await self._abandon(container_id)
            _log.warning("checkpoint-given-up", container=container_id, location=location)

    # Pods

    async def save_pod(self, pod_id: str, request: PodCheckpointRequest) -> PodCheckpoint:
        """Writes pod.json into a folder that has, or will have, the archives of these containers."""
        pod = self._pods.get(pod_id)
        containers = [self._containers.get(container_id) for container_id in request.container_ids]
        saved = PodCheckpoint(
            pod=PodRequest(config=pod.config, handler=pod.handler),
            containers={container.config.metadata.name: container.config for container in containers},
        )
        path = Path(request.folder, checkpoint.POD)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            beside = path.with_name(f".{path.name}")
            beside.write_text(saved.model_dump_json(exclude_defaults=True))
            beside.rename(path)
        except OSError as error:
            raise InvalidArgument(f"output_path = {request.folder!r}: {error.strerror}", field="output_path") from error
        return saved

    def read_pod(self, folder: str) -> PodCheckpoint:
        """Reads pod.json. Raises InvalidArgument for a folder that has none."""
        try:
            return PodCheckpoint.model_validate_json(Path(folder, checkpoint.POD).read_text())
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"checkpoint_path = {folder!r}: no checkpoint of a pod: {error}", field="checkpoint_path"
            ) from error


def _lock(folder: Path) -> int:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _is_locked(folder: Path) -> bool:
    try:
        os.close(_lock(folder))
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False

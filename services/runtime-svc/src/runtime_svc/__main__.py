"""Starts runtime-svc."""

import gc

gc.disable()  # until the service is ready (servicekit.server): collecting while modules load took a seventh of a start

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from crisp_proto.runtime import RuntimeInfo
from runtime_svc.api import routes
from runtime_svc.cgroups import drivers, versions
from runtime_svc.cgroups.stats import Stats
from runtime_svc.cgroups.warmup import CgroupMoveWarmup
from runtime_svc.checkpoints import Checkpoints
from runtime_svc.containers import Containers
from runtime_svc.pods import Pods
from runtime_svc.runtimes.handlers import Handlers
from runtime_svc.settings import RuntimeSettings
from runtime_svc.spec import apparmor
from runtime_svc.store import Store
from servicekit import logs, server
from servicekit.server import Frontend, Service
from servicekit.settings import Settings
from servicekit.tasks import for_each, repeat_every

_SWEEP_SECONDS = 30
_GRACE_SECONDS = 300
_log = logs.get()


@asynccontextmanager
async def opened(settings: Settings[RuntimeSettings]) -> AsyncIterator[Frontend]:
    """Opens the service with its database, and runs its background tasks."""
    node = settings.node
    store = Store(node.state_dir / "runtime-svc" / "runtime.db")
    cgroups = versions.detect()
    driver = drivers.choose(settings.own.cgroup_driver, cgroups, settings.own.cgroup_parent)
    handlers = Handlers(settings.own, node.run_dir / "runtime-svc")
    warmup = CgroupMoveWarmup()
    pods = Pods(store, settings.own, cgroups, driver, handlers, node.places, warmup)
    containers = Containers(store, pods, settings.own, cgroups, driver, handlers, node, warmup)
    checkpoints = Checkpoints(store, pods, containers, handlers, node, settings.own.checkpoint_timeout)
    pods.write_missing_documents()
    containers.write_missing_documents()

    async def info() -> RuntimeInfo:
        return RuntimeInfo(cgroup_driver=driver.name, cgroup_version=cgroups.version, handlers=await handlers.all())

    async def ready() -> None:
        handlers.get("")

    background = [
        asyncio.create_task(apparmor.load_default_profile()),
        asyncio.create_task(handlers.probe_all()),
        asyncio.create_task(
            repeat_every("sweep", _SWEEP_SECONDS, lambda: _sweep(store, pods, containers, checkpoints))
        ),
    ]
    try:
        yield Frontend(
            [routes(pods, containers, checkpoints, Stats(store, cgroups, driver), info, store.version)], ready
        )
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, handlers.close(), warmup.close(), return_exceptions=True)
        store.close()


async def _sweep(store: Store, pods: Pods, containers: Containers, checkpoints: Checkpoints) -> None:
    """Removes what was begun and never completed.

    Waits until no retry can come for it: kubelet retries for 4 minutes.
    """
    await checkpoints.sweep()
    half_pods, half_containers = store.incomplete(_GRACE_SECONDS)
    await for_each("sweep", half_containers, partial(_remove, "container", containers.remove))
    await for_each("sweep", half_pods, partial(_remove, "pod", pods.remove))


async def _remove(kind: str, remove: Callable[[str], Awaitable[None]], leftover: str) -> None:
    await remove(leftover)
    _log.warning("leftover-removed", kind=kind, id=leftover)


SERVICE = Service("runtime-svc", "runtime", RuntimeSettings, opened)


def main() -> None:
    """Runs the command crisp-runtime-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()

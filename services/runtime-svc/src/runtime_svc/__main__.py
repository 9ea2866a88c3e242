"""Starts runtime-svc."""

import gc

gc.disable()  # until the service is ready (servicekit.server): looking through what is being loaded was a seventh of a start

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from crisp_proto.runtime import RuntimeInfo
from runtime_svc import cgroups, lsm
from runtime_svc.api import routes
from runtime_svc.cgroup_drivers import CgroupfsDriver, SystemdDriver
from runtime_svc.checkpoints import Checkpoints
from runtime_svc.containers import Containers
from runtime_svc.handlers import Handlers
from runtime_svc.pods import Pods
from runtime_svc.settings import RuntimeSettings
from runtime_svc.stats import Stats
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
    """The service with its database; what a killed predecessor left half-made is removed first."""
    run, state = settings.node.run_dir / "runtime-svc", settings.node.state_dir / "runtime-svc"
    store = Store(state / "runtime.db")
    groups = cgroups.detect()
    driver = (SystemdDriver if settings.own.cgroup_driver == "systemd" else CgroupfsDriver)(
        groups, settings.own.cgroup_parent
    )
    handlers = Handlers(settings.own, run)
    coming_moves = cgroups.CgroupMoveWarmup()
    pods = Pods(store, settings.own, groups, driver, handlers, run, coming_moves)
    containers = Containers(store, pods, settings.own, groups, driver, handlers, run, state, coming_moves)
    checkpoints = Checkpoints(store, pods, containers, handlers, settings.own.checkpoint_timeout)

    async def info() -> RuntimeInfo:
        return RuntimeInfo(cgroup_driver=driver.name, cgroup_version=groups.version, handlers=await handlers.all())

    async def ready() -> None:
        handlers.get("")

    loading = asyncio.create_task(lsm.load_default_profile())
    asking = asyncio.create_task(handlers.ask_all())
    sweeping = asyncio.create_task(
        repeat_every("sweep", _SWEEP_SECONDS, lambda: _sweep(store, pods, containers, checkpoints))
    )
    try:
        yield Frontend(
            [routes(pods, containers, checkpoints, Stats(store, groups, driver), info, store.version)], ready
        )
    finally:
        for task in (sweeping, loading, asking):
            task.cancel()
        await asyncio.gather(sweeping, loading, asking, handlers.close(), coming_moves.close(), return_exceptions=True)
        store.close()


async def _sweep(store: Store, pods: Pods, containers: Containers, checkpoints: Checkpoints) -> None:
    """Removes what was begun and never completed, once no retry of kubelet's (it waits for 4 minutes) can still come for it."""
    await checkpoints.sweep()
    half_pods, half_containers = store.incomplete(_GRACE_SECONDS)
    await for_each("sweep", half_containers, partial(_remove, "container", containers.remove))
    await for_each("sweep", half_pods, partial(_remove, "pod", pods.remove))


async def _remove(kind: str, take_away: Callable[[str], Awaitable[None]], leftover: str) -> None:
    await take_away(leftover)
    _log.warning("leftover-removed", kind=kind, id=leftover)


SERVICE = Service("runtime-svc", "runtime", RuntimeSettings, opened)


def main() -> None:
    """The command crisp-runtime-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()

"""Starts monitor-svc."""

import gc

gc.disable()  # until the service is ready (servicekit.server): looking through what is being loaded was a seventh of a start

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from monitor_svc.api import routes
from monitor_svc.conmon import Conmon
from monitor_svc.monitors import Monitors
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import Store
from servicekit import server
from servicekit.errors import Unavailable
from servicekit.server import Frontend, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[MonitorSettings]) -> AsyncIterator[Frontend]:
    """The service with its database, watching all containers that are alive."""
    run = settings.node.run_dir / "monitor-svc"
    store = Store(settings.node.state_dir / "monitor-svc" / "monitor.db", settings.own.journal_events)
    monitors = Monitors(store, Conmon(settings.own.conmon, run, settings.own.create_timeout), settings.own, run)
    monitors.watch_all()

    async def ready() -> None:
        if not os.access(settings.own.conmon, os.X_OK):
            raise Unavailable(f"{settings.own.conmon} can't be run; install conmon or set monitor.conmon")

    try:
        yield Frontend([routes(monitors, store)], ready, monitors.drain)
    finally:
        await monitors.close()
        store.close()


SERVICE = Service("monitor-svc", "monitor", MonitorSettings, opened)


def main() -> None:
    """The command crisp-monitor-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()

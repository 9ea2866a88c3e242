"""Starts monitor-svc."""

import gc

gc.disable()  # until the service is ready (servicekit.server): collections took a seventh of the start

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from monitor_svc.api import routes
from monitor_svc.conmon import Conmon
from monitor_svc.container_io import ContainerIO
from monitor_svc.log_disks import LogDisks
from monitor_svc.monitors import Monitors
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import Store
from servicekit import server
from servicekit.errors import Unavailable
from servicekit.server import Frontend, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[MonitorSettings]) -> AsyncIterator[Frontend]:
    """Opens the service: its database, and a watch on each container that is alive."""
    run, places = settings.node.run_dir / "monitor-svc", settings.node.places
    store = Store(settings.node.state_dir / "monitor-svc" / "monitor.db", settings.own.journal_events)
    conmon = Conmon(settings.own.conmon, run, settings.own.create_timeout)
    disks = LogDisks(store.journal, settings.own)
    monitors = Monitors(store, conmon, disks, settings.own, places)
    io = ContainerIO(monitors, conmon, disks, settings.own, run)
    io.open()
    monitors.watch_all()

    async def ready() -> None:
        if not os.access(settings.own.conmon, os.X_OK):
            raise Unavailable(f"{settings.own.conmon} can't be run", hint="install conmon or set monitor.conmon")

    try:
        yield Frontend([routes(store, monitors, io)], ready, store.journal.drain)
    finally:
        await monitors.close()
        await io.close()
        store.close()


SERVICE = Service("monitor-svc", "monitor", MonitorSettings, opened)


def main() -> None:
    """Runs the command crisp-monitor-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()

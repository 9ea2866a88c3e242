"""The firewall: our nftables table, rendered from the attachments and restored when it is lost."""

import asyncio
import contextlib

from net_svc import cni, nftables
from net_svc.networks import Networks
from net_svc.nftables import HostPort, Masquerade
from net_svc.plugins.choice import Plugins
from net_svc.plugins.interface import Plugin
from net_svc.store import Store
from servicekit import logs
from servicekit.errors import CrispError, FailedPrecondition
from servicekit.tasks import repeat_every

_log = logs.get()
_CHECK_SECONDS = 30


class Firewall:
    """Keeps the table equal to what the attachments and the present network require."""

    def __init__(self, table: str, store: Store, networks: Networks, plugins: Plugins) -> None:
        self._table = table
        self._store = store
        self._networks = networks
        self._plugins = plugins
        self._applied: str | None = None
        self._lock = asyncio.Lock()

    async def refresh(self) -> None:
        """Applies the wanted table unless it was the last one applied. Raises Internal."""
        async with self._lock:
            script = self.render()
            if script != self._applied:
                await nftables.apply(script)
                self._applied = script

    async def guard(self) -> None:
        """Checks every half minute that nobody has flushed the table, and restores it."""
        await repeat_every("firewall", _CHECK_SECONDS, self._check)

    async def _check(self) -> None:
        if self._applied and not await nftables.present(self._table):
            _log.warning("firewall-table-gone", table=self._table, action="written again")
            self._applied = None
            await self.refresh()

    def render(self) -> str:
        """Returns the script that makes the wanted table."""
        masquerades: list[Masquerade] = []
        ports: list[HostPort] = []
        plugins: dict[str, list[Plugin]] = {}
        rows = self._store.all()
        for row in rows:
            if row.network not in plugins:
                plugins[row.network] = self._plugins.of(cni.parse_configuration(row.network, "stored"))
                masquerades += _masquerades(plugins[row.network])
        with contextlib.suppress(CrispError):  # the network's status and the next attach report the fault
            masquerades += _masquerades(self._plugins.of(self._networks.choose()))
        for row in rows:
            if (attachment := row.attachment()) is not None:
                request = row.attachment_request()
                for plugin in plugins[row.network]:
                    ports += plugin.host_ports(request, attachment.ips)
        return nftables.render(self._table, list(dict.fromkeys(masquerades)), ports)


def _masquerades(plugins: list[Plugin]) -> list[Masquerade]:
    """Returns the masqueraded subnets of a network; none for a plugin whose ranges are wrong.

    Such a plugin has no pods, since its ADD fails. It must not keep the rules of other networks
    from being applied.
    """
    masquerades: list[Masquerade] = []
    for plugin in plugins:
        with contextlib.suppress(FailedPrecondition):
            masquerades += plugin.masquerades()
    return masquerades

"""The replicas of a service, found by their sockets in the folder RUNDIR/<service>/."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

# httpx would import these two at the first call, when a service may have dropped the privilege to
# read its own packages.
import anyio._backends._asyncio  # noqa: F401
import httpcore  # noqa: F401

from servicekit.imports import hidden

with hidden("rich"):
    import httpx

_SETTLED = 1_000_000_000  # ns, many ticks of the kernel's clock


@dataclass(slots=True)
class Replica:
    """One replica: its socket, the connections to it, and the number of calls under way."""

    path: str
    transport: httpx.AsyncHTTPTransport
    inode: int
    in_flight: int = 0

    async def exchange(self, request: httpx.Request) -> httpx.Response:
        """Sends a request and reads the whole answer. Raises httpx.TransportError.

        Uses the transport itself: cookies, redirects and proxies of httpx.AsyncClient would cost
        half a millisecond per hop.
        """
        self.in_flight += 1
        try:
            response = await self.transport.handle_async_request(request)
            await response.aread()
            return response
        finally:
            self.in_flight -= 1


@dataclass(slots=True)
class Replicas:
    """All replicas of one service, read again from the folder when it has changed."""

    folder: Path
    known: dict[str, Replica] = field(default_factory=dict)
    """Replicas by the paths of their sockets, as of the last look into the folder."""
    _version: int | None = None
    """Modification time (ns) of the folder when it was last read; None to read it again."""

    def names(self) -> list[str]:
        """Returns the names of the replicas that have a socket now, sorted."""
        return sorted(path.stem for path in self.folder.glob("[!.]*.sock"))

    def least_busy(self) -> Replica | None:
        """Returns the replica with the fewest calls under way; None if there is no replica."""
        try:
            version = os.stat(self.folder).st_mtime_ns
        except FileNotFoundError:
            return None
        if version != self._version:
            self._refresh()
            # Two changes within one tick of the clock leave the same time on the folder, and we may
            # have read it between them. A time that recent is not kept.
            self._version = version if time.time_ns() - version > _SETTLED else None
        return min(self.known.values(), key=lambda replica: replica.in_flight, default=None)

    async def close(self) -> None:
        """Closes all connections."""
        for replica in self.known.values():
            await replica.transport.aclose()
        self.known.clear()
        self._version = None

    def _refresh(self) -> None:
        sockets = {
            entry.path: entry.inode()
            for entry in os.scandir(self.folder)
            if entry.name.endswith(".sock") and not entry.name.startswith(".")
        }
        self.known = {
            path: replica
            if (replica := self.known.get(path)) and replica.inode == inode
            else Replica(path, _transport(path), inode)
            for path, inode in sockets.items()
        }


def _transport(path: str) -> httpx.AsyncHTTPTransport:
    # verify=False: there is no TLS on a unix socket, and loading authorities takes 20 ms and 3 MB.
    return httpx.AsyncHTTPTransport(
        uds=path,
        verify=False,
        limits=httpx.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=3000),
    )

"""The connection that carries SPDY or a WebSocket: TCP or TLS, with an idle timeout."""

import asyncio
import contextlib
import time
from typing import Protocol

from servicekit import logs

_log = logs.get()
_PIECE = 1 << 16
_LINGER_SECONDS = 5


class ByteStream(Protocol):
    """Bytes in both directions."""

    async def read(self) -> bytes:
        """Returns received bytes; empty at the end, and after the idle timeout."""

    async def write(self, data: bytes) -> None:
        """Sends, and waits while the peer is slow. Raises OSError if the peer is gone."""

    async def close(self) -> None:
        """Ends the connection so that the peer gets all that was written."""


class Tcp:
    """A connection that asyncio accepted.

    `idle` seconds without a byte in either direction end it; None sets no limit.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle: float | None) -> None:
        self._reader = reader
        self._writer = writer
        self._idle = idle
        self._moved = time.monotonic()

    async def read(self) -> bytes:
        """Returns received bytes; empty at the end, and after the idle timeout."""
        while True:
            try:
                async with asyncio.timeout(self._idle_left()):
                    received = await self._reader.read(_PIECE)
            except TimeoutError:
                if (self._idle_left() or 0) > 0:
                    continue  # something was written meanwhile
                _log.info("stream-idle", seconds=self._idle)
                return b""
            except OSError:
                return b""
            self._moved = time.monotonic()
            return received

    def _idle_left(self) -> float | None:
        """Returns the seconds until the idle timeout; None without a limit."""
        return None if self._idle is None else self._moved + self._idle - time.monotonic()

    async def write(self, data: bytes) -> None:
        """Sends, and waits while the peer is slow. Raises OSError if the peer is gone."""
        self._writer.write(data)
        await self._writer.drain()
        self._moved = time.monotonic()

    async def close(self) -> None:
        """Ends our side, reads for a moment what still comes, and closes the connection.

        Without the reading, the kernel would reset the connection, and the peer would lose what it
        has not read yet.
        """
        with contextlib.suppress(OSError, TimeoutError):
            if self._writer.can_write_eof():
                self._writer.write_eof()
            async with asyncio.timeout(_LINGER_SECONDS):
                while await self._reader.read(_PIECE):
                    pass
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                await self._writer.wait_closed()

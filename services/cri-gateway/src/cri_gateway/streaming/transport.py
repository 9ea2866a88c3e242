"""What SPDY and WebSockets are carried by: a TCP or TLS connection that is closed when nothing has moved on it for too long."""

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
        """What came; empty at the end, and once the connection was idle for too long."""

    async def write(self, data: bytes) -> None:
        """Sends, and waits while the peer is slow. Raises OSError if it is gone."""

    async def close(self) -> None:
        """Ends the connection so that the peer gets all that was written."""


class Tcp:
    """A connection that asyncio accepted. `idle` in seconds without a byte either way ends it; 0 never does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle: float) -> None:
        self._reader = reader
        self._writer = writer
        self._idle = idle
        self._moved = time.monotonic()

    async def read(self) -> bytes:
        """What came; empty at the end."""
        while True:
            left = self._moved + self._idle - time.monotonic() if self._idle else None
            try:
                async with asyncio.timeout(left):
                    received = await self._reader.read(_PIECE)
            except TimeoutError:
                if time.monotonic() < self._moved + self._idle:
                    continue  # something was written meanwhile
                _log.info("stream-idle", seconds=self._idle)
                return b""
            except OSError:
                return b""
            self._moved = time.monotonic()
            return received

    async def write(self, data: bytes) -> None:
        """Sends, and waits while the peer is slow. Raises OSError if it is gone."""
        self._writer.write(data)
        await self._writer.drain()
        self._moved = time.monotonic()

    async def close(self) -> None:
        """Ends our side, takes what still comes for a moment (else the kernel would reset what the peer has not read yet), closes."""
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

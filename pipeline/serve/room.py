"""A bound of what all clients together may have in memory: answers that are being made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Room:
    """Room for ``limit`` units at one time. Who finds none waits, first come, first served. What is
    larger than all the room waits until it is alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def hold(self, units: int) -> AsyncIterator[None]:
        """Waits until there is room for ``units``, and holds it while the block runs."""
        async with self._turn:  # others queue behind the first that waits
            while self._used and self._used + units > self._limit:
                self._freed.clear()
                await self._freed.wait()
            self._used += units
        try:
            yield
        finally:
            self._used -= units
            self._freed.set()

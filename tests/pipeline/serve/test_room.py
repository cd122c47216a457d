"""Room for answers: bounded, in turn, given back whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from logitcask.pipeline.serve.room import Room


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """In a thread: this one may have a loop already, as a browser's driver starts one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def test_never_more_than_the_limit_and_in_turn(rng: np.random.Generator) -> None:
    sizes = rng.integers(1, 8, 200).tolist()
    order: list[int] = []
    most = 0

    async def one(room: Room, number: int) -> None:
        nonlocal most
        async with room.hold(sizes[number]):
            order.append(number)
            most = max(most, room._used)
            for _ in range(number % 5):
                await asyncio.sleep(0)

    async def all_of_them() -> None:
        room = Room(10)
        await asyncio.gather(*(one(room, number) for number in range(len(sizes))))
        assert room._used == 0

    run(all_of_them())
    assert order == list(range(len(sizes)))
    assert 8 <= most <= 10


def test_what_is_larger_than_the_room_waits_until_it_is_alone() -> None:
    async def work() -> list[str]:
        room, seen = Room(10), []

        async def one(name: str, size: int) -> None:
            async with room.hold(size):
                seen.append(f"{name} in")
                await asyncio.sleep(0)
                seen.append(f"{name} out")

        await asyncio.gather(one("small", 3), one("huge", 50), one("other", 3))
        return seen

    assert run(work()) == [
        *("small in", "small out", "huge in", "huge out", "other in", "other out")
    ]


@pytest.mark.parametrize("waiting", [False, True], ids=["inside", "waiting"])
def test_a_client_that_goes_away_gives_its_room_back(waiting: bool) -> None:
    async def work() -> Any:
        room, gate = Room(10), asyncio.Event()

        async def one(size: int) -> None:
            async with room.hold(size):
                await gate.wait()

        first = asyncio.create_task(one(8))
        await asyncio.sleep(0)
        second = asyncio.create_task(one(8))
        third = asyncio.create_task(one(2))
        await asyncio.sleep(0)
        (second if waiting else first).cancel()
        gate.set()
        await asyncio.gather(first, second, third, return_exceptions=True)
        async with asyncio.timeout(60), room.hold(10):
            return room._used

    assert run(work()) == 10

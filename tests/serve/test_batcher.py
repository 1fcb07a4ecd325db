"""The batcher: a query whose client has left; test_api.py has the others."""

from __future__ import annotations

import asyncio
import threading

from anyio import CapacityLimiter

from cloob.serve.batcher import Batcher


def test_who_has_left_is_not_worked_on() -> None:
    started, go_on, seen = threading.Event(), threading.Event(), []

    def work(batch: list[int]) -> list[int]:
        seen.extend(batch)
        started.set()
        assert go_on.wait(20)
        return batch

    async def ask() -> None:
        batcher = Batcher(work, CapacityLimiter(1))
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(started.wait, 20)
        waiting = [asyncio.create_task(batcher(query)) for query in (1, 2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        go_on.set()
        assert await first == 0 and await waiting[1] == 2

    asyncio.run(ask())
    assert seen == [0, 2]

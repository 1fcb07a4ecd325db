"""The batcher: a full queue, and a query whose client has left; test_api.py has the good ones."""

from __future__ import annotations

import asyncio
import threading

import pytest
from anyio import CapacityLimiter
from starlette.exceptions import HTTPException

from cloob.serve.batcher import Batcher


def test_a_full_queue_says_so_and_who_has_left_is_not_worked_on() -> None:
    started, go_on, seen = threading.Event(), threading.Event(), []

    def work(batch: list[int]) -> list[int]:
        seen.extend(batch)
        started.set()
        assert go_on.wait(20)
        return batch

    async def ask() -> None:
        batcher = Batcher(work, CapacityLimiter(1), max_batch=1, max_waiting=2)
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(started.wait, 20)
        waiting = [asyncio.create_task(batcher(query)) for query in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(HTTPException, match="503"):
            await batcher(3)
        waiting[0].cancel()
        go_on.set()
        assert await first == 0 and await waiting[1] == 2

    asyncio.run(ask())
    assert seen == [0, 2]

"""Joins queries that arrive together: one forward pass for all of them instead of one for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.exceptions import HTTPException

Query = TypeVar("Query")
Answer = TypeVar("Answer")
_Waiting = tuple[Query, "asyncio.Future[Answer]"]


class Batcher(Generic[Query, Answer]):
    """Hands queries to ``work``, in a thread of the limiter, which gives an answer for each.

    Nobody waits for a batch to fill: what has arrived while the last batch was worked on is the next one. A query
    whose client has left is not worked on.
    """

    def __init__(
        self,
        work: Callable[[list[Query]], Sequence[Answer]],
        limiter: CapacityLimiter,
        *,
        max_batch: int = 64,
        max_waiting: int = 1024,
    ) -> None:
        self._work, self._limiter = work, limiter
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._waiting: deque[_Waiting[Query, Answer]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, query: Query) -> Answer:
        if len(self._waiting) >= self._max_waiting:
            raise HTTPException(503, f"{len(self._waiting)} queries wait", {"retry-after": "1"})
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(0)  # lets those in that arrived in the same turn
                batch: list[_Waiting[Query, Answer]] = []
                while self._waiting and len(batch) < self._max_batch:
                    query, future = self._waiting.popleft()
                    if not future.done():
                        batch.append((query, future))
                if batch:
                    await self._answer(batch)
        finally:
            self._running = None

    async def _answer(self, batch: list[_Waiting[Query, Answer]]) -> None:
        queries = [query for query, _ in batch]
        try:
            answers = await to_thread.run_sync(self._work, queries, abandon_on_cancel=True, limiter=self._limiter)
        except Exception as error:
            for future in (future for _, future in batch if not future.done()):
                future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

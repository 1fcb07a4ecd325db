"""Joins queries that arrive together: one forward pass for all of them instead of one for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from anyio import CapacityLimiter, to_thread

Query = TypeVar("Query")
Answer = TypeVar("Answer")
MAX_BATCH = 64


class Batcher(Generic[Query, Answer]):
    """Hands queries to ``work``, in a thread of the limiter, which gives an answer for each.

    Nobody waits for a batch to fill: what has arrived while the last batch was worked on is the next one. A query
    whose client has left is not worked on.
    """

    def __init__(self, work: Callable[[list[Query]], Sequence[Answer]], limiter: CapacityLimiter) -> None:
        self._work, self._limiter = work, limiter
        self._waiting: deque[tuple[Query, asyncio.Future[Answer]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, query: Query) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # lets those in that arrived in the same turn
            taken = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            batch = [(query, future) for query, future in taken if not future.done()]
            if not batch:
                continue
            queries = [query for query, _ in batch]
            try:
                answers = await to_thread.run_sync(self._work, queries, abandon_on_cancel=True, limiter=self._limiter)
            except Exception as error:
                for future in (future for _, future in batch if not future.done()):
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

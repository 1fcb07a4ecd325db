"""Queries that arrive together go through the model together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from cloob.search.query import Vector
from cloob.search.records import IndexedModel

Medium = Literal["text", "picture"]
Rows = Sequence[Vector]
# Embeds texts or pixels by a model: one unit row (D,) each.
Embed = Callable[[IndexedModel, Medium, list[Any]], Awaitable[Rows]]
_MAX_BATCH = 64


class Batches:
    """Collects queries while the model is at work on others."""

    def __init__(self, embed: Embed) -> None:
        self._embed = embed
        self._turn = asyncio.Lock()
        # The batch that still takes queries, and the rows that it will have.
        self._open: dict[
            tuple[IndexedModel, Medium], tuple[list[Any], asyncio.Task[Rows]]
        ] = {}

    async def row(self, query: Any, model: IndexedModel, medium: Medium) -> Vector:
        """The unit row (D,) of a text or of pixels."""
        queries, rows = self._open.get((model, medium), ([], None))
        if rows is None or len(queries) == _MAX_BATCH:
            queries = []
            rows = asyncio.create_task(self._run(queries, model, medium))
            self._open[model, medium] = queries, rows
        queries.append(query)
        place = len(queries) - 1
        return (await asyncio.shield(rows))[place]

    async def _run(
        self, queries: list[Any], model: IndexedModel, medium: Medium
    ) -> Rows:
        async with self._turn:
            if self._open[model, medium][0] is queries:
                del self._open[model, medium]
            return await self._embed(model, medium, queries)

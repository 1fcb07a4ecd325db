"""An index that many clients query at once: what waits where, and what is cached
between queries.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from cloob.errors import InputError, one_line
from cloob.search.find import query_row
from cloob.search.query import Query, Term
from cloob.search.records import Item, Value
from cloob.search.where import Filter
from cloob.serve.config import ServeConfig
from cloob.serve.schemas import Part, Picture
from cloob.serve.uploads import Upload, Uploads

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
T = TypeVar("T")
Work = Literal["encode", "search", "slow", "files", "decode"]
# Threads of every kind of work. One runs the models, as every one that does has a team
# of torch's threads. Labels take long: they go one after the other, next to the
# searches. 64 megapixels that are decoded are 192 MB.
_THREADS: dict[Work, int] = {
    "encode": 1,
    "search": 2,
    "slow": 1,
    "files": 4,
    "decode": 2,
}
_LARGEST_OF_JAVASCRIPT = 2**53


class ServedIndex:
    """An open index with its encoders, and bounds per kind of work."""

    def __init__(self, index: Index, config: ServeConfig) -> None:
        self.index = index
        self.config = config
        self.uploads = Uploads()
        self._threads = {
            kind: ThreadPoolExecutor(count, kind) for kind, count in _THREADS.items()
        }
        self._slow = asyncio.Lock()

    async def run(self, work: Callable[[], T], kind: Work = "search") -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads[kind], work
        )

    async def at_revision(self, work: Callable[[], T]) -> tuple[int, T]:
        """The revision of the index, and what some work on it comes to."""
        return await self.run(lambda: (self.index.store.revision(), work()))

    async def run_slow(self, work: Callable[[], T], request: Request) -> T:
        """Runs slow work one after the other.

        It is skipped where the client has left when its turn comes.
        """
        await request.body()  # after it comes that the client has left
        async with self._slow:
            if await request.is_disconnected():
                raise HTTPException(499, "nobody waits for this any more")
            return await self.run(work, "slow")

    async def warm(self) -> None:
        """Loads what the first query needs: the model, and the cutoff's texts."""
        try:
            query = await self.query([Part(words="a picture")])
            await self.run(lambda: self.index.search(query, top=1))
        except (InputError, HTTPException) as error:
            logger.warning("%s", one_line(error))

    async def filter(self, where: str | None) -> Filter | None:
        if not where:
            return None
        # Letter by letter, filters would tell others where pictures lie.
        hidden = () if self.config.local else ("path", "source")
        return await self.run(lambda: self.index.filter(where, hidden))

    def picture(self, item: Item) -> Picture:
        """A picture as the API has it.

        Beyond this machine, its path begins below the source.
        """
        name = os.path.basename(item.path)  # noqa: PTH119
        path = item.path
        if not self.config.local:
            path = name
            if item.path.startswith(item.source):
                path = item.path.removeprefix(item.source).lstrip("/\\:")
        return {
            "id": item.id,
            "name": name,
            "path": path,
            "caption": item.caption,
            "date": item.date,
            "width": item.width,
            "height": item.height,
            "bytes": item.bytes,
            "columns": {key: _for_json(value) for key, value in item.columns.items()},
        }

    async def item(self, id_: int) -> Item:
        found = await self.run(lambda: self.index.items([id_]))
        if not found:
            raise HTTPException(404, f"no picture {id_}")
        return found[0]

    async def query(self, parts: Sequence[Part]) -> Query:
        """A query as the index takes it, its parts embedded in the thread of the model;
        those of weight 0 are left out.
        """
        terms = [await self._term(part) for part in parts if part.weight]
        query = Query(tuple(terms))
        if query.needs_model:  # the search finds the rows in the memory of the index
            await self.run(lambda: query_row(self.index, query), "encode")
        return query

    async def _term(self, part: Part) -> Term:
        """A part of a query of the HTTP interface as a term: words, a picture of the
        index, or an upload.
        """
        if part.words is not None:
            (words,) = Query.of(part.words).terms  # refuses an empty one
            return replace(words, weight=part.weight)
        if part.item is not None:
            return Term((await self.item(part.item)).id, part.weight)
        upload = self.uploads.get(part.upload or "")
        return Term(upload.data, part.weight)

    async def add_upload(self, file: BinaryIO) -> Upload:
        """Keeps a picture, or raises Unreadable.

        A model embeds it when a query needs that.
        """
        max_pixels = self.config.max_upload_pixels
        # The thread reads the file, so that those that wait are not in memory.
        upload = await self.run(lambda: Upload.of(file.read(), max_pixels), "decode")
        return self.uploads.add(upload)


def _for_json(value: Value) -> Value:
    """An integer beyond 2^53 as text: JavaScript would round it."""
    if isinstance(value, int) and abs(value) > _LARGEST_OF_JAVASCRIPT:
        return str(value)
    return value

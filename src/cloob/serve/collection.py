"""An index that many clients query at once: what waits where, and what is cached
between queries.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeVar

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cloob.data.shards.spec import TAR_SUFFIXES
from cloob.data.sources.arrow import ARROW_SUFFIXES
from cloob.errors import InputError, one_line
from cloob.pictures import decode
from cloob.search.query import Embedder, Query, Term, Vector, weighted_row
from cloob.search.records import SEPARATOR, IndexedModel, Item, Value
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
_KEPT_TEXTS = 4096
_CONTAINERS = (*TAR_SUFFIXES, *ARROW_SUFFIXES)
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
        # Called in the one thread that encodes: equal texts go through the model once.
        self._text_row = lru_cache(_KEPT_TEXTS)(self._embed_text)
        self._loaded: set[str] = set()  # fingerprints of models
        self._slow = asyncio.Lock()

    async def run(self, work: Callable[[], T], kind: Work = "search") -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads[kind], work
        )

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
            model = await self.model(None)
            query, row = await self.query([Part(words="a picture")], model)
            await self.run(
                lambda: self.index.search(query, row=row, top=1, model=model)
            )
        except (InputError, HTTPException) as error:
            logger.warning("%s", one_line(error))

    async def model(self, name: str | None) -> IndexedModel:
        return await self.run(lambda: self.index.model(name))

    def is_ready(self, model: IndexedModel) -> bool:
        """Whether a query by this model waits for no loading."""
        return model.fingerprint in self._loaded

    async def load(self, model: IndexedModel) -> None:
        await self.run(lambda: self._embedder(model), "encode")

    def _embedder(self, model: IndexedModel) -> Embedder:
        embedder = self.index.embedder(model)
        self._loaded.add(model.fingerprint)
        return embedder

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
        name = _name(item)
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
            "date_from": item.date_from,
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

    async def query(
        self, parts: Sequence[Part], model: IndexedModel
    ) -> tuple[Query, Vector]:
        """A query as the index takes it, and its unit row (D,).

        Parts of weight 0 are left out.
        """
        weighty = [part for part in parts if part.weight != 0]
        rows = await asyncio.gather(*(self.row(part, model) for part in weighty))
        terms = tuple(_term(part) for part in weighty)
        weights = [part.weight for part in weighty]
        return Query(terms), weighted_row(weights, rows)

    async def row(self, part: Part, model: IndexedModel) -> Vector:
        """The unit row (D,) of a part."""
        words = part.words
        if words is not None:
            Query.of(words)  # refuses an empty one
            return await self.run(lambda: self._text_row(words, model), "encode")
        if part.item is not None:
            return await self._item_row(part.item, model)
        upload = self.uploads.get(part.upload or "")
        return await self.run(lambda: self._upload_row(upload, model), "encode")

    def _embed_text(self, words: str, model: IndexedModel) -> Vector:
        return np.asarray(self._embedder(model).texts([words])[0], np.float32)

    def _upload_row(self, upload: Upload, model: IndexedModel) -> Vector:
        if model.fingerprint not in upload.rows:
            rows = self._embedder(model).pictures([decode(upload.data)])
            upload.rows[model.fingerprint] = np.asarray(rows[0], np.float32)
        return upload.rows[model.fingerprint]

    async def _item_row(self, id_: int, model: IndexedModel) -> Vector:
        vectors = await self.run(lambda: self.index.store.vectors(model.name, [id_]))
        # Its name may stand for another model by now.
        if vectors.shape != (1, model.dim) or not np.isfinite(vectors).all():
            raise HTTPException(404, f"no picture {id_} with a vector of {model.name}")
        return np.asarray(vectors[0], dtype=np.float32)

    async def add_upload(self, file: BinaryIO) -> Upload:
        """Keeps a picture, or raises Unreadable.

        A model embeds it when a query needs that.
        """
        most = self.config.max_upload_pixels
        # The thread reads the file, so that those that wait are not in memory.
        upload = await self.run(lambda: Upload.of(file.read(), most), "decode")
        return self.uploads.add(upload)


def _name(item: Item) -> str:
    """The name of a picture's file, or of the member of a container."""
    container, _, member = item.path.partition(SEPARATOR)
    if member and container.lower().endswith(_CONTAINERS):
        return os.path.basename(member)  # noqa: PTH119
    return os.path.basename(item.path)  # noqa: PTH119


def _for_json(value: Value) -> Value:
    """An integer beyond 2^53 as text: JavaScript would round it."""
    if isinstance(value, int) and abs(value) > _LARGEST_OF_JAVASCRIPT:
        return str(value)
    return value


def _term(part: Part) -> Term:
    if part.words is not None:
        return Term(part.words, "words", part.weight)
    if part.item is not None:
        return Term(part.item, "item", part.weight)
    return Term(0, "image", part.weight)  # an upload, of which the row is known

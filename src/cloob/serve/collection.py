"""An index that many clients query at once: what waits where, and what is cached between queries."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cloob.data.shards.spec import TAR_SUFFIXES
from cloob.data.sources.arrow import ARROW_SUFFIXES
from cloob.errors import InputError, one_line
from cloob.models.encoder import evaluating
from cloob.pictures import Encoded, Unreadable, decode, is_unbounded, thumbnail
from cloob.search.query import Query, Term, Vector, weighted_row
from cloob.search.records import SEPARATOR, IndexedModel, Item
from cloob.search.where import Filter
from cloob.serve.guard import ServeConfig
from cloob.serve.schemas import Part, Picture

if TYPE_CHECKING:
    from cloob.search.index import Index

MAX_UPLOADS, MAX_UPLOADS_BYTES = 256, 256_000_000  # that are kept; those used longest ago go first
logger = logging.getLogger(__name__)
T = TypeVar("T")
# Threads of every kind of work: one runs the models, as each one that does has a team of torch's threads; what takes
# long (duplicates, labels) goes one after the other, next to the searches; 64 megapixels that are decoded are 192 MB.
_THREADS = {"encode": 1, "search": 2, "slow": 1, "files": 4, "decode": 2}
Kind = Literal["encode", "search", "slow", "files", "decode"]
_MAX_BATCH, _KEPT_TEXTS = 64, 4096
_PLACE = re.compile(r"(?<![\w.~])(?:~?/|[A-Za-z]:\\|\w+://)[^\s;,)]+")  # on this machine, in a message


@dataclass(frozen=True)
class Upload:
    """A picture that somebody brought, kept in memory for a while."""

    id: str  # the first half of its bytes' SHA-256: who knows it had the picture
    data: bytes  # of the file
    width: int  # upright, pixels
    height: int
    thumbnail: bytes  # JPEG
    rows: dict[str, Vector] = field(default_factory=dict)  # unit rows (D,) by the fingerprint of the model


class Batcher:
    """Joins queries that arrive together: ``work`` gives an answer for each of a batch.

    Nobody waits for a batch to fill: what arrives before its turn comes is part of it.
    """

    def __init__(self, work: Callable[[list[Any]], Awaitable[Sequence[Vector]]], turn: asyncio.Lock) -> None:
        self._work, self._turn = work, turn
        self._queries: list[Any] = []  # of the batch that waits for its turn
        self._batch: asyncio.Task[Sequence[Vector]] | None = None

    async def __call__(self, query: Any) -> Vector:
        if self._batch is None or len(self._queries) == _MAX_BATCH:
            self._queries = []
            self._batch = asyncio.create_task(self._run(self._queries))
        batch, place = self._batch, len(self._queries)
        self._queries.append(query)
        return (await asyncio.shield(batch))[place]

    async def _run(self, queries: list[Any]) -> Sequence[Vector]:
        async with self._turn:
            if queries is self._queries:
                self._batch = None
            return await self._work(queries)


class Collection:
    """An open index with its encoders, and bounds per kind of work."""

    def __init__(self, index: Index, config: ServeConfig) -> None:
        self.index, self.config = index, config
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._threads = {kind: ThreadPoolExecutor(count, kind) for kind, count in _THREADS.items()}
        self._texts: OrderedDict[tuple[str, str], Vector] = OrderedDict()
        self._batchers: dict[tuple[IndexedModel, str], Batcher] = {}
        self._turn, self._slow = asyncio.Lock(), asyncio.Lock()  # to embed a batch; to do what takes long

    async def run(self, work: Callable[[], T], kind: Kind = "search") -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads[kind], work)

    async def run_slow(self, work: Callable[[], T], request: Request) -> T:
        """Runs slow work one after the other; skips it where the client has left when its turn comes."""
        await request.body()  # after it comes that the client has left
        async with self._slow:
            if await request.is_disconnected():
                raise HTTPException(499, "nobody waits for this any more")
            return await self.run(work, "slow")

    async def without_places(self, text: str) -> str:
        """A message without the places on this machine that it names."""

        def places() -> set[str]:
            store = self.index.store
            return {store.address, *store.sources(), *(model.spec for model in store.models() if "/" in model.spec)}

        for place in sorted(await self.run(places), key=len, reverse=True):
            text = text.replace(place, "…")
        return _PLACE.sub("…", text)

    async def warm(self) -> None:
        """Loads the first model and what the cutoff compares with, so that the first query does not wait for it."""
        try:
            model = await self.model(None)
            query, row = await self.query([Part(words="a picture")], model)
            await self.run(lambda: self.index.search(query, row=row, top=1, model=model))
        except (InputError, HTTPException) as error:
            logger.warning("%s", one_line(error))

    async def model(self, name: str | None) -> IndexedModel:
        return await self.run(lambda: self.index.model(name))

    async def filter(self, where: str | None) -> Filter | None:
        hidden = () if self.config.local else ("path", "source")  # letter by letter they would tell where pictures lie
        return await self.run(lambda: self.index.filter(where, hidden)) if where else None

    def picture(self, item: Item) -> Picture:
        """A picture as the API has it; beyond this machine, its path begins below the source."""
        container, _, member = item.path.partition(SEPARATOR)
        inside = member and container.lower().endswith((*TAR_SUFFIXES, *ARROW_SUFFIXES))
        name = os.path.basename(member if inside else item.path)  # noqa: PTH119
        below = item.path.removeprefix(item.source).lstrip("/\\:") if item.path.startswith(item.source) else name
        large = {
            key: str(value) for key, value in item.columns.items() if isinstance(value, int) and abs(value) > 2**53
        }
        return {
            "id": item.id,
            "name": name,
            "path": item.path if self.config.local else below,
            "caption": item.caption,
            "date": item.date,
            "date_from": item.date_from,
            "width": item.width,
            "height": item.height,
            "bytes": item.bytes,
            "columns": {**item.columns, **large},
        }

    async def item(self, id_: int) -> Item:
        result = await self.run(lambda: self.index.items([id_]))
        if not result:
            raise HTTPException(404, f"no picture {id_}")
        return result[0]

    async def query(self, parts: Sequence[Part], model: IndexedModel) -> tuple[Query, Vector]:
        """A query as the index takes it, parts of weight 0 left out, and its unit row (D,)."""
        weighing = [part for part in parts if part.weight != 0]
        rows = await asyncio.gather(*(self.row(part, model) for part in weighing))
        row = weighted_row([part.weight for part in weighing], rows)
        return Query(tuple(map(_term, weighing))), row

    async def row(self, part: Part, model: IndexedModel) -> Vector:
        if part.words is not None:
            return await self._text(part.words, model)
        if part.item is not None:
            ids = [part.item]
            vectors = await self.run(lambda: self.index.store.vectors(model.name, ids))
            if vectors.shape != (1, model.dim) or not np.isfinite(vectors).all():  # or the model is another by now
                raise HTTPException(404, f"no picture {part.item} with a vector of {model.name}")
            return np.asarray(vectors[0], dtype=np.float32)
        upload = self.upload(part.upload or "")
        if model.fingerprint not in upload.rows:
            pixels = await self.run(lambda: self.index.encoder(model).preprocess(decode(upload.data)), "decode")
            upload.rows[model.fingerprint] = await self._batcher(model, "picture")(pixels)
        return upload.rows[model.fingerprint]

    async def _text(self, words: str, model: IndexedModel) -> Vector:
        Query.of(words)
        key = (model.fingerprint, words)
        if key not in self._texts:
            self._texts[key] = await self._batcher(model, "text")(words)
            while len(self._texts) > _KEPT_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def upload(self, id_: str) -> Upload:
        if id_ not in self._uploads:
            raise HTTPException(404, "the uploaded picture is no longer held; upload it again")
        self._uploads.move_to_end(id_)
        return self._uploads[id_]

    async def add_upload(self, file: BinaryIO) -> Upload:
        """Remembers a picture, or raises Unreadable; a model embeds it when a query asks for that."""

        def checked() -> Upload:
            data = file.read()  # here, so that those that wait are not in memory
            if is_unbounded(data):
                raise Unreadable("no decoder", "RAW and JPEG XL are not taken")
            image = Encoded(data, self.config.max_upload_pixels).rgb()
            id_ = hashlib.sha256(data).hexdigest()[:32]
            return Upload(id_, data, *image.size, thumbnail(image, 256))

        added, kept = await self.run(checked, "decode"), self._uploads
        kept.setdefault(added.id, added)
        kept.move_to_end(added.id)
        while len(kept) > MAX_UPLOADS or sum(len(item.data) for item in kept.values()) > MAX_UPLOADS_BYTES:
            kept.popitem(last=False)
        return kept[added.id]

    def _batcher(self, model: IndexedModel, kind: str) -> Batcher:
        if (model, kind) not in self._batchers:

            def embed(batch: list[Any]) -> Sequence[Vector]:
                encoder = self.index.encoder(model)
                with evaluating(encoder):
                    texts = kind == "text"
                    features = encoder.encode_text(batch) if texts else encoder.encode_image(torch.stack(batch))
                return list(features.detach().float().cpu().numpy())

            self._batchers[model, kind] = Batcher(lambda batch: self.run(partial(embed, batch), "encode"), self._turn)
        return self._batchers[model, kind]


def _term(part: Part) -> Term:
    if part.words is not None:
        return Term(part.words, "words", part.weight)
    return Term(part.item or 0, "image" if part.item is None else "item", part.weight)  # an upload's row is known

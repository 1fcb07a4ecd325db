"""An index that many ask at once: what waits where, and what is kept between queries."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
from anyio import CapacityLimiter, to_thread
from starlette.exceptions import HTTPException

from cloob.errors import InputError, nearest, one_line
from cloob.models.encoder import evaluating
from cloob.pictures import MAX_PIXELS, Encoded, Unreadable, decode, is_unbounded, thumbnail
from cloob.search.query import Query, Term, Vector, weighted_row
from cloob.search.records import IndexedModel, Item
from cloob.search.where import Filter, parse
from cloob.serve.guard import ServeConfig
from cloob.serve.schemas import Part, Picture, picture

if TYPE_CHECKING:
    from cloob.search.index import Index

MAX_UPLOADS, MAX_UPLOADS_BYTES = 256, 256_000_000
"""Uploads that are kept, and their bytes together; those used longest ago go first."""

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Threads of each kind of work: queries are joined into one batch at a time; what takes long (maps, labels) runs one
# after the other beside the searches; two uploads are decoded at a time, as 64 megapixels are 192 MB.
_THREADS = {"encode": 1, "search": 2, "slow": 1, "files": 4, "decode": 2}
_MAX_BATCH, _KEPT_TEXTS, _KEPT = 64, 4096, 8


@dataclass(frozen=True)
class Upload:
    """A picture that somebody brought, kept in memory for a while."""

    id: str  # the first half of its bytes' SHA-256: who knows it had the picture
    data: bytes  # of the file
    width: int  # upright, pixels
    height: int
    thumbnail: bytes  # JPEG
    rows: dict[str, Vector] = field(default_factory=dict)  # a unit row (D,) for each model asked, by its fingerprint


@contextmanager
def told() -> Iterator[None]:
    """Makes errors of what the asker wrote ones that the asker is told; of others nobody is."""
    try:
        yield
    except InputError as error:
        raise HTTPException(400, one_line(error)) from None


class Batcher:
    """Joins queries that arrive together: ``work``, in a thread of the limiter, gives an answer for each of a batch.

    Nobody waits for a batch to fill: what has arrived while the last batch was worked on is the next one.
    """

    def __init__(self, work: Callable[[list[Any]], Sequence[Vector]], limiter: CapacityLimiter) -> None:
        self._work, self._limiter = work, limiter
        self._waiting: deque[tuple[Any, asyncio.Future[Vector]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, query: Any) -> Vector:
        future: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # lets those in that arrived in the same turn
            batch = [self._waiting.popleft() for _ in range(min(_MAX_BATCH, len(self._waiting)))]
            queries = [query for query, _ in batch]
            try:
                answers = await to_thread.run_sync(self._work, queries, abandon_on_cancel=True, limiter=self._limiter)
            except Exception as error:
                for _, future in batch:
                    if not future.cancelled():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.cancelled():
                    future.set_result(answer)


class Collection:
    """An open index with its encoders, and bounds for each kind of work."""

    def __init__(self, index: Index, config: ServeConfig) -> None:
        self.index, self.config = index, config
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._limiters = {kind: CapacityLimiter(threads) for kind, threads in _THREADS.items()}
        self._texts: OrderedDict[tuple[str, str], Vector] = OrderedDict()
        self._computed: OrderedDict[Hashable, Any] = OrderedDict()
        self._batchers: dict[tuple[IndexedModel, str], Batcher] = {}

    async def run(self, work: Callable[[], T], kind: Literal["search", "slow", "files", "decode"] = "search") -> T:
        """Runs work of a kind in a thread."""
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiters[kind])

    async def warm(self) -> None:
        """Loads the first model and what the cutoff compares with, so that the first query has not to wait for it."""
        try:
            model = await self.model(None)
            query, row = await self.query([Part(words="a picture")], model)
            await self.run(lambda: self.index.search(query, row=row, top=1, model=model))
        except (InputError, HTTPException) as error:
            logger.warning("%s", one_line(error))

    async def model(self, name: str | None) -> IndexedModel:
        """The model that is meant; the first by default."""
        names = [model.name for model in await self.run(lambda: self.index.models)]
        if not names or name not in (None, *names):
            why = f"no model {name!r}; {nearest(name or '', names)}" if names else "the index is empty"
            raise HTTPException(400, why)
        return await self.run(lambda: self.index.model(name))

    async def filter(self, where: str | None, *, some: bool = False) -> Filter | None:
        """A filter as the index takes it; with ``some`` it must let a picture through."""
        if not where:
            return None
        columns = await self.run(self.index.columns)
        with told():
            found = parse(where, columns)
        if some and not await self.run(lambda: self.index.store.count(found)):
            raise HTTPException(400, "the filter lets no picture through")
        return found

    def picture(self, item: Item) -> Picture:
        return picture(item, whole_path=self.config.local)

    async def item(self, id_: int) -> Item:
        found = await self.run(lambda: self.index.items([id_]))
        if not found:
            raise HTTPException(404, f"no picture {id_}")
        return found[0]

    async def once(self, key: Hashable, work: Callable[[], T]) -> tuple[int, T]:
        """What takes long, computed once for each revision of the index, and that revision."""
        revision = await self.run(self.index.revision)
        whole, kept = (revision, key), self._computed

        def compute() -> None:
            if whole not in kept:  # who asked for the same before has computed it
                kept[whole] = work()

        if whole not in kept:
            await self.run(compute, "slow")
        while len(kept) > _KEPT:
            kept.popitem(last=False)
        return revision, kept[whole]

    async def query(self, parts: Sequence[Part], model: IndexedModel) -> tuple[Query, Vector]:
        """A query as the index takes it, parts of weight 0 left out, and its unit row (D,)."""
        weighing = [part for part in parts if part.weight != 0]
        rows = await asyncio.gather(*(self.row(part, model) for part in weighing))
        with told():
            row = weighted_row([part.weight for part in weighing], rows)
        return Query(tuple(map(_term, weighing))), row

    async def row(self, part: Part, model: IndexedModel) -> Vector:
        """The unit row (D,) of one part, whatever its weight."""
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
        with told():
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
            encoded = Encoded(data)
            in_file, decoded = math.prod(encoded.in_file), math.prod(encoded.stored)  # `size` decodes a PNG with EXIF
            if in_file > MAX_PIXELS or decoded > self.config.max_upload_pixels:
                raise Unreadable("image too large", f"{in_file:,} pixels")
            image = encoded.rgb()
            id_ = hashlib.sha256(data).hexdigest()[:32]
            return Upload(id_, data, *image.size, thumbnail(image, 256))

        added, kept = await self.run(checked, "decode"), self._uploads
        kept.setdefault(added.id, added)
        kept.move_to_end(added.id)
        while len(kept) > MAX_UPLOADS or sum(len(each.data) for each in kept.values()) > MAX_UPLOADS_BYTES:
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

            self._batchers[model, kind] = Batcher(embed, self._limiters["encode"])
        return self._batchers[model, kind]


def _term(part: Part) -> Term:
    if part.words is not None:
        return Term(part.words, "words", part.weight)
    return Term(part.item or 0, "image" if part.item is None else "item", part.weight)  # an upload's row is known

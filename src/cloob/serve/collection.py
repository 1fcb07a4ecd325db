"""An index that many ask at once: what waits where, and what is kept between queries."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from anyio import CapacityLimiter, to_thread

from cloob.errors import InputError, nearest, one_line
from cloob.models.encoding import evaluating
from cloob.search.query import Query, Term, weighted_row
from cloob.search.records import IndexedModel
from cloob.search.where import Filter, parse
from cloob.serve.batcher import Batcher, Busy
from cloob.serve.guard import ServeConfig
from cloob.serve.schemas import Part
from cloob.serve.uploads import Row, Upload, Uploads, decode_upload, read_upload, upload_id

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
T = TypeVar("T")
_KEPT_TEXTS = 4096
_KEPT_MAPS = 8
_UPLOADS_WAITING = 32  # each with all its bytes, 20 MB at most


class Refused(InputError):  # noqa: N818 - the asker's fault, who is told of it
    """What was asked cannot be answered as it stands. Any other error is not told."""


class Gone(Refused):
    """An id or an upload that is not there (any more)."""


@contextmanager
def told() -> Iterator[None]:
    """Makes errors of what the asker wrote ones that the asker is told."""
    try:
        yield
    except InputError as error:
        raise Refused(one_line(error)) from None


class Collection:
    """An open index with its encoders, and bounds for each kind of work.

    Queries are joined into batches, one at a time. Two searches run at a time. What takes long (maps, classification)
    runs one after the other beside them, so that no search waits for it. Two uploads are decoded at a time: 64
    megapixels are 192 MB.
    """

    def __init__(self, index: Index, config: ServeConfig) -> None:
        self.index, self.config = index, config
        self.uploads = Uploads()
        self._encoding, self._searching, self._slow, self._files, self._decoding = map(CapacityLimiter, (1, 2, 1, 4, 2))
        self._texts: OrderedDict[tuple[str, str], Row] = OrderedDict()
        self._maps: OrderedDict[Hashable, asyncio.Task[Any]] = OrderedDict()
        self._batchers: dict[tuple[IndexedModel, str], Batcher[Any, Row]] = {}

    async def warm(self) -> None:
        """Loads the first model and what the cutoff compares with, so that the first query has not to wait for it."""
        try:
            model = await self.model(None)
            query, row = await self.query([Part(words="a picture")], model)
            await self.search(lambda: self.index.search(query, row=row, top=1, model=model))
        except InputError as error:
            logger.warning("%s", one_line(error))

    async def search(self, work: Callable[[], T]) -> T:
        """Runs a search, or another quick look into the index."""
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._searching)

    async def slow(self, work: Callable[[], T]) -> T:
        """Runs what takes long, one after the other."""
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._slow)

    async def files(self, work: Callable[[], T]) -> T:
        """Runs what reads and decodes files."""
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._files)

    async def _decode(self, work: Callable[[], T]) -> T:
        if self._decoding.statistics().tasks_waiting >= _UPLOADS_WAITING:
            raise Busy(f"{_UPLOADS_WAITING} uploads wait")
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._decoding)

    async def model(self, name: str | None) -> IndexedModel:
        """The model that is meant; the first by default."""

        def find() -> IndexedModel:
            names = [model.name for model in self.index.models]
            if not names:
                raise Refused("the index is empty; cloob index fills it")
            if name is not None and name not in names:
                raise Refused(f"no model {name!r}; {nearest(name, names)}")
            return self.index.model(name)

        return await self.search(find)

    async def filter(self, where: str | None, *, some: bool = False) -> Filter | None:
        """A filter as the index takes it; with ``some`` it must let a picture through."""

        def read() -> Filter | None:
            if not where:
                return None
            with told():
                found = parse(where, self.index.columns())
            if some and not self.index.store.count(found):
                raise Refused("the filter lets no picture through")
            return found

        return await self.search(read)

    async def map(self, key: Hashable, work: Callable[[], T]) -> tuple[int, T]:
        """A map, computed once for each revision of the index, and that revision."""
        revision = await self.search(self.index.revision)
        whole = (revision, key)
        if whole not in self._maps:
            made = self._maps[whole] = asyncio.create_task(self.slow(work))
            made.add_done_callback(
                lambda done: self._maps.pop(whole, None) if done.cancelled() or done.exception() else None
            )
            while len(self._maps) > _KEPT_MAPS:
                self._maps.popitem(last=False)
        found: T = await asyncio.shield(self._maps[whole])  # who asks for the same meanwhile gets the same
        return revision, found

    async def query(self, parts: Sequence[Part], model: IndexedModel) -> tuple[Query, Row]:
        """A query as the index takes it, parts of weight 0 left out, and its unit row (D,)."""
        weighing = [part for part in parts if part.weight != 0]
        if not weighing:
            raise Refused("all parts of the query have the weight 0; give one of them more")
        rows = await asyncio.gather(*(self.row(part, model) for part in weighing))
        with told():
            row = weighted_row([part.weight for part in weighing], rows)
        return Query(tuple(map(_term, weighing))), row

    async def row(self, part: Part, model: IndexedModel) -> Row:
        """The unit row (D,) of one part, whatever its weight."""
        if part.words is not None:
            return await self._text(part.words, model)
        if part.item is not None:
            item = part.item
            vectors = await self.search(lambda: self.index.store.vectors(model.name, [item]))
            if vectors.shape != (1, model.dim) or not np.isfinite(vectors).all():  # or the model is another by now
                raise Gone(f"no picture {item} with a vector of {model.name}")
            return np.asarray(vectors[0], dtype=np.float32)
        return await self._picture(self.upload(part.upload or ""), model)

    async def _text(self, words: str, model: IndexedModel) -> Row:
        if not words.strip():
            raise Refused("a text without words; give some")
        key = (model.fingerprint, words)
        if key not in self._texts:
            self._texts[key] = await self._batcher(model, "text")(words)
            while len(self._texts) > _KEPT_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    async def _picture(self, upload: Upload, model: IndexedModel) -> Row:
        if model.fingerprint not in upload.rows:
            pixels = await self._decode(
                lambda: self.index.encoder(model).preprocess(decode_upload(upload.data, self.config))
            )
            upload.rows[model.fingerprint] = await self._batcher(model, "picture")(pixels)
        return upload.rows[model.fingerprint]

    def upload(self, id_: str) -> Upload:
        """An upload that is still there."""
        held = self.uploads.get(id_)
        if held is None:
            raise Gone("the uploaded picture is no longer held; upload it again")
        return held

    async def add_upload(self, data: bytes) -> Upload:
        """Checks and remembers a picture; a model embeds it when a query asks for that."""
        held = self.uploads.get(upload_id(data))
        if held is None:
            held = await self._decode(lambda: read_upload(data, self.config))
            self.uploads.add(held)
        return held

    def _batcher(self, model: IndexedModel, kind: str) -> Batcher[Any, Row]:
        if (model, kind) not in self._batchers:
            for old in [key for key in self._batchers if key[0].name == model.name and key[0] != model]:
                del self._batchers[old]

            def embed(batch: list[Any]) -> Sequence[Row]:
                encoder = self.index.encoder(model)
                with evaluating(encoder):
                    texts = kind == "text"
                    features = encoder.encode_text(batch) if texts else encoder.encode_image(torch.stack(batch))
                return list(features.detach().float().cpu().numpy())

            self._batchers[model, kind] = Batcher(embed, self._encoding)
        return self._batchers[model, kind]


def _term(part: Part) -> Term:
    if part.words is not None:
        return Term(part.words, "words", part.weight)
    return Term(part.item or 0, "image" if part.item is None else "item", part.weight)  # an upload's row is known

"""An index that many ask at once: what waits where, and what is kept between queries."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from cloob.errors import InputError, one_line
from cloob.models.encoding import evaluating
from cloob.models.runs import split_checkpoint
from cloob.search.query import Query, Term, weighted_row
from cloob.search.records import IndexedModel
from cloob.serve.batcher import Batcher, Busy
from cloob.serve.settings import ServeConfig
from cloob.serve.uploads import Row, Upload, Uploads, decode_upload, thumbnail, upload_id

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
T = TypeVar("T")
_KEPT_TEXTS = 4096
_KEPT_MAPS = 8
_UPLOADS_WAITING = 32  # each with all its bytes, 20 MB at most


class Gone(InputError):  # noqa: N818 - not the asker's fault
    """An id or an upload that is not there (any more)."""


@dataclass(frozen=True)
class Part:
    """One part of a query; exactly one of words, item and upload is given."""

    words: str | None = None
    item: int | None = None
    upload: str | None = None
    weight: float = 1.0

    @property
    def term(self) -> Term:
        """The part as the index has it; its row is known where an uploaded picture takes part."""
        if self.words is not None:
            return Term(self.words, "words", self.weight)
        return Term(self.item or 0, "item" if self.item is not None else "image", self.weight)


class Collection:
    """An open index with its encoders, and a thread for each kind of work.

    Encoding has one thread, where queries are joined into batches; searches have two; what takes long (maps,
    classification) has one of its own, so that no search waits for it; reading files has four. Uploads have two, for
    two at most are decoded at a time: 64 megapixels are 192 MB.
    """

    def __init__(self, index: Index, config: ServeConfig) -> None:
        self.index = index
        self.config = config
        self.uploads = Uploads(config.max_uploads)
        self.places: dict[str, str] = {}  # of the models seen so far, with their names: no error tells a place
        self._encoding = ThreadPoolExecutor(1, "encode")
        self._searching = ThreadPoolExecutor(2, "search")
        self._slow = ThreadPoolExecutor(1, "slow")
        self._files = ThreadPoolExecutor(4, "files")
        self._decoding = ThreadPoolExecutor(2, "decode")
        self._uploading = 0
        self._texts: OrderedDict[tuple[str, str], Row] = OrderedDict()
        self._mapping = asyncio.Lock()
        self._maps: OrderedDict[Hashable, Any] = OrderedDict()
        self._batchers: dict[tuple[IndexedModel, str], Batcher[Any, Row]] = {}

    def close(self) -> None:
        """Ends the threads; what they were at is finished first, what waits is not begun."""
        for pool in (self._encoding, self._searching, self._slow, self._files, self._decoding):
            pool.shutdown(cancel_futures=True)

    async def warm(self) -> None:
        """Loads the first model and what the cutoff compares with, so that the first query has not to wait for it."""
        try:
            model = await self.model(None)
            query, row = await self.query([Part(words="a picture")], model)
            await self.search(lambda: self.index.search(query, row=row, top=1, model=model))
        except InputError as error:  # whoever asks is told the same
            logger.warning("%s", one_line(error))

    async def model(self, name: str | None) -> IndexedModel:
        """The model that is meant; the first by default.

        Raises:
            InputError: The index has no such model, or none at all.
        """
        models, model = await self.search(lambda: (self.index.models, self.index.model(name)))
        self._remember(models)
        return model

    async def models(self) -> tuple[IndexedModel, ...]:
        """All models of the index."""
        models = await self.search(lambda: self.index.models)
        self._remember(models)
        return models

    def _remember(self, models: Sequence[IndexedModel]) -> None:
        self.places |= {model.spec: model.name for model in models}
        for model in models:  # of RUN:best an error names the run's folder
            place = split_checkpoint(model.spec.removeprefix("local-dir:"))[0].removesuffix(":port")
            self.places.setdefault(place, model.name)

    # Where things are done.

    async def search(self, work: Callable[[], T]) -> T:
        """Runs a search, or another quick look into the index."""
        return await asyncio.get_running_loop().run_in_executor(self._searching, work)

    async def slow(self, work: Callable[[], T]) -> T:
        """Runs what takes long, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, work)

    async def files(self, work: Callable[[], T]) -> T:
        """Runs what reads and decodes files."""
        return await asyncio.get_running_loop().run_in_executor(self._files, work)

    async def map(self, key: Hashable, work: Callable[[], T]) -> tuple[int, T]:
        """A map, computed once for each revision of the index, and that revision."""
        revision = await self.search(self.index.revision)
        whole = (revision, key)
        if whole not in self._maps:
            async with self._mapping:  # who asks for the same meanwhile gets the same
                if whole not in self._maps:
                    self._maps[whole] = await self.slow(work)
                    while len(self._maps) > _KEPT_MAPS:
                        self._maps.popitem(last=False)
        kept: T = self._maps[whole]
        return revision, kept

    # What becomes of words and pictures.

    async def query(self, parts: Sequence[Part], model: IndexedModel) -> tuple[Query, Row]:
        """A query as the index takes it, parts of weight 0 left out, and its unit row (D,).

        Raises:
            As :meth:`row`.
        """
        weighing = [part for part in parts if part.weight != 0]
        row = await self.row(weighing, model)
        return Query(tuple(part.term for part in weighing)), row

    async def row(self, parts: Sequence[Part], model: IndexedModel) -> Row:
        """The unit row (D,) of a query: the weighted sum of its parts' rows.

        Raises:
            Gone: A picture or an upload is not there.
            InputError: The parts cancel each other.
            Busy: Too many queries wait.
        """
        if not parts:
            raise InputError("all parts of the query have the weight 0; give one of them more")
        rows = await asyncio.gather(*(self._part(part, model) for part in parts))
        return weighted_row([part.weight for part in parts], rows)

    async def _part(self, part: Part, model: IndexedModel) -> Row:
        if part.words is not None:
            return await self.text(part.words, model)
        if part.item is not None:
            item = part.item
            vectors = await self.search(lambda: self.index.store.vectors(model.name, [item]))
            if vectors.shape != (1, model.dim) or not np.isfinite(vectors).all():  # or the model is another by now
                raise Gone(f"no picture {item} with a vector of {model.name}")
            return np.asarray(vectors[0], dtype=np.float32)
        held = self.uploads.get(part.upload or "")
        if held is None or model.fingerprint not in held.rows:
            raise Gone("the uploaded picture is no longer held; upload it again")
        return held.rows[model.fingerprint]

    async def text(self, words: str, model: IndexedModel) -> Row:
        """The unit row (D,) of a text, of those used last from memory.

        Raises:
            InputError: It is white space alone.
            Busy: Too many queries wait.
        """
        if not words.strip():
            raise InputError("a text without words; give some")
        key = (model.fingerprint, words)
        if key not in self._texts:
            self._texts[key] = await self._batcher(model, "text")(words)
            while len(self._texts) > _KEPT_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    async def add_upload(self, data: bytes) -> Upload:
        """Checks, embeds and remembers a picture.

        Raises:
            TooLarge, Unsupported: See :func:`cloob.serve.uploads.decode_upload`.
            Busy: Too many wait already.
        """
        if self._uploading >= _UPLOADS_WAITING:
            raise Busy(f"{self._uploading} uploads wait")
        self._uploading += 1
        try:
            return await self._add_upload(data)
        finally:
            self._uploading -= 1

    async def _add_upload(self, data: bytes) -> Upload:
        held = self.uploads.get(upload_id(data))
        models = await self.models()
        if held is None or {model.fingerprint for model in models} - set(held.rows):

            def prepare() -> tuple[tuple[int, int], bytes, list[torch.Tensor]]:
                image = decode_upload(data, self.config)
                pixels = [self.index.encoder(model).preprocess(image) for model in models]
                return image.size, thumbnail(image), pixels

            size, small, pixels = await asyncio.get_running_loop().run_in_executor(self._decoding, prepare)
            rows = {
                model.fingerprint: await self._batcher(model, "picture")(each)
                for model, each in zip(models, pixels, strict=True)
            }
            held = Upload(upload_id(data), *size, small, rows)
            self.uploads.add(held)
        return held

    def _batcher(self, model: IndexedModel, kind: str) -> Batcher[Any, Row]:
        if (model, kind) not in self._batchers:
            for old in [key for key in self._batchers if key[0].name == model.name and key[0] != model]:
                del self._batchers[old]

            def texts(batch: list[str]) -> Sequence[Row]:
                encoder = self.index.encoder(model)
                with evaluating(encoder):
                    return _rows(encoder.encode_text(batch))

            def pictures(batch: list[torch.Tensor]) -> Sequence[Row]:
                encoder = self.index.encoder(model)
                with evaluating(encoder):
                    return _rows(encoder.encode_image(torch.stack(batch)))

            work: Callable[[list[Any]], Sequence[Row]] = texts if kind == "text" else pictures
            self._batchers[model, kind] = Batcher(
                work, self._encoding, max_batch=self.config.max_batch, max_waiting=self.config.max_waiting
            )
        return self._batchers[model, kind]


def _rows(features: torch.Tensor) -> Sequence[Row]:
    rows: Row = features.detach().float().cpu().numpy()
    return list(rows)

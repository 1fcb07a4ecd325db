"""An index that many clients query at once: what waits where, and what is cached
between queries.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from cloob.serve.schemas import Part, Picture

if TYPE_CHECKING:
    from cloob.search.index import Index

MAX_UPLOADS, MAX_UPLOADS_BYTES = (
    256,
    256_000_000,
)  # that are kept; those used longest ago go first
logger = logging.getLogger(__name__)
T = TypeVar("T")
# Threads of every kind of work: one runs the models, as every one that does has a team
# of torch's threads; what takes long (labels) goes one after the other,
# next to the searches; 64 megapixels that are decoded are 192 MB.
_THREADS = {"encode": 1, "search": 2, "slow": 1, "files": 4, "decode": 2}
Work = Literal["encode", "search", "slow", "files", "decode"]
Medium = Literal["text", "picture"]
_MAX_BATCH, _KEPT_TEXTS = 64, 4096
_FACTS = ("id", "caption", "date", "date_from", "width", "height", "bytes")


@dataclass(frozen=True)
class ServeConfig:
    """Access and limits."""

    token: str | None = (
        # what a request must show as bearer or cookie; None where whoever reaches us
        # may ask
        None
    )
    # only requests for a loopback name are answered, against DNS rebinding; full paths
    # are shown
    local: bool = True
    max_upload_bytes: int = 20_000_000  # of the form with a file
    max_upload_pixels: int = 64_000_000  # by its header, before anything is decoded
    max_body_bytes: int = 1_000_000  # of a request that uploads nothing


@dataclass(frozen=True)
class Upload:
    """A picture that somebody brought, kept in memory for a while."""

    id: str  # the first half of its bytes' SHA-256: who knows it had the picture
    data: bytes  # of the file
    width: int  # upright, pixels
    height: int
    thumbnail: bytes  # JPEG
    rows: dict[str, Vector] = field(
        default_factory=dict
    )  # unit rows (D,) by the fingerprint of the model


class ServedIndex:
    """An open index with its encoders, and bounds per kind of work."""

    def __init__(self, index: Index, config: ServeConfig) -> None:
        self.index, self.config = index, config
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._threads = {
            kind: ThreadPoolExecutor(count, kind) for kind, count in _THREADS.items()
        }
        self._texts: OrderedDict[tuple[str, str], Vector] = OrderedDict()
        self._batches: dict[
            tuple[IndexedModel, Medium],
            tuple[list[Any], asyncio.Task[Sequence[Vector]]],
        ] = {}
        self._turn, self._slow = (
            asyncio.Lock(),
            asyncio.Lock(),
        )  # to embed a batch; to do what takes long

    async def run(self, work: Callable[[], T], kind: Work = "search") -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads[kind], work
        )

    async def run_slow(self, work: Callable[[], T], request: Request) -> T:
        """Runs slow work one after the other; skips it where the client has left when
        its turn comes.
        """
        await request.body()  # after it comes that the client has left
        async with self._slow:
            if await request.is_disconnected():
                raise HTTPException(499, "nobody waits for this any more")
            return await self.run(work, "slow")

    async def warm(self) -> None:
        """Loads the first model and what the cutoff compares with, so that the first
        query does not wait for it.
        """
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

    async def filter(self, where: str | None) -> Filter | None:
        hidden = (
            () if self.config.local else ("path", "source")
        )  # letter by letter they would tell where pictures lie
        return (
            await self.run(lambda: self.index.filter(where, hidden)) if where else None
        )

    def picture(self, item: Item) -> Picture:
        """A picture as the API has it; beyond this machine, its path begins below the
        source.
        """
        container, _, member = item.path.partition(SEPARATOR)
        inside = member and container.lower().endswith((*TAR_SUFFIXES, *ARROW_SUFFIXES))
        name = os.path.basename(member if inside else item.path)  # noqa: PTH119
        below = (
            item.path.removeprefix(item.source).lstrip("/\\:")
            if item.path.startswith(item.source)
            else name
        )
        numbers = {
            key: value for key, value in item.columns.items() if isinstance(value, int)
        }
        large = {
            key: str(value) for key, value in numbers.items() if abs(value) > 2**53
        }
        facts: Any = {key: getattr(item, key) for key in _FACTS}
        path = item.path if self.config.local else below
        result: Picture = facts | {
            "name": name,
            "path": path,
            "columns": {**item.columns, **large},
        }
        return result

    async def item(self, id_: int) -> Item:
        result = await self.run(lambda: self.index.items([id_]))
        if not result:
            raise HTTPException(404, f"no picture {id_}")
        return result[0]

    async def query(
        self, parts: Sequence[Part], model: IndexedModel
    ) -> tuple[Query, Vector]:
        """A query as the index takes it, parts of weight 0 left out, and its unit row
        (D,).
        """
        weighing = [part for part in parts if part.weight != 0]
        rows = await asyncio.gather(*(self.row(part, model) for part in weighing))
        terms = []
        for part in weighing:
            if part.words is not None:
                terms.append(Term(part.words, "words", part.weight))
            else:  # the row of an upload is known
                terms.append(
                    Term(
                        part.item or 0,
                        "image" if part.item is None else "item",
                        part.weight,
                    )
                )
        return Query(tuple(terms)), weighted_row(
            [part.weight for part in weighing], rows
        )

    async def row(self, part: Part, model: IndexedModel) -> Vector:
        """The unit row (D,) of a part."""
        if part.words is not None:
            Query.of(part.words)
            key = (model.fingerprint, part.words)
            if key not in self._texts:
                self._texts[key] = await self._embedded(part.words, model, "text")
                while len(self._texts) > _KEPT_TEXTS:
                    self._texts.popitem(last=False)
            self._texts.move_to_end(key)
            return self._texts[key]
        if part.item is not None:
            ids = [part.item]
            vectors = await self.run(lambda: self.index.store.vectors(model.name, ids))
            if (
                vectors.shape != (1, model.dim) or not np.isfinite(vectors).all()
            ):  # or the model is another by now
                raise HTTPException(
                    404, f"no picture {part.item} with a vector of {model.name}"
                )
            return np.asarray(vectors[0], dtype=np.float32)
        upload = self.upload(part.upload or "")
        if model.fingerprint not in upload.rows:
            pixels = await self.run(
                lambda: self.index.encoder(model).preprocess(decode(upload.data)),
                "decode",
            )
            upload.rows[model.fingerprint] = await self._embedded(
                pixels, model, "picture"
            )
        return upload.rows[model.fingerprint]

    async def _embedded(self, query: Any, model: IndexedModel, kind: Medium) -> Vector:
        """The unit row of a text or of pixels.

        Queries that arrive before the turn of a batch share it.
        """
        queries, rows = self._batches.get((model, kind), ([], None))
        if rows is None or len(queries) == _MAX_BATCH:
            queries = []
            rows = asyncio.create_task(self._embed(queries, model, kind))
            self._batches[model, kind] = queries, rows
        queries.append(query)
        place = len(queries) - 1
        return (await asyncio.shield(rows))[place]

    async def _embed(
        self, queries: list[Any], model: IndexedModel, kind: Medium
    ) -> Sequence[Vector]:
        def work() -> Sequence[Vector]:
            encoder = self.index.encoder(model)
            with evaluating(encoder):
                texts = kind == "text"
                features = (
                    encoder.encode_text(queries)
                    if texts
                    else encoder.encode_image(torch.stack(queries))
                )
            return list(features.detach().float().cpu().numpy())

        async with self._turn:
            if self._batches[model, kind][0] is queries:
                del self._batches[model, kind]
            return await self.run(work, "encode")

    def upload(self, id_: str) -> Upload:
        if id_ not in self._uploads:
            raise HTTPException(
                404, "the uploaded picture is no longer kept; upload it again"
            )
        self._uploads.move_to_end(id_)
        return self._uploads[id_]

    async def add_upload(self, file: BinaryIO) -> Upload:
        """Keeps a picture, or raises Unreadable; a model embeds it when a query needs
        that.
        """

        def checked() -> Upload:
            data = file.read()  # here, so that those that wait are not in memory
            if is_unbounded(data):
                raise Unreadable("no decoder", "JPEG XL is not taken")
            image = Encoded(data, self.config.max_upload_pixels).rgb()
            id_ = hashlib.sha256(data).hexdigest()[:32]
            return Upload(id_, data, *image.size, thumbnail(image, 256))

        added, kept = await self.run(checked, "decode"), self._uploads
        kept.setdefault(added.id, added)
        kept.move_to_end(added.id)
        while (
            len(kept) > MAX_UPLOADS
            or sum(len(item.data) for item in kept.values()) > MAX_UPLOADS_BYTES
        ):
            kept.popitem(last=False)
        return kept[added.id]

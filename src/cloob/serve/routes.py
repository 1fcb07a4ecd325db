"""The API: searches, labels, pictures by id, and uploads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePath
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import (
    APIRouter,
    Depends,
    File,
    HTTPException,
    Query,
    Request,
    Response,
    UploadFile,
)

from cloob.errors import InputError
from cloob.pictures import Unreadable
from cloob.search.classify import (
    NONE,
    TEMPLATES,
    LabelOptions,
    Labels,
    check_labels,
)
from cloob.search.find import Cutoff
from cloob.search.matrix import Vectors
from cloob.search.records import valid
from cloob.search.where import NUMBERS, TEXTS
from cloob.serve import schemas
from cloob.serve.collection import ServedIndex
from cloob.serve.schemas import Id, Where


async def collection(request: Request) -> ServedIndex:
    """The collection that the server was started with.

    Async, since FastAPI runs other functions in a thread per request.
    """
    served: ServedIndex = request.app.state.collection
    return served


api = APIRouter(prefix="/api")
Served = Annotated[ServedIndex, Depends(collection)]
SizeQuery = Annotated[
    int, Query(ge=64, le=1024, multiple_of=64, description="Longer side, pixels.")
]
# What browsers show and no script can hide in, by the first bytes.
_KINDS = (
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"\x89PNG\r\n", "image/png"),
    (rb"GIF8", "image/gif"),
    (rb"RIFF....WEBP", "image/webp"),
    (rb"....ftypavi[fs]", "image/avif"),
)
_OTHER = "application/octet-stream"
_JPEG: dict[int | str, Any] = {
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}
}
_ANY: dict[int | str, Any] = {200: {"content": {"image/*": {}, _OTHER: {}}}}


@api.get("/health")
async def health(served: Served) -> dict[str, str | int | None]:
    """That the server is there, and in which state the index is.

    ``revision`` grows with every change; a model that is not ``ready`` is loaded at the
    first query.
    """
    index = served.index
    revision, (n_pictures, model) = await served.at_revision(
        lambda: (len(index), index.store.stored_model())
    )
    return {
        "status": "ok",
        "pictures": n_pictures,
        "revision": revision,
        "model": model.name if model else None,
        "ready": index.is_loaded(),
    }


@api.post("/search")
async def search(served: Served, query: schemas.SearchQuery) -> schemas.Found:
    """Looks for pictures by words, by pictures, or by both with weights.

    A weight below 0 keeps away from its part.
    """
    where = await served.filter(query.where)
    terms = await served.query(query.parts)
    cutoff: Cutoff = "auto" if query.cutoff else None
    revision, result = await served.at_revision(
        lambda: served.index.search(terms, top=query.top, where=where, cutoff=cutoff)
    )
    hits: list[schemas.FoundPicture] = [
        {**served.picture(hit.item), "score": hit.score, "margin": hit.margin}
        for hit in result.hits
    ]
    return {
        "model": result.model,
        "revision": revision,
        "searched": result.searched,
        "cut": result.cut,
        "hits": hits,
    }


@api.post("/classify")
async def classify(
    request: Request, served: Served, query: schemas.ClassifyQuery
) -> schemas.Classified:
    """Sorts all pictures, or those that a filter lets through, by labels."""
    where = await served.filter(query.where)
    options = LabelOptions(
        templates=tuple(query.templates) or TEMPLATES,
        multi=query.multi,
        none=query.none,
    )
    if query.cutoff is not None:
        if not (query.multi or query.none):
            raise InputError("cutoff needs multi or none")
        options = replace(options, cutoff=query.cutoff)
    check_labels(query.labels, options)
    index = served.index
    await served.run(index.embedder, "encode")
    revision, labels = await served.run_slow(
        lambda: (
            index.store.revision(),
            index.classify(query.labels, options, where=where),
        ),
        request,
    )
    return {
        "model": index.model().name,
        "revision": revision,
        "classified": len(labels.ids),
        "labels": _pictures_by_label(labels, query.top),
    }


def _pictures_by_label(labels: Labels, top: int) -> list[schemas.LabelPictures]:
    """For each label its ``top`` surest pictures; last those that no label fits."""
    names = [*labels.names, NONE]
    rows_by_label: list[list[int]] = [[] for _ in names]
    for row, chosen in enumerate(labels.chosen):
        for label in chosen or [-1]:
            rows_by_label[label].append(row)
    of_none = 1 - labels.probabilities.max(axis=1)
    probabilities = np.column_stack([labels.probabilities, of_none])
    margins = None
    if labels.margins is not None:
        margins = np.column_stack([labels.margins, labels.margins.max(axis=1)])
    answers: list[schemas.LabelPictures] = []
    for label, name in enumerate(names if rows_by_label[-1] else labels.names):
        rows = np.array(rows_by_label[label], np.int64)
        order = np.argsort(-probabilities[rows, label], kind="stable")
        surest = rows[order[:top]]
        margins_of_label = None if margins is None else _rounded(margins[surest, label])
        answers.append(
            {
                "label": name,
                "count": len(rows),
                "ids": labels.ids[surest].tolist(),
                "probabilities": _rounded(probabilities[surest, label]),
                "margins": margins_of_label,
            }
        )
    return answers


def _rounded(numbers: Vectors) -> list[float]:
    """Four digits, as JSON has them."""
    return [round(number, 4) for number in numbers.tolist()]


@api.get("/items")
async def items(
    served: Served, id: Annotated[list[Id], Query(min_length=1, max_length=200)]
) -> list[schemas.Picture]:
    """The pictures of ids, in the order of the request; unknown ids are left out."""
    found = await served.run(lambda: served.index.items(id))
    return [served.picture(item) for item in found]


@api.get("/ids")
async def ids(
    served: Served, where: Where | None = None, order: Literal["id", "newest"] = "id"
) -> dict[str, int | list[int]]:
    """The ids of all pictures, or of those that a filter lets through."""
    condition = await served.filter(where)
    store = served.index.store
    revision, found = await served.at_revision(
        lambda: store.ids(condition, order=order)
    )
    return {"revision": revision, "ids": found.tolist()}


@api.get("/months")
async def months(served: Served, where: Where | None = None) -> schemas.Months:
    """How many pictures each month has, in the order of the newest ids."""
    condition = await served.filter(where)
    store = served.index.store
    revision, counted = await served.at_revision(lambda: store.months(condition))
    counts: list[schemas.Month] = [
        {"month": month, "count": count} for month, count in counted
    ]
    return {"revision": revision, "months": counts}


@api.get("/columns")
async def columns(served: Served) -> list[dict[str, str]]:
    """What a filter can name: ``name`` and ``kind`` of every column."""
    kinds = dict.fromkeys(TEXTS, "text")
    kinds.update(dict.fromkeys(NUMBERS, "number"))
    kinds["date"] = "date"
    kinds.update(await served.run(served.index.store.columns))
    return [{"name": name, "kind": kind} for name, kind in kinds.items()]


@api.get("/items/{id}")
async def item(served: Served, id: Id) -> schemas.Picture:
    """A picture: path, date, size, caption and columns."""
    return served.picture(await served.item(id))


@api.get("/items/{id}/thumbnail", response_class=Response, responses=_JPEG)
async def thumbnail(
    request: Request, served: Served, id: Id, size: SizeQuery = 256
) -> Response:
    """A small JPEG of a picture, upright and without metadata."""
    return await _file(
        request, served, id, f"-{size}", lambda: served.index.thumbnail(id, size)
    )


@api.get("/items/{id}/picture", response_class=Response, responses=_ANY)
async def picture(request: Request, served: Served, id: Id) -> Response:
    """A picture as its file has it.

    A format that browsers do not show comes as a download.
    """
    return await _file(request, served, id, "", lambda: served.index.picture(id))


async def _file(
    request: Request, served: ServedIndex, id: int, form: str, read: Callable[[], bytes]
) -> Response:
    """The bytes of a file, or 304 where the browser has them.

    A browser asks every time: another index has other pictures under these addresses.
    """
    content = (await served.item(id)).content
    etag = f'"{content[:32]}{form}"'
    headers = {"etag": etag, "cache-control": "private, no-cache"}
    cached_etags = re.findall(r'"[^"]*"', request.headers.get("if-none-match", ""))
    if etag in cached_etags:
        return Response(status_code=304, headers=headers)
    try:
        data = await served.run(read, "files")
    except (InputError, OSError):
        raise HTTPException(
            404, f"the file of picture {id} is gone or has changed; run cloob index"
        ) from None
    kind = _kind(data)
    if kind == _OTHER:
        headers["content-disposition"] = "attachment"
    return Response(data, media_type=kind, headers=headers)


def _kind(data: bytes) -> str:
    """The media type of a file, by its first bytes."""
    for magic, kind in _KINDS:
        if re.match(magic, data, re.DOTALL):
            return kind
    return _OTHER


async def upload(
    served: Served, file: Annotated[UploadFile, File(description="A picture.")]
) -> dict[str, str | int]:
    """Takes a picture to search with; it stays in memory for a while.

    Only its thumbnail is given back.
    """
    try:
        added = await served.add_upload(file.file)
    except Unreadable as error:
        code = 413 if error.reason == "image too large" else 415
        why = f" ({error.detail})" if error.reason == "no decoder" else ""
        limit = f"{served.config.max_upload_pixels:,} pixels"
        taken = f"JPEG, PNG, WebP, GIF, AVIF and HEIC of at most {limit} are taken"
        name = valid(PurePath(file.filename or "").name)[:100]
        raise HTTPException(code, f"{name}: {error.reason}{why}; {taken}") from None
    return {"upload": added.id, "width": added.width, "height": added.height}


@api.get("/uploads/{id}/thumbnail", response_class=Response, responses=_JPEG)
async def upload_thumbnail(served: Served, id: str) -> Response:
    """A small JPEG of an uploaded picture."""
    return Response(
        served.uploads.get(id).thumbnail,
        media_type="image/jpeg",
        headers={"cache-control": "private, max-age=3600"},
    )

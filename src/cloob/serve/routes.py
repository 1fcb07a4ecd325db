"""What can be asked: searches, labels, explanations, maps, embeddings, pictures by id, and uploads."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, File, Path, Query, Request, Response, UploadFile

from cloob.errors import InputError
from cloob.search.classify import NONE, TEMPLATES, LabelOptions, Labels, check_labels
from cloob.search.records import Results, valid
from cloob.search.store import Ids, Vectors
from cloob.search.where import NUMBERS, TEXTS
from cloob.serve import schemas
from cloob.serve.collection import Collection, Gone, told
from cloob.serve.schemas import MOST, Part
from cloob.serve.uploads import TooLarge, Unsupported

about, find, pictures = (APIRouter(tags=[tag]) for tag in ("about", "find", "pictures"))
IdPath = Annotated[int, Path(ge=1, le=2**53 - 1, examples=[17])]
ModelQuery = Annotated[str | None, Query(min_length=1, max_length=200)]
WhereQuery = Annotated[str | None, Query(max_length=2000, examples=["date >= 2024"])]
Responses = dict[int | str, dict[str, Any]]
_KINDS = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n", "image/png"), (b"GIF8", "image/gif"))
_JPEG: Responses = {200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}}
_ANY: Responses = {200: {"content": {"image/*": {}, "application/octet-stream": {}}}}


def collection(request: Request) -> Collection:
    """The collection that the server was started with."""
    held: Collection = request.app.state.collection
    return held


@about.get("/health")
async def health(request: Request) -> dict[str, str | int | list[str]]:
    """That the server is there, and in which state the index is: ``revision`` grows with each change."""
    index = collection(request).index
    pictures, revision, models = await collection(request).search(lambda: (len(index), index.revision(), index.models))
    return {"status": "ok", "pictures": pictures, "revision": revision, "models": [model.name for model in models]}


@about.get("/models")
async def models(request: Request) -> list[dict[str, str | int]]:
    """The models whose vectors the index holds; the first is asked where a query names none."""
    held = collection(request)
    return [{"name": model.name, "dim": model.dim} for model in await held.search(lambda: held.index.models)]


@find.post("/search", response_model=schemas.Found)
async def search(request: Request, query: schemas.SearchQuery) -> Any:
    """Looks for pictures by words, by pictures, or by both with weights; a weight below 0 keeps away from its part."""
    held = collection(request)
    model, where = await held.model(query.model), await held.filter(query.where)
    asked, row = await held.query(query.parts, model)
    cutoff: Literal["auto"] | None = "auto" if query.cutoff else None
    return await _found(
        held, lambda: held.index.search(asked, row=row, top=query.top, where=where, model=model, cutoff=cutoff)
    )


@find.get("/items/{id}/similar", response_model=schemas.Found)
async def similar(
    request: Request,
    id: IdPath,
    top: Annotated[int, Query(ge=1, le=MOST)] = 50,
    where: WhereQuery = None,
    model: ModelQuery = None,
) -> Any:
    """More like this: the pictures nearest to one of the index, without itself."""
    held = collection(request)
    asked, condition = await held.model(model), await held.filter(where)
    query, row = await held.query([Part(item=id)], asked)
    return await _found(
        held, lambda: held.index.search(query, row=row, top=top, where=condition, model=asked, cutoff=None)
    )


async def _found(held: Collection, work: Callable[[], Results]) -> dict[str, Any]:
    revision, results = await held.search(lambda: (held.index.revision(), work()))
    hits = [
        {
            **schemas.picture(hit.item, whole_path=held.config.local),
            "score": _cosine(hit.score),
            "margin": None if hit.margin is None or not math.isfinite(hit.margin) else float(hit.margin),
        }
        for hit in results.hits
    ]
    answer = {"model": results.model, "revision": revision, "searched": results.searched, "cut": results.cut}
    return {**answer, "hits": hits}


@find.post("/explain", response_model=schemas.Explained)
async def explain(request: Request, query: schemas.ExplainQuery) -> Any:
    """What the query retrieves from the collection as memory (modern Hopfield retrieval): pictures and their weights.

    The greater β, the fewer pictures share the weight.
    """
    held = collection(request)
    model, where = await held.model(query.model), await held.filter(query.where, some=True)
    asked, row = await held.query(query.parts, model)
    found = await held.search(
        lambda: held.index.explain(asked, row=row, beta=query.beta, top=query.top, where=where, model=model)
    )
    memories = [
        {
            **schemas.picture(picture.item, whole_path=held.config.local),
            "weight": picture.weight,
            "score": _cosine(picture.score),
        }
        for picture in found.pictures
    ]
    answer = {"model": model.name, "beta": found.beta, "memory": found.memory, "effective": found.effective}
    return {**answer, "agreement": _cosine(found.agreement), "memories": memories}


def _cosine(value: float) -> float:
    return max(-1.0, min(1.0, float(value)))


@find.post("/classify", response_model=schemas.Classified)
async def classify(request: Request, query: schemas.ClassifyQuery) -> Any:
    """Sorts all pictures, or those that a filter lets through, by labels in your own words."""
    held = collection(request)
    model, where = await held.model(query.model), await held.filter(query.where, some=True)
    options = LabelOptions(templates=tuple(query.templates) or TEMPLATES, multi=query.multi, none=query.none)
    with told():
        check_labels(query.labels, options)
    revision, labels = await held.slow(
        lambda: (
            held.index.revision(),
            held.index.classify(query.labels, options, where=where, model=model.name),
        )
    )
    return {"model": model.name, "revision": revision, **_by_label(labels, query.top)}


def _by_label(labels: Labels, top: int) -> dict[str, Any]:
    """The pictures of each label, the surest first; those without any last, where there are some."""
    members: list[list[int]] = [[] for _ in labels.names]
    without: list[int] = []
    for place, chosen in enumerate(labels.chosen):
        for label in chosen:
            members[label].append(place)
        if not chosen:
            without.append(place)
    answers = [
        _label(name, labels.ids, labels.probabilities[:, column], members[column], top)
        for column, name in enumerate(labels.names)
    ]
    if without:
        answers.append(_label(NONE, labels.ids, 1 - labels.probabilities.max(1), without, top))
    return {"classified": len(labels.ids), "labels": answers}


def _label(name: str, ids: Ids, probabilities: Vectors, members: list[int], top: int) -> dict[str, Any]:
    places = np.array(members, dtype=np.int64)
    order = places[np.argsort(-probabilities[places], kind="stable")][:top]
    rounded = np.round(probabilities[order].astype(np.float64), 4)
    return {"label": name, "count": len(members), "ids": ids[order].tolist(), "probabilities": rounded.tolist()}


@find.get("/map", response_model=schemas.MapPoints)
async def map_(
    request: Request,
    sample: Annotated[int, Query(ge=2, le=20_000)] = 5000,
    method: Literal["pca", "tsne"] = "pca",
    where: WhereQuery = None,
    model: ModelQuery = None,
) -> Any:
    """A sample of the collection on a plane; t-SNE takes its time, once for each state of the index."""
    held = collection(request)
    asked, condition = await held.model(model), await held.filter(where)
    revision, (ids, points) = await held.map(
        (asked, method, sample, where),
        lambda: held.index.map(sample=sample, method=method, where=condition, model=asked.name),
    )
    x, y = np.round(np.asarray(points, dtype=np.float64), 4).T.tolist()
    return {"model": asked.name, "revision": revision, "ids": np.asarray(ids).tolist(), "x": x, "y": y}


@find.post("/embed", response_model=schemas.Embedded)
async def embed(request: Request, query: schemas.EmbedQuery) -> Any:
    """Unit rows of texts and of uploaded pictures."""
    held = collection(request)
    model = await held.model(query.model)
    texts = await asyncio.gather(*(held.row(Part(words=text), model) for text in query.texts))
    uploads = await asyncio.gather(*(held.row(Part(upload=upload), model) for upload in query.uploads))
    rows = {"texts": [row.tolist() for row in texts], "uploads": [row.tolist() for row in uploads]}
    return {"model": model.name, "dim": model.dim, **rows}


@pictures.get("/items", response_model=list[schemas.Picture])
async def items(
    request: Request,
    id: Annotated[list[Annotated[int, Query(ge=1, le=2**53 - 1)]], Query(min_length=1, max_length=200)],
) -> Any:
    """What is known of some pictures, in the order asked for; those that are not there are left out."""
    held = collection(request)
    found = await held.search(lambda: held.index.items(id))
    return [schemas.picture(item, whole_path=held.config.local) for item in found]


@pictures.get("/ids")
async def ids(request: Request, where: WhereQuery = None) -> dict[str, int | list[int]]:
    """The ids of all pictures, or of those that a filter lets through."""
    held = collection(request)
    condition = await held.filter(where)
    revision, found = await held.search(lambda: (held.index.revision(), held.index.store.ids(condition)))
    return {"revision": revision, "ids": found.tolist()}


@pictures.get("/columns")
async def columns(request: Request) -> list[dict[str, str]]:
    """What a filter can name: ``name`` and ``kind`` of each column."""
    held = collection(request)
    own = dict.fromkeys(TEXTS, "text") | dict.fromkeys(NUMBERS, "number") | {"date": "date"}
    found = own | await held.search(held.index.columns)
    return [{"name": name, "kind": kind} for name, kind in found.items()]


@pictures.get("/items/{id}", response_model=schemas.Picture)
async def item(request: Request, id: IdPath) -> Any:
    """What is known of a picture."""
    held = collection(request)
    found = await held.search(lambda: held.index.items([id]))
    if not found:
        raise Gone(f"no picture {id}")
    return schemas.picture(found[0], whole_path=held.config.local)


@pictures.get("/items/{id}/thumbnail", response_class=Response, responses=_JPEG)
async def thumbnail(
    request: Request,
    id: IdPath,
    size: Annotated[int, Query(ge=64, le=1024, multiple_of=64, description="Longer side, pixels.")] = 256,
) -> Response:
    """A small JPEG of a picture, upright and without metadata."""
    held = collection(request)
    return await _file(request, id, f"-{size}", lambda: held.index.thumbnail(id, size))


@pictures.get("/items/{id}/picture", response_class=Response, responses=_ANY)
async def picture(request: Request, id: IdPath) -> Response:
    """A picture as its file has it; a format that browsers do not show comes as a download."""
    held = collection(request)
    return await _file(request, id, "", lambda: held.index.picture(id))


async def _file(request: Request, id: int, form: str, read: Callable[[], bytes]) -> Response:
    """A browser may keep it, and asks each time: the next index has another picture under the same address."""
    held = collection(request)
    found = await held.search(lambda: held.index.items([id]))
    if not found:
        raise Gone(f"no picture {id}")
    headers = {"etag": f'"{found[0].content[:32]}{form}"', "cache-control": "private, no-cache"}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    try:
        data = await held.files(read)
    except (InputError, OSError):
        raise Gone(f"the file of picture {id} is not there or has changed; cloob index brings it up to date") from None
    kind = _media_type(data)
    if kind == "application/octet-stream":
        headers["content-disposition"] = "attachment"
    return Response(data, media_type=kind, headers=headers)


def _media_type(data: bytes) -> str:
    """By the first bytes, of what browsers show and no script can hide in."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "image/avif"
    return next((kind for magic, kind in _KINDS if data.startswith(magic)), "application/octet-stream")


async def upload(request: Request, file: Annotated[UploadFile, File(description="A picture.")]) -> dict[str, str | int]:
    """Takes a picture to search with; it is kept in memory for a while, and only its thumbnail is given back."""
    held = collection(request)
    data = await file.read(held.config.max_upload_bytes + 1)
    try:
        added = await held.add_upload(data)
    except (Unsupported, TooLarge) as error:
        raise type(error)(f"{valid(PurePath(file.filename or '').name)[:100]}: {error}") from None
    return {"upload": added.id, "width": added.width, "height": added.height}


@pictures.get("/uploads/{id}/thumbnail", response_class=Response, responses=_JPEG)
async def upload_thumbnail(request: Request, id: str) -> Response:
    """A small JPEG of an uploaded picture."""
    small = collection(request).upload(id).thumbnail
    return Response(small, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

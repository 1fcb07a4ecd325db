"""The API: searches, labels, explanations, embeddings, pictures by id, and uploads."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
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
from cloob.search.alike import DUPLICATE, first_alike, look_alikes, present, shot_of
from cloob.search.classify import NONE, TEMPLATES, LabelOptions, check_labels
from cloob.search.records import valid
from cloob.search.where import NUMBERS, TEXTS
from cloob.serve import schemas
from cloob.serve.collection import ServedIndex
from cloob.serve.schemas import Id, Name, Part, Top, Where


async def collection(request: Request) -> Any:
    """The collection that the server was started with; async, as FastAPI runs others in
    a thread per request.
    """
    return request.app.state.collection


api = APIRouter(prefix="/api")
Served = Annotated[ServedIndex, Depends(collection)]
SizeQuery = Annotated[
    int, Query(ge=64, le=1024, multiple_of=64, description="Longer side, pixels.")
]
_KINDS = (  # what browsers show and no script can hide in, by the first bytes
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"\x89PNG\r\n", "image/png"),
    (rb"GIF8", "image/gif"),
    (rb"RIFF....WEBP", "image/webp"),
    (rb"....ftypavi[fs]", "image/avif"),
)
_JPEG: dict[int | str, Any] = {
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}
}
_ANY: dict[int | str, Any] = {
    200: {"content": {"image/*": {}, "application/octet-stream": {}}}
}


@api.get("/health")
async def health(served: Served) -> dict[str, str | int | list[str]]:
    """That the server is there, and in which state the index is: ``revision`` grows
    with every change.
    """
    index = served.index
    pictures, revision, models = await served.run(
        lambda: (len(index), index.revision(), index.models)
    )
    return {
        "status": "ok",
        "pictures": pictures,
        "revision": revision,
        "models": [model.name for model in models],
    }


@api.get("/models")
async def models(served: Served) -> list[dict[str, str | int]]:
    """The models whose vectors the index has; the first is the default."""
    return [
        {"name": model.name, "dim": model.dim}
        for model in await served.run(lambda: served.index.models)
    ]


@api.post("/search")
async def search(served: Served, query: schemas.SearchQuery) -> schemas.Found:
    """Looks for pictures by words, by pictures, or by both with weights; a weight below
    0 keeps away from its part.
    """
    index, model, where = (
        served.index,
        await served.model(query.model),
        await served.filter(query.where),
    )
    terms, row = await served.query(query.parts, model)
    how: Any = {
        "top": query.top,
        "where": where,
        "model": model,
        "cutoff": "auto" if query.cutoff else None,
    }
    revision, result = await served.run(
        lambda: (index.revision(), index.search(terms, row=row, **how))
    )
    hits: list[schemas.FoundPicture] = []
    for hit, first in zip(
        result.hits, first_alike(hit.item for hit in result.hits), strict=True
    ):
        of_hit: Any = {
            "score": hit.score,
            "margin": hit.margin,
            "words": list(hit.words),
            "same": first,
        }
        hits.append(of_hit | served.picture(hit.item))
    return {
        "model": result.model,
        "revision": revision,
        "searched": result.searched,
        "cut": result.cut,
        "hits": hits,
    }


@api.get("/items/{id}/similar")
async def similar(
    served: Served,
    id: Id,
    top: Top = 50,
    where: Where | None = None,
    model: Name | None = None,
) -> schemas.Found:
    """More like this: the pictures nearest to one of the index, without itself."""
    parts = [Part(item=id)]
    return await search(
        served,
        schemas.SearchQuery(
            parts=parts, top=top, where=where, model=model, cutoff=False
        ),
    )


@api.post("/explain")
async def explain(served: Served, query: schemas.ExplainQuery) -> schemas.Explained:
    """What the query retrieves from the collection as memory (modern Hopfield
    retrieval): pictures and their weights.

    The greater β, the fewer pictures share the weight.
    """
    model, where = await served.model(query.model), await served.filter(query.where)
    terms, row = await served.query(query.parts, model)
    result = await served.run(
        lambda: served.index.explain(
            terms, row=row, beta=query.beta, top=query.top, where=where, model=model
        )
    )
    memories: list[schemas.Memory] = []
    for picture in result.pictures:
        share: Any = {"weight": picture.weight, "score": picture.score}
        memories.append(share | served.picture(picture.item))
    return {
        "model": model.name,
        "beta": result.beta,
        "memory": result.memory,
        "effective": result.effective,
        "agreement": result.agreement,
        "memories": memories,
    }


@api.post("/classify")
async def classify(
    request: Request, served: Served, query: schemas.ClassifyQuery
) -> schemas.Classified:
    """Sorts all pictures, or those that a filter lets through, by labels in your
    words.
    """
    model, where = await served.model(query.model), await served.filter(query.where)
    options = LabelOptions(
        templates=tuple(query.templates) or TEMPLATES,
        multi=query.multi,
        none=query.none,
    )
    check_labels(query.labels, options)
    revision, labels = await served.run_slow(
        lambda: (
            served.index.revision(),
            served.index.classify(query.labels, options, where=where, model=model.name),
        ),
        request,
    )
    places: dict[str, list[int]] = {name: [] for name in labels.names}
    for place, chosen in enumerate(labels.chosen):
        for name in [labels.names[label] for label in chosen] or [NONE]:
            places.setdefault(name, []).append(place)
    answers: list[schemas.LabelPictures] = []
    for label, (name, members) in enumerate(places.items()):
        none = label == len(labels.names)
        probabilities = (
            1 - labels.probabilities.max(1) if none else labels.probabilities[:, label]
        )[members]
        order = np.argsort(-probabilities, kind="stable")[
            : query.top
        ]  # the surest first
        rounded, best = (
            np.round(probabilities[order].astype(np.float64), 4),
            labels.ids[members][order],
        )
        shown: Any = {
            "label": name,
            "count": len(members),
            "ids": best.tolist(),
            "probabilities": rounded.tolist(),
        }
        answers.append(shown)
    return {
        "model": model.name,
        "revision": revision,
        "classified": len(labels.ids),
        "labels": answers,
    }


@api.get("/duplicates")
async def duplicates(
    request: Request,
    served: Served,
    threshold: Annotated[
        float, Query(ge=0.001, le=1, description="The least cosine in a group.")
    ] = DUPLICATE,
    where: Where | None = None,
    model: Name | None = None,
) -> schemas.Duplicates:
    """Groups of pictures that look alike, the largest first; all are compared, once per
    state of the index.

    Files that are gone or have changed by now are left out: ``stale`` of them.
    """
    by, condition, memo = (
        await served.model(model),
        await served.filter(where),
        served.index.memo,
    )
    view, revision = await served.run(
        lambda: (served.index.view(condition, by), served.index.revision())
    )
    key = ("duplicates", revision, by, threshold, where)
    groups: Any = memo.get(key)  # which does not wait for others
    if groups is None:
        groups = await served.run_slow(
            lambda: memo.of(key, partial(look_alikes, view, threshold, exact=False)),
            request,
        )
    result = await served.run(lambda: present(view, groups), "files")
    shown: list[schemas.Group] = []
    for group in result.groups:
        items, scores = [hit.item for hit in group], [hit.score for hit in group]
        same: dict[str, int] = {}  # the first id of equal bytes, and of a shot
        equal = [same.setdefault(item.content, item.id) for item in items]
        shot = [same.setdefault(shot_of(item.path), item.id) for item in items]
        shown.append(
            {
                "ids": [item.id for item in items],
                "scores": scores,
                "equal": equal,
                "shot": shot,
            }
        )
    return {
        "model": by.name,
        "revision": revision,
        "groups": shown,
        "stale": result.stale,
        "twice": result.twice,
    }


@api.post("/embed")
async def embed(
    served: Served, query: schemas.EmbedQuery
) -> dict[str, str | int | list[list[float]]]:
    """Unit rows of texts and of uploaded pictures."""
    model = await served.model(query.model)
    parts = [Part(words=text) for text in query.texts] + [
        Part(upload=upload) for upload in query.uploads
    ]
    rows = [
        row.tolist()
        for row in await asyncio.gather(*(served.row(part, model) for part in parts))
    ]
    count = len(query.texts)
    return {
        "model": model.name,
        "dim": model.dim,
        "texts": rows[:count],
        "uploads": rows[count:],
    }


@api.get("/items")
async def items(
    served: Served, id: Annotated[list[Id], Query(min_length=1, max_length=200)]
) -> list[schemas.Picture]:
    """Facts of some pictures, in the order of the request; unknown ids are left out."""
    return list(map(served.picture, await served.run(lambda: served.index.items(id))))


@api.get("/ids")
async def ids(
    served: Served, where: Where | None = None, order: Literal["id", "newest"] = "id"
) -> dict[str, int | list[int]]:
    """The ids of all pictures, or of those that a filter lets through."""
    condition, store = await served.filter(where), served.index.store
    revision, result = await served.run(
        lambda: (store.revision(), store.ids(condition, order=order))
    )
    return {"revision": revision, "ids": result.tolist()}


@api.get("/shots")
async def shots(served: Served) -> dict[str, int | list[int]]:
    """Files (``ids``) with equal bytes or of one shot (RAW and JPEG of one stem), and
    the first one of every group.
    """
    store, revision = served.index.store, await served.run(served.index.revision)

    def work() -> dict[int, int]:
        states = [
            state
            for source in store.sources()
            for state in store.states(source)
            if state.id is not None
        ]
        pairs = zip(states, first_alike(states), strict=True)
        return {
            state.id: first
            for state, first in pairs
            if state.id is not None and state.id != first
        }

    result = await served.run(lambda: served.index.memo.of((revision, "shots"), work))
    return {"revision": revision, "ids": list(result), "firsts": list(result.values())}


@api.get("/columns")
async def columns(served: Served) -> list[dict[str, str]]:
    """What a filter can name: ``name`` and ``kind`` of every column."""
    kinds = (
        dict.fromkeys(TEXTS, "text")
        | dict.fromkeys(NUMBERS, "number")
        | {"date": "date"}
    )
    kinds |= await served.run(served.index.columns)
    return [{"name": name, "kind": kind} for name, kind in kinds.items()]


@api.get("/items/{id}")
async def item(served: Served, id: Id) -> schemas.Picture:
    """Facts of a picture."""
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
    """A picture as its file has it; a format that browsers do not show comes as a
    download.
    """
    return await _file(request, served, id, "", lambda: served.index.picture(id))


async def _file(
    request: Request, served: ServedIndex, id: int, form: str, read: Callable[[], bytes]
) -> Response:
    """A browser may keep it, and asks every time: the next index has another picture
    under the same address.
    """
    result = await served.item(id)
    headers = {
        "etag": f'"{result.content[:32]}{form}"',
        "cache-control": "private, no-cache",
    }
    if headers["etag"] in re.findall(
        r'"[^"]*"', request.headers.get("if-none-match", "")
    ):  # also of W/"…"
        return Response(status_code=304, headers=headers)
    try:
        data = await served.run(read, "files")
    except (InputError, OSError):
        raise HTTPException(
            404, f"the file of picture {id} is gone or has changed; run cloob index"
        ) from None
    kind = next(
        (kind for magic, kind in _KINDS if re.match(magic, data, re.DOTALL)),
        "application/octet-stream",
    )
    if kind == "application/octet-stream":
        headers["content-disposition"] = "attachment"
    return Response(data, media_type=kind, headers=headers)


async def upload(
    served: Served, file: Annotated[UploadFile, File(description="A picture.")]
) -> dict[str, str | int]:
    """Takes a picture to search with; it stays in memory for a while, and only its
    thumbnail is given back.
    """
    try:
        added = await served.add_upload(file.file)
    except Unreadable as error:
        code = 413 if error.reason == "image too large" else 415
        why = f" ({error.detail})" if error.reason == "no decoder" else ""
        taken = (
            "JPEG, PNG, WebP, GIF, AVIF and HEIC of at most"
            f" {served.config.max_upload_pixels:,} pixels are taken"
        )
        name = valid(PurePath(file.filename or "").name)[:100]
        raise HTTPException(code, f"{name}: {error.reason}{why}; {taken}") from None
    return {"upload": added.id, "width": added.width, "height": added.height}


@api.get("/uploads/{id}/thumbnail", response_class=Response, responses=_JPEG)
async def upload_thumbnail(served: Served, id: str) -> Response:
    """A small JPEG of an uploaded picture."""
    headers = {"cache-control": "private, max-age=3600"}
    return Response(
        served.upload(id).thumbnail, media_type="image/jpeg", headers=headers
    )

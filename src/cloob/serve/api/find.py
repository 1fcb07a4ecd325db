"""Routes that look for something: search, more like this, classify, explain, the map, embeddings."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Query, Request

from cloob.search.classify import NONE, TEMPLATES, LabelOptions, Labels
from cloob.search.records import Results, valid
from cloob.search.store import Ids, Vectors
from cloob.serve.api import schemas
from cloob.serve.api.schemas import MOST, ItemPart, UploadPart, WordsPart
from cloob.serve.collection import Collection, Part

router = APIRouter(tags=["find"])
IdPath = Annotated[int, Path(ge=1, le=2**53 - 1, examples=[17])]
ModelQuery = Annotated[str | None, Query(min_length=1, max_length=200)]
WhereQuery = Annotated[str | None, Query(max_length=2000, examples=["date >= 2024"])]


def collection(request: Request) -> Collection:
    """The collection that the server was started with."""
    held: Collection = request.app.state.collection
    return held


@router.post("/search", response_model=schemas.Found)
async def search(request: Request, query: schemas.SearchQuery) -> Any:
    """Looks for pictures by words, by pictures, or by both with weights; a weight below 0 keeps away from its part."""
    held = collection(request)
    model = await held.model(query.model)
    asked, row = await held.query(_parts(query.parts), model)
    cutoff: Literal["auto"] | None = "auto" if query.cutoff else None
    revision, results = await held.search(
        lambda: (
            held.index.revision(),
            held.index.search(asked, row=row, top=query.top, where=query.where or None, model=model, cutoff=cutoff),
        )
    )
    return _found(held, revision, results)


@router.get("/items/{id}/similar", response_model=schemas.Found)
async def similar(
    request: Request,
    id: IdPath,
    top: Annotated[int, Query(ge=1, le=MOST)] = 50,
    where: WhereQuery = None,
    model: ModelQuery = None,
) -> Any:
    """More like this: the pictures nearest to one of the index, without itself."""
    held = collection(request)
    asked = await held.model(model)
    await held.row([Part(item=id)], asked)  # 404 where there is no such picture
    revision, results = await held.search(
        lambda: (held.index.revision(), held.index.similar(id, top=top, where=where or None, model=asked.name))
    )
    return _found(held, revision, results)


@router.post("/classify", response_model=schemas.Classified)
async def classify(request: Request, query: schemas.ClassifyQuery) -> Any:
    """Sorts all pictures, or those that a filter lets through, by labels in your own words."""
    held = collection(request)
    model = await held.model(query.model)
    options = LabelOptions(templates=tuple(query.templates) or TEMPLATES, multi=query.multi, none=query.none)
    revision, sorted_ = await held.slow(
        lambda: (
            held.index.revision(),
            held.index.classify(query.labels, options, where=query.where or None, model=model.name),
        )
    )
    return {"model": valid(model.name), "revision": revision, **_by_label(sorted_, query.top)}


@router.post("/explain", response_model=schemas.Explained)
async def explain(request: Request, query: schemas.ExplainQuery) -> Any:
    """What the query retrieves from the collection as memory (modern Hopfield retrieval): pictures and their weights.

    The greater β, the fewer pictures share the weight.
    """
    held = collection(request)
    model = await held.model(query.model)
    asked, row = await held.query(_parts(query.parts), model)
    retrieved = await held.search(
        lambda: held.index.explain(
            asked, row=row, beta=query.beta, top=query.top, where=query.where or None, model=model
        )
    )
    memories = [
        {
            **schemas.picture(picture.item, whole_path=held.config.local),
            "weight": picture.weight,
            "score": _cosine(picture.score),
        }
        for picture in retrieved.pictures
    ]
    return {
        "model": valid(model.name),
        "beta": retrieved.beta,
        "memory": retrieved.memory,
        "effective": retrieved.effective,
        "agreement": _cosine(retrieved.agreement),
        "memories": memories,
    }


@router.get("/map", response_model=schemas.MapPoints)
async def map_(
    request: Request,
    sample: Annotated[int, Query(ge=2, le=20_000)] = 5000,
    method: Literal["pca", "tsne"] = "pca",
    where: WhereQuery = None,
    model: ModelQuery = None,
) -> Any:
    """A sample of the collection on a plane; t-SNE takes its time, once for each state of the index."""
    held = collection(request)
    asked = await held.model(model)
    revision, (ids, points) = await held.map(
        (asked.name, method, sample, where),
        lambda: held.index.map(sample=sample, method=method, where=where or None, model=asked.name),
    )
    rounded = np.round(np.asarray(points, dtype=np.float64), 4)
    return {
        "model": valid(asked.name),
        "revision": revision,
        "ids": np.asarray(ids).tolist(),
        "x": rounded[:, 0].tolist(),
        "y": rounded[:, 1].tolist(),
    }


@router.post("/embed", response_model=schemas.Embedded)
async def embed(request: Request, query: schemas.EmbedQuery) -> Any:
    """Unit rows of texts and of uploaded pictures."""
    held = collection(request)
    model = await held.model(query.model)
    texts = await asyncio.gather(*(held.row([Part(words=text)], model) for text in query.texts))
    uploads = await asyncio.gather(*(held.row([Part(upload=upload)], model) for upload in query.uploads))
    rows = {"texts": [row.tolist() for row in texts], "uploads": [row.tolist() for row in uploads]}
    return {"model": valid(model.name), "dim": model.dim, **rows}


def _cosine(value: float) -> float:
    return max(-1.0, min(1.0, float(value)))


def _parts(parts: list[WordsPart | ItemPart | UploadPart]) -> list[Part]:
    return [Part(**part.model_dump()) for part in parts]


def _found(held: Collection, revision: int, results: Results) -> dict[str, Any]:
    hits = [
        {
            **schemas.picture(hit.item, whole_path=held.config.local),
            "score": _cosine(hit.score),
            "margin": None if hit.margin is None or not math.isfinite(hit.margin) else float(hit.margin),
        }
        for hit in results.hits
    ]
    return {
        "model": valid(results.model),
        "revision": revision,
        "searched": results.searched,
        "cut": results.cut,
        "hits": hits,
    }


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
    return {
        "label": name,
        "count": len(members),
        "ids": ids[order].tolist(),
        "probabilities": np.round(probabilities[order].astype(np.float64), 4).tolist(),
    }

"""Routes that look for something: search, more like this, classify, explain, the map, embeddings."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Query, Request

from cloob.search.records import Results
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
    model = held.model(query.model)
    row = await held.row(_parts(query.parts), model)
    # Index's own default says how strict the cutoff is; None asks for none.
    options: dict[str, Any] = {} if query.cutoff else {"cutoff": None}
    results = await held.search(
        lambda: held.index.search(row, top=query.top, where=query.where or None, model=model, **options)
    )
    return _found(held, results)


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
    name = held.model(model)
    await held.row([Part(item=id)], name)  # 404 where there is no such picture
    results = await held.search(lambda: held.index.similar(id, top=top, where=where or None, model=name))
    return _found(held, results)


@router.post("/classify", response_model=schemas.Classified)
async def classify(request: Request, query: schemas.ClassifyQuery) -> Any:
    """Sorts all pictures, or those that a filter lets through, by labels in your own words."""
    held = collection(request)
    model = held.model(query.model)
    labels = list(dict.fromkeys(query.labels))
    sorted_ = await held.slow(
        lambda: held.index.classify(
            labels,
            templates=query.templates or None,
            multi=query.multi,
            none=query.none,
            where=query.where or None,
            model=model,
        )
    )
    return {"model": model, "revision": held.index.revision(), **_by_label(sorted_, query.top)}


@router.post("/explain", response_model=schemas.Explained)
async def explain(request: Request, query: schemas.ExplainQuery) -> Any:
    """What the query retrieves from the collection as memory (modern Hopfield retrieval): pictures and their weights.

    The greater β, the fewer pictures share the weight.
    """
    held = collection(request)
    model = held.model(query.model)
    row = await held.row(_parts(query.parts), model)
    retrieved = await held.search(lambda: held.index.explain(row, beta=query.beta, top=query.top, model=model))
    memories = [
        {**schemas.picture(memory.item, whole_path=held.config.local), "weight": memory.weight}
        for memory in retrieved.memories
    ]
    return {"model": model, "beta": retrieved.beta, "effective": retrieved.effective, "memories": memories}


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
    name = held.model(model)
    ids, points = await held.map(
        (name, method, sample, where),
        lambda: held.index.map(sample=sample, method=method, where=where or None, model=name),
    )
    rounded = np.round(np.asarray(points, dtype=np.float64), 4)
    return {
        "model": name,
        "revision": held.index.revision(),
        "ids": np.asarray(ids).tolist(),
        "x": rounded[:, 0].tolist(),
        "y": rounded[:, 1].tolist(),
    }


@router.post("/embed", response_model=schemas.Embedded)
async def embed(request: Request, query: schemas.EmbedQuery) -> Any:
    """Unit rows of texts and of uploaded pictures."""
    held = collection(request)
    model = held.model(query.model)
    texts = [(await held.row([Part(words=text)], model)).tolist() for text in query.texts]
    uploads = [(await held.row([Part(upload=upload)], model)).tolist() for upload in query.uploads]
    return {"model": model, "dim": held.index.model(model).dim, "texts": texts, "uploads": uploads}


def _parts(parts: list[WordsPart | ItemPart | UploadPart]) -> list[Part]:
    return [Part(**part.model_dump()) for part in parts]


def _found(held: Collection, results: Results) -> dict[str, Any]:
    hits = [
        {
            **schemas.picture(hit.item, whole_path=held.config.local),
            "score": max(-1.0, min(1.0, float(hit.score))),
            "margin": None if hit.margin is None or not math.isfinite(hit.margin) else float(hit.margin),
        }
        for hit in results.hits
    ]
    return {
        "model": results.model,
        "revision": held.index.revision(),
        "searched": results.searched,
        "cut": results.cut,
        "hits": hits,
    }


def _by_label(sorted_: Any, top: int) -> dict[str, Any]:
    """The pictures of each label, the surest first."""
    probabilities = np.asarray(sorted_.probabilities, dtype=np.float64)
    ids = np.asarray(sorted_.ids)
    chosen = np.asarray(sorted_.chosen, dtype=bool)
    labels = []
    for column, label in enumerate(sorted_.labels):
        members = np.flatnonzero(chosen[:, column])
        order = members[np.argsort(-probabilities[members, column], kind="stable")][:top]
        labels.append(
            {
                "label": label,
                "count": len(members),
                "ids": ids[order].tolist(),
                "probabilities": np.round(probabilities[order, column], 4).tolist(),
            }
        )
    return {"classified": len(ids), "labels": labels}

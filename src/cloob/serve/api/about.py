"""Routes that say what there is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from cloob.search.records import valid
from cloob.serve.api import schemas
from cloob.serve.api.find import collection

router = APIRouter(tags=["about"])


@router.get("/health", response_model=schemas.Health)
async def health(request: Request) -> Any:
    """That the server is there, and in which state the index is: ``revision`` grows with each change."""
    held = collection(request)
    pictures, revision, models = await held.search(
        lambda: (len(held.index), held.index.revision(), [valid(model.name) for model in held.index.models])
    )
    return {"status": "ok", "pictures": pictures, "revision": revision, "models": models}


@router.get("/models", response_model=list[schemas.ModelAnswer])
async def models(request: Request) -> Any:
    """The models whose vectors the index holds; the first is asked where a query names none."""
    held = collection(request)
    return [{"name": valid(model.name), "dim": model.dim} for model in await held.models()]

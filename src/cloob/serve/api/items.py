"""Routes to the pictures themselves, by id alone: a path is never taken from a request."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, File, Query, Request, Response, UploadFile

from cloob.errors import InputError
from cloob.pictures import Unreadable
from cloob.search.records import valid
from cloob.search.where import NUMBERS, TEXTS, parse
from cloob.serve.api import schemas
from cloob.serve.api.find import IdPath, WhereQuery, collection
from cloob.serve.collection import Collection, Gone
from cloob.serve.uploads import TooLarge, Unsupported

router = APIRouter(tags=["pictures"])
Responses = dict[int | str, dict[str, Any]]
_KINDS = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n", "image/png"),
    (b"GIF8", "image/gif"),
)
_JPEG: Responses = {200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}}
_ANY: Responses = {200: {"content": {"image/*": {}, "application/octet-stream": {}}}}


@router.get("/items", response_model=list[schemas.Picture])
async def items(
    request: Request,
    id: Annotated[list[Annotated[int, Query(ge=1, le=2**53 - 1)]], Query(min_length=1, max_length=200)],
) -> Any:
    """What is known of some pictures, in the order asked for; those that are not there are left out."""
    held = collection(request)
    found = await held.search(lambda: held.index.items(id))
    return [schemas.picture(item, whole_path=held.config.local) for item in found]


@router.get("/ids", response_model=schemas.Ids)
async def ids(request: Request, where: WhereQuery = None) -> Any:
    """The ids of all pictures, or of those that a filter lets through."""
    held = collection(request)
    revision, found = await held.search(lambda: (held.index.revision(), _ids(held, where)))
    return {"revision": revision, "ids": found}


@router.get("/columns", response_model=list[schemas.Column])
async def columns(request: Request) -> Any:
    """What a filter can name."""
    held = collection(request)
    others = await held.search(held.index.columns)
    own = dict.fromkeys(TEXTS, "text") | dict.fromkeys(NUMBERS, "number") | {"date": "date"}
    return [{"name": valid(name), "kind": kind} for name, kind in {**own, **others}.items()]


@router.get("/items/{id}", response_model=schemas.Picture)
async def item(request: Request, id: IdPath) -> Any:
    """What is known of a picture."""
    held = collection(request)
    found = await held.search(lambda: held.index.items([id]))
    if not found:
        raise Gone(f"no picture {id}")
    return schemas.picture(found[0], whole_path=held.config.local)


@router.get("/items/{id}/thumbnail", response_class=Response, responses=_JPEG)
async def thumbnail(
    request: Request,
    id: IdPath,
    size: Annotated[int, Query(ge=64, le=1024, multiple_of=64, description="Longer side, pixels.")] = 256,
) -> Response:
    """A small JPEG of a picture, upright and without metadata."""
    held = collection(request)
    kept = _kept(f"{await _content(held, id)}-{size}")
    if request.headers.get("if-none-match") == kept["etag"]:
        return Response(status_code=304, headers=kept)
    try:
        data = await held.files(lambda: held.index.thumbnail(id, size))
    except (InputError, OSError, Unreadable):
        raise Gone(f"the file of picture {id} is not there or has changed; cloob index brings it up to date") from None
    return Response(data, media_type="image/jpeg", headers=kept)


@router.get("/items/{id}/picture", response_class=Response, responses=_ANY)
async def picture(request: Request, id: IdPath) -> Response:
    """A picture as its file has it; a format that browsers do not show comes as a download."""
    held = collection(request)
    headers = _kept(await _content(held, id))
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    try:
        data = await held.files(lambda: held.index.picture(id))
    except (InputError, OSError, Unreadable):
        raise Gone(f"the file of picture {id} is not there or has changed; cloob index brings it up to date") from None
    kind = _kind(data)
    if kind == "application/octet-stream":
        headers["content-disposition"] = "attachment"
    return Response(data, media_type=kind, headers=headers)


@router.post("/uploads", response_model=schemas.UploadAnswer)
async def upload(request: Request, file: Annotated[UploadFile, File(description="A picture.")]) -> Any:
    """Takes a picture to search with; it is embedded, and only its vectors and a thumbnail are kept, in memory."""
    held = collection(request)
    data = await file.read(held.config.max_upload_bytes + 1)
    try:
        added = await held.add_upload(data)
    except (Unsupported, TooLarge) as error:
        raise type(error)(f"{valid(PurePath(file.filename or '').name)[:100]}: {error}") from None
    return {"upload": added.id, "width": added.width, "height": added.height}


@router.get("/uploads/{id}/thumbnail", response_class=Response, responses=_JPEG)
async def upload_thumbnail(request: Request, id: str) -> Response:
    """A small JPEG of an uploaded picture."""
    held = collection(request).uploads.get(id)
    if held is None:
        raise Gone("the uploaded picture is no longer held; upload it again")
    return Response(held.thumbnail, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})


def _ids(held: Collection, where: str | None) -> list[int]:
    filter_ = parse(where, held.index.columns()) if where else None
    ids: list[int] = held.index.store.ids(filter_).tolist()
    return ids


async def _content(held: Collection, id_: int) -> str:
    found = await held.search(lambda: held.index.items([id_]))
    if not found:
        raise Gone(f"no picture {id_}")
    return str(found[0].content[:32])


def _kept(tag: str) -> dict[str, str]:
    """A browser may keep it, and asks each time: the next index has another picture under the same address."""
    return {"etag": f'"{tag}"', "cache-control": "private, no-cache"}


def _kind(data: bytes) -> str:
    """The media type by the first bytes, of what browsers show and no script can hide in."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "image/avif"
    return next((kind for magic, kind in _KINDS if data.startswith(magic)), "application/octet-stream")

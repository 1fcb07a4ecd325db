"""The words of the API: what goes in and what comes out.

Scores are cosines in [-1, 1], weights and probabilities shares of 1.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

# JSON has one kind of number: 3.0 is an integer. After `Field`, or the description of
# the API loses the bounds.
Integer = BeforeValidator(
    lambda value: (
        int(value) if isinstance(value, float) and value.is_integer() else value
    )
)
Id = Annotated[int, Field(ge=1, le=2**53 - 1, examples=[17]), Integer]
Where = Annotated[
    str, Field(max_length=2000, examples=["date >= '2024' and caption like '%dog%'"])
]
Top = Annotated[int, Field(ge=1, le=1000, examples=[50]), Integer]
Label = Annotated[str, Field(min_length=1, max_length=200, examples=["bird", "flower"])]
Template = Annotated[str, Field(max_length=200, examples=["a picture of a {c}"])]
Words = Annotated[str, Field(min_length=1, max_length=1000, examples=["a red bird"])]
UploadId = Annotated[
    str, Field(pattern=r"^[0-9a-f]{32}$", examples=["0123456789abcdef0123456789abcdef"])
]
Margin = Annotated[
    float,
    Field(ge=-100, le=100, description="Needs multi or none.", examples=[1.75]),
]
_KINDS = ("words", "item", "upload")


class _Question(BaseModel):
    # Strict: neither `true` nor "3" is a number.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Part(_Question):
    """Words, a picture of the index, or an uploaded one, that answers should fit
    (weight > 0) or should not (< 0).
    """

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [kind]} for kind in _KINDS]}
    )

    words: Words | SkipJsonSchema[None] = None
    item: Id | SkipJsonSchema[None] = None
    upload: UploadId | SkipJsonSchema[None] = None
    weight: Annotated[float, Field(ge=-10, le=10, examples=[1.0, -0.5])] = 1.0

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        named_kinds = [
            getattr(self, kind) for kind in _KINDS if kind in self.model_fields_set
        ]
        if len(named_kinds) != 1 or named_kinds[0] is None:
            raise ValueError("needs one of words, item or upload")
        return self


Parts = Annotated[list[Part], Field(min_length=1, max_length=16)]


class SearchQuery(_Question):
    """What to look for; ``cutoff`` leaves out what fits no better than unrelated
    queries do.
    """

    parts: Parts
    where: Where | None = None
    top: Top = 50
    cutoff: bool = True


class ClassifyQuery(_Question):
    """Labels to sort by: one a picture, with ``multi`` all that fit, with ``none``
    perhaps none.

    A label fits from a margin of ``cutoff`` above unrelated words.
    """

    labels: Annotated[list[Label], Field(min_length=1, max_length=200)]
    templates: Annotated[list[Template], Field(max_length=100)] = []
    multi: bool = False
    none: bool = False
    cutoff: Margin | SkipJsonSchema[None] = None
    where: Where | None = None
    top: Top = 100


class Month(TypedDict):
    """``month`` is ``2024-05``, or what is known of the date, or None without one."""

    month: str | None
    count: int


class Months(TypedDict):
    revision: int
    months: list[Month]


class Picture(TypedDict):
    """A picture of the index; of ``columns``, an integer beyond 2^53 is text, as
    JavaScript would round it.
    """

    id: int
    name: str
    path: str
    caption: str | None
    date: str | None
    width: int
    height: int
    bytes: int
    columns: dict[str, str | int | float | bool | None]


class FoundPicture(Picture):
    """A hit; ``margin`` is None where the index is too small to tell."""

    score: float
    margin: float | None


class Found(TypedDict):
    """Pictures, best first; ``cut`` of the nearest were left out since unrelated
    queries reach as much.
    """

    model: str
    revision: int
    searched: int
    cut: int
    hits: list[FoundPicture]


class LabelPictures(TypedDict):
    """The surest pictures of a label; ``margins`` with ``multi`` or ``none`` alone.

    Of 'none of these', the margins are those of the best label.
    """

    label: str
    count: int
    ids: list[int]
    probabilities: list[float]
    margins: list[float] | None


class Classified(TypedDict):
    """Labels in the order of the request; 'none of these' last."""

    model: str
    revision: int
    classified: int
    labels: list[LabelPictures]

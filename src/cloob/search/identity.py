"""Which vectors may lie side by side: those of the same weights that were made in the same way.

An index keeps a model's fingerprint, and behind it a mark for each way in which its vectors are made otherwise than
``cloob.load_model`` would: ``bf16``, the image tower under autocast to bfloat16, and ``draft``, large JPEG files
decoded at a half, a quarter or an eighth of their size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from cloob.errors import InputError
from cloob.search.records import IndexedModel

Precision = Literal["fp32", "bf16"]


class ModelChanged(InputError):  # noqa: N818 - what happened, in the words a user reads
    """The weights behind a model's name are others than those that an index has vectors of."""


def changed(model: IndexedModel, address: str) -> ModelChanged:
    """Says that a model is not the one that an index has vectors of."""
    return ModelChanged(
        f"{model.name}: has other weights or another preprocessing or precision than when {address} was indexed "
        f"({model.spec}); cloob index --model M --out {address} "
        "with --replace-model makes its vectors anew, with --name NAME keeps both"
    )


@dataclass(frozen=True)
class Making:
    """Settings that change the vectors of a model.

    Attributes:
        precision: Of the image tower's matrix products.
        draft: Whether large JPEG files are decoded smaller.
    """

    precision: Precision = "fp32"
    draft: bool = False

    @classmethod
    def of(cls, fingerprint: str) -> Self:
        """Those of an index's vectors."""
        marks = fingerprint.split("+")[1:]
        return cls("bf16" if "bf16" in marks else "fp32", "draft" in marks)

    def mark(self, fingerprint: str) -> str:
        """The fingerprint of a model's weights with the marks behind it."""
        return fingerprint + "+bf16" * (self.precision == "bf16") + "+draft" * self.draft


def weights_of(fingerprint: str) -> str:
    """The fingerprint of a model's weights, without the marks."""
    return fingerprint.partition("+")[0]

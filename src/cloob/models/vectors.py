"""Two heads for vectors of two kinds: rows of numbers in, unit rows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.heads.head import AnyHead as AnyHead
from cloob.heads.head import Heads as Heads
from cloob.heads.head import head_of
from cloob.models.encoder import EncoderConfig, Model, ModelFiles
from cloob.models.runs import HEADS_FILE, VECTORS_FILE
from cloob.models.weights.containers import read_safetensors
from cloob.models.weights.keymap import fill

if TYPE_CHECKING:  # it brings pyarrow
    from cloob.data.table import Encoding, Encodings, Matrix
    from cloob.data.vectors import VectorPairs

Side = Literal["a", "b"]
_OF_PICTURES = (
    "encode_image",
    "encode_text",
    "preprocess",
    "tokenizer",
    "image_size",
    "context_length",
    "mean",
    "std",
)
MAX_NUMBERS = 1 << 26  # of rows that are embedded together


class RowsError(InputError, AttributeError):
    """A model of vectors takes no picture and no text."""


class VectorEncoder(Model):
    """Two heads, or CLOOME's towers: rows of numbers in, unit rows out."""

    def __init__(
        self,
        a: AnyHead,
        b: AnyHead,
        objective: dict[str, object] | None = None,
        encodings: Encodings = (None, None),
    ) -> None:
        embed_dim: int = a.options["embed_dim"]
        config = EncoderConfig("vectors", embed_dim, 0, {"format": 1})
        super().__init__("vectors", config, objective)
        self.model = nn.ModuleDict({"a": a, "b": b})
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PICTURES:
            raise RowsError(
                "a model of vectors takes no pictures and texts, but rows: --a, --b,"
                " encode_a, encode_b"
            )
        return super().__getattr__(name)

    @property
    def heads(self) -> Heads:
        a, b = self.model.values()
        return cast(Heads, (a, b))

    def check_weights(self) -> None:
        """As ``Model.check_weights``, for towers of another program."""
        if not all(isinstance(head, AnyHead) for head in self.heads):
            raise InputError("these towers can be used, but not trained or stored anew")

    def files(self, *_: object) -> ModelFiles:
        content: dict[str, object] = {"format": 1}
        content |= {side: head.options for side, head in self.model.items()}
        if self.encodings != (None, None):
            content["tables"] = [_table_content(table) for table in self.encodings]
        return ModelFiles(VECTORS_FILE, content, HEADS_FILE, self.model.state_dict())

    def numbers(self, side: Side, rows: object) -> Any:
        """The matrix that a side's head takes, of a table the columns as the training
        rows say; InputError for one that lacks a column.
        """
        if isinstance(rows, np.ndarray | Tensor):
            return rows
        from cloob.data.table import Table, Unencoded, is_table

        if isinstance(rows, Unencoded):
            table = rows
        elif is_table(rows):
            table = Table.of(side, rows)
        else:
            return rows
        encoding_a, encoding_b = self.encodings
        return table.numbers(encoding_a if side == "a" else encoding_b)

    def encode_a(self, rows: object, *, batch_size: int = 4096) -> Tensor:
        """Embeds vectors of the first kind, without a gradient.

        Mode (train, eval) is the caller's.

        Args:
            rows: (n, F) numbers of any type, also a memory-mapped array or scipy's
                sparse rows; or a data frame or table of Arrow with the columns of the
                training's table.
            batch_size: Rows that go through the head at once.

        Returns:
            (n, D) float32 unit rows.

        Raises:
            InputError: Rows of another width, or a table of other columns.
        """
        return self.encode("a", rows, batch_size)

    def encode_b(self, rows: object, *, batch_size: int = 4096) -> Tensor:
        """As ``encode_a``, of the second kind."""
        return self.encode("b", rows, batch_size)

    @torch.no_grad()
    def encode(self, side: Side, rows: object, batch_size: int = 4096) -> Tensor:
        """As ``encode_a``, of a side."""
        from cloob.data.rows import as_numbers

        matrix: Matrix | Tensor = self.numbers(side, rows)
        head = self.model[side]
        width = head.options["features"]
        if matrix.ndim != 2 or matrix.shape[1] != width:
            raise InputError(
                f"{side}: its head takes an array (n, {width}), not"
                f" {tuple(matrix.shape)}"
            )
        step = _rows_at_once(batch_size, width)
        parts = [torch.zeros(0, self.embed_dim, device=self.device)]
        for start in range(0, matrix.shape[0], step):
            block = as_numbers(matrix[start : start + step])
            if self.device.type == "mps":  # which has no float64
                block = block.float()
            parts.append(F.normalize(head(block.to(self.device)), dim=1))
        return torch.cat(parts)


def _table_content(encoding: Encoding | None) -> dict[str, object] | None:
    """How a table becomes numbers, for JSON; InputError for a pipeline of code."""
    if encoding is None:
        return None
    if not is_dataclass(encoding):
        raise InputError(
            f"{type(encoding).__name__}: a pipeline is code, which no model folder"
            " keeps: joblib.dump of the estimator is for yourself; heads that are"
            " fitted to what the pipeline gives can be saved"
        )
    return asdict(encoding)


def _rows_at_once(most: int, width: int) -> int:
    """Rows that are numbers in memory together: fewer of a million columns."""
    return max(1, min(most, MAX_NUMBERS // width))


def read_heads(folder: Path, options: Mapping[str, Any], sides: Sequence[str]) -> Heads:
    """The heads of a model folder."""
    with torch.device("meta"):  # no memory before the file of weights has it
        heads = nn.ModuleDict({side: head_of(options[side]) for side in sides})
    weights = folder / HEADS_FILE
    fill(heads, weights, read_safetensors(weights))
    first, second = heads.values()
    return cast(Heads, (first, second))


def require_vectors(encoder: Model) -> VectorEncoder:
    """The model; InputError where it is none of vectors."""
    if not isinstance(encoder, VectorEncoder):
        raise InputError(
            f"{encoder.name}: is no model of vectors; --a and --b are for runs of"
            " `cloob train vectors`"
        )
    return encoder


def embed_rows(encoder: Model, side: Side, rows: object) -> Tensor:
    """The (n, D) unit rows of vectors of one side, on the CPU."""
    return require_vectors(encoder).encode(side, rows).cpu()


def embed_pairs(encoder: Model, pairs: VectorPairs) -> tuple[Tensor, Tensor]:
    """The (N, D) unit rows of both sides of all pairs, on the CPU."""
    pairs = pairs.encoded(require_vectors(encoder).encodings)
    size = _rows_at_once(4096, max(pairs.a.shape[1], pairs.b.shape[1]))
    rows_of_a, rows_of_b = [], []
    for start in range(0, len(pairs), size):
        a, b = pairs.batch(slice(start, start + size)).parts
        rows_of_a.append(embed_rows(encoder, "a", a))
        rows_of_b.append(embed_rows(encoder, "b", b))
    return torch.cat(rows_of_a), torch.cat(rows_of_b)

"""Heads with their frozen encoders, or for vectors of two kinds, as one
``DualEncoder``; and their model folders.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.heads.head import AnyHead, head_of
from cloob.models.aligned.encoders import (
    VERSION,
    FeatureMemory,
    ImageEncoder,
    LoadModel,
    TextEncoder,
    TowerText,
    open_image_encoder,
    open_text_encoder,
)
from cloob.models.encoder import DualEncoder, EncoderConfig, weights_digest
from cloob.models.runs import ALIGNED_FILE, HEADS_FILE, VECTORS_FILE
from cloob.models.tokenizer import describe
from cloob.models.weights.containers import read_safetensors
from cloob.models.weights.keymap import Towers, fill

if TYPE_CHECKING:  # it brings pyarrow
    from cloob.data.table import Matrix
    from cloob.data.vectors import VectorPairs

# names and contents of configuration and weights
ModelFiles = tuple[str, dict[str, Any], str, dict[str, Tensor]]
_SIDES = ("image", "text")
Side = Literal["a", "b"]
_OF_PICTURES = (
    "preprocess",
    "tokenizer",
    "image_size",
    "context_length",
    "mean",
    "std",
)
_PROBE_TEXT, _PROBE_WIDTH = "A photo of 2 Dogs & a cat.", 64
MAX_NUMBERS = 1 << 26  # of rows that are embedded together
_SAME = 0.01  # distance of unit features that machines' rounding stays below


class AlignedEncoder(DualEncoder):
    """A ``DualEncoder`` with frozen encoders."""

    memories: tuple[FeatureMemory, FeatureMemory] | None = (
        None  # features that need not be computed again
    )

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``, but for the encoders: training mode would move the
        statistics of their norms.
        """
        super().train(mode)
        self.model.visual.eval()
        self.model.text.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.features_of("image", images), self.features_of("text", tokens)

    def encoder_keys(self) -> tuple[str, str]:
        """Names of both encoders by what decides over their features; kinds of devices
        round differently.
        """
        visual, words = self.model.visual, self.model.text
        image = [weights_digest(visual), repr(visual), self.preprocess_cfg]
        text = [
            weights_digest(words),
            repr(words),
            self.context_length,
            [*words.settings, describe(words.tokenizer)],
        ]
        keys = (
            json.dumps([VERSION, self.device.type, parts], sort_keys=True)
            for parts in (image, text)
        )
        of_images, of_texts = (
            hashlib.blake2b(key.encode(), digest_size=6).hexdigest() for key in keys
        )
        return of_images, of_texts

    def features_of(self, side: Literal["image", "text"], batch: Tensor) -> Tensor:
        """(n, F) features of pictures or tokens by the frozen encoder of a side."""
        batch = batch.to(self.device)
        if side == "image":
            pixels = (batch.float() / 255 - self._mean) / self._std
            features: Tensor = self.model.visual(
                pixels.contiguous(memory_format=torch.channels_last)
            )
        else:
            features = self.model.text(batch)
        return features.float()

    def _image_features(self, images: Tensor) -> Tensor:
        if self.memories is None or images.dtype != torch.uint8:
            return super()._image_features(images)
        features = self.memories[0].features(images, partial(self.features_of, "image"))
        return F.normalize(self.model.image_head(features.to(self.device)), dim=1)

    def _text_features(self, tokens: Tensor) -> Tensor:
        if self.memories is None:
            return super()._text_features(tokens)
        features = self.memories[1].features(tokens, partial(self.features_of, "text"))
        return F.normalize(self.model.text_head(features.to(self.device)), dim=1)


def aligned_encoder(
    image: ImageEncoder,
    text: TextEncoder | TowerText,
    image_head: AnyHead,
    text_head: AnyHead,
    names: dict[str, str],
    objective: dict[str, Any] | None = None,
) -> AlignedEncoder:
    """Both encoders and their heads as one; ``names`` has ``image_encoder`` and
    ``text_encoder`` as they were typed.
    """
    settings = {**names, "image_size": image.preprocess_cfg["size"]}
    config = EncoderConfig(
        "aligned", image_head.options["embed_dim"], text.context_length, settings
    )
    name = "+".join(
        Path(names[f"{side}_encoder"].rpartition(":")[2]).name for side in _SIDES
    )
    towers = Towers(image, text, math.log(1 / 0.07), (image_head, text_head))
    return AlignedEncoder(name, towers, text.tokenizer, config, objective)


def heads_files(encoder: DualEncoder) -> ModelFiles:
    """Heads on frozen encoders have those by name alone."""
    assert isinstance(encoder, AlignedEncoder)
    aligned = encoder.config.kind == "aligned"
    sides = _SIDES if aligned else ("a", "b")
    heads = dict(zip(sides, encoder.heads, strict=True))
    options = {side: head.options for side, head in heads.items()}
    weights = nn.ModuleDict(heads).state_dict()
    content = dict(encoder.config.settings)
    if aligned:
        content |= {"heads": options, "probe": _rounded_probe(encoder)}
        return ALIGNED_FILE, content, HEADS_FILE, weights
    content |= options
    if isinstance(encoder, VectorEncoder) and encoder.encodings != (None, None):
        content["tables"] = [table_content(one) for one in encoder.encodings]
    return VECTORS_FILE, content, HEADS_FILE, weights


def _rounded_probe(encoder: AlignedEncoder) -> dict[str, list[float]]:
    rows = _probe(encoder)
    return {side: [round(x, 6) for x in rows[side].tolist()] for side in _SIDES}


def table_content(encoding: Any) -> dict[str, Any] | None:
    """How a table becomes numbers, for JSON; InputError for a pipeline of code."""
    if encoding is None:
        return None
    if not is_dataclass(encoding):
        raise InputError(
            f"{type(encoding).__name__}: a pipeline is code, which no model folder"
            " keeps: joblib.dump of the estimator is for yourself; heads that are"
            " fitted to what the pipeline gives can be saved"
        )
    return asdict(encoding)  # type: ignore[arg-type]


def read_heads(
    folder: Path, options: Mapping[str, Any], sides: Sequence[str]
) -> tuple[AnyHead, AnyHead]:
    """The heads of a model folder."""
    with torch.device("meta"):  # no memory before the file of weights has it
        heads = nn.ModuleDict({side: head_of(options[side]) for side in sides})
    fill(heads, folder / HEADS_FILE, read_safetensors(folder / HEADS_FILE))
    first, second = heads.values()
    return cast(tuple[AnyHead, AnyHead], (first, second))


def load_aligned(
    folder: Path,
    config: dict[str, Any],
    objective: dict[str, Any],
    load_model: LoadModel,
) -> AlignedEncoder:
    """Opens frozen encoders and their trained heads; refuses encoders that give other
    features than in training.
    """
    names = {f"{side}_encoder": str(config[f"{side}_encoder"]) for side in _SIDES}
    image = open_image_encoder(names["image_encoder"], load_model, config["image_size"])
    text = open_text_encoder(names["text_encoder"], load_model)
    heads = read_heads(folder, config["heads"], _SIDES)
    encoder = aligned_encoder(image, text, *heads, names, objective)
    rows = _probe(encoder)
    for side in _SIDES:
        known = torch.tensor(config["probe"][side])
        if not torch.linalg.vector_norm(rows[side] - known) <= _SAME:
            raise InputError(
                f"{folder / ALIGNED_FILE}: its {side} head was trained on"
                f" {names[f'{side}_encoder']!r}, which gives other features now: its"
                " weights, tokenizer, pooling, layers or pixels changed"
            )
    return encoder


def _probe(encoder: AlignedEncoder) -> dict[str, Tensor]:
    """Unit features of one picture and one text: they tell other weights, another
    tokenizer, pooling, activation or pixels.
    """
    size = encoder.image_size
    picture = (
        (torch.arange(3 * size * size) % 251).to(torch.uint8).view(1, 3, size, size)
    )
    rows = encoder.features(picture, encoder.tokenizer([_PROBE_TEXT]))
    return {
        side: F.normalize(row[0, :_PROBE_WIDTH].cpu(), dim=0)
        for side, row in zip(_SIDES, rows, strict=True)
    }


class RowsError(InputError, AttributeError):
    """A model of vectors takes no picture and no text."""


class VectorEncoder(AlignedEncoder):
    """Two heads without encoders: rows of numbers in, unit rows out; it trains and is
    stored as a ``DualEncoder``.
    """

    def __init__(
        self,
        a: AnyHead,
        b: AnyHead,
        objective: dict[str, Any] | None = None,
        encodings: tuple[Any, Any] = (None, None),
    ) -> None:
        nn.Module.__init__(self)  # a DualEncoder's asks for towers
        self.name = "vectors"
        self.model = nn.Module()
        self.model.visual, self.model.text = nn.Identity(), nn.Identity()
        # as an ``AlignedEncoder`` calls them: a stands first
        self.model.image_head, self.model.text_head = (
            a,
            b,
        )
        self.embed_dim: int = a.options["embed_dim"]
        self.config = EncoderConfig("vectors", self.embed_dim, 0, {"format": 1})
        self.objective_config = objective or {}
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PICTURES:
            raise RowsError(
                "a model of vectors takes no pictures and texts, but rows: --a, --b,"
                " encode_a, encode_b"
            )
        return super().__getattr__(name)

    def check_weights(self) -> None:
        """As ``DualEncoder.check_weights``, for towers of another program."""
        if not all(isinstance(head, AnyHead) for head in self.heads):
            raise InputError("these towers can be used, but not trained or stored anew")

    def numbers(self, side: Side, rows: Any) -> Any:
        """The matrix that a side's head takes, of a table the columns as the training
        rows say; InputError for one that lacks a column.
        """
        if isinstance(rows, np.ndarray | Tensor):
            return rows
        from cloob.data.table import Table, Unencoded, is_table

        if is_table(rows) and not isinstance(rows, Unencoded):
            rows = Table.of(side, rows)
        if isinstance(rows, Unencoded):
            rows = rows.numbers(self.encodings["ab".index(side)])
        return rows

    def encode_a(self, rows: Any, *, batch_size: int = 4096) -> Tensor:
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
        return self._encode(self.numbers("a", rows), 0, batch_size)

    def encode_b(self, rows: Any, *, batch_size: int = 4096) -> Tensor:
        """As ``encode_a``, of the second kind."""
        return self._encode(self.numbers("b", rows), 1, batch_size)

    @torch.no_grad()
    def _encode(self, rows: Matrix | Tensor, side: int, batch_size: int) -> Tensor:
        """(n, embed_dim) unit rows of a side's head, for features in blocks."""
        from cloob.data.rows import as_numbers

        head = self.heads[side]
        width = head.options["features"]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InputError(
                f"{'ab'[side]}: its head takes an array (n, {width}), not"
                f" {tuple(rows.shape)}"
            )
        batch_size = rows_at_once(batch_size, width)
        parts = [torch.zeros(0, self.embed_dim, device=self.device)]
        for start in range(0, rows.shape[0], batch_size):
            block = as_numbers(rows[start : start + batch_size])
            if self.device.type == "mps":  # which has no float64
                block = block.float()
            block = block.to(self.device)
            parts.append(F.normalize(head(block), dim=1))
        return torch.cat(parts)


def with_heads(encoder: AlignedEncoder, a: AnyHead, b: AnyHead) -> AlignedEncoder:
    """The same encoders, or none, with other heads."""
    if isinstance(encoder, VectorEncoder):
        return VectorEncoder(a, b, encoder.objective_config, encoder.encodings)
    names = {
        key: str(encoder.config.settings[key])
        for key in ("image_encoder", "text_encoder")
    }
    return aligned_encoder(
        encoder.model.visual, encoder.model.text, a, b, names, encoder.objective_config
    )


def check_vectors(encoder: Any) -> VectorEncoder:
    """The model; InputError where it is none of vectors."""
    if not isinstance(encoder, VectorEncoder):
        raise InputError(
            f"{encoder.name}: is no model of vectors; --a and --b are for runs of"
            " `cloob train vectors`"
        )
    return encoder


def embed_rows(encoder: Any, side: Side, rows: Any) -> Tensor:
    """The (n, D) unit rows of vectors of one side, on the CPU."""
    model = check_vectors(encoder)
    encode = model.encode_a if side == "a" else model.encode_b
    return encode(rows).cpu()


def rows_at_once(most: int, width: int) -> int:
    """Rows that are numbers in memory together: fewer of a million columns."""
    return max(1, min(most, MAX_NUMBERS // width))


def embed_pairs(encoder: Any, pairs: VectorPairs) -> tuple[Tensor, Tensor]:
    """The (N, D) unit rows of both sides of all pairs, on the CPU."""
    pairs = pairs.encoded(check_vectors(encoder).encodings)
    size = rows_at_once(4096, max(pairs.a.shape[1], pairs.b.shape[1]))
    rows_of_a, rows_of_b = [], []
    for start in range(0, len(pairs), size):
        a, b, _ = pairs.batch(np.arange(start, min(start + size, len(pairs))))
        rows_of_a.append(embed_rows(encoder, "a", a))
        rows_of_b.append(embed_rows(encoder, "b", b))
    return torch.cat(rows_of_a), torch.cat(rows_of_b)

"""An ONNX folder: what ``onnx.json`` says, and the encoder that runs its graphs.

::

    onnx.json        format, name, sizes, preprocess_cfg, tokenizer
    image.onnx       pixel_values float32 (n, 3, H, W), normalised -> image_embeds float32 (n, D), unit rows
    text.onnx        input_ids int64 (n, L), or (n, L') for L' ≤ L without padding -> text_embeds float32 (n, D)
    tokenizer.json   for the package tokenizers; spiece.model for rinna's
    objective.json   as in every model folder
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.onnx.graph import EXTERNAL, FLOAT, INT64, Port, check_graph
from cloob.models.onnx.pixels import ShortestTransform
from cloob.models.onnx.tokens import read_tokenizer
from cloob.models.onnx.towers import GraphImages, GraphTexts
from cloob.models.runs import ONNX_FILE
from cloob.models.weights.blocks import Towers
from cloob.models.weights.formats.fields import Fields

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
IMAGE_FILE, TEXT_FILE = "image.onnx", "text.onnx"
PIXELS, TOKENS = "pixel_values", "input_ids"
IMAGE_ROWS, TEXT_ROWS = "image_embeds", "text_embeds"
_LARGEST_IMAGE, _LONGEST_TEXT = 4096, 1 << 16


class OnnxEncoder(DualEncoder):
    """A ``DualEncoder`` whose towers are graphs on onnxruntime: it embeds and does not train."""

    def _make_preprocess(self) -> Callable[[Image], Tensor]:
        if ShortestTransform.suits(self.preprocess_cfg):  # without open_clip, whose import takes seconds
            return ShortestTransform(self.preprocess_cfg)
        return super()._make_preprocess()

    def check_weights(self) -> None:
        """Raises InputError: there are none that anything could be done with."""
        raise InputError(f"{self.name}: an ONNX export embeds and does no more; give the model that it was made of")

    def _dtype(self) -> torch.dtype:
        return torch.float32

    def _autograd(self, wanted: bool) -> AbstractContextManager[None]:
        if wanted:
            raise ValueError("grad=True: an ONNX export has no gradient; load the model that it was made of")
        return super()._autograd(wanted)


def image_ports(image_size: int, embed_dim: int) -> tuple[Port, Port]:
    """Input and output of the image tower's graph."""
    return Port(PIXELS, FLOAT, (None, 3, image_size, image_size)), Port(IMAGE_ROWS, FLOAT, (None, embed_dim))


def text_ports(length: int | None, embed_dim: int) -> tuple[Port, Port]:
    """Input and output of the text tower's graph; ``length`` is None where any up to L goes."""
    return Port(TOKENS, INT64, (None, length)), Port(TEXT_ROWS, FLOAT, (None, embed_dim))


def fingerprint(folder: Path) -> str:
    """A hash of both graphs: what the cache of embeddings knows a loaded encoder by."""
    digest = hashlib.sha256()
    for name in (IMAGE_FILE, TEXT_FILE):
        for path in (folder / name, folder / f"{name}{EXTERNAL}"):
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_config(
    folder: Path, encoder: DualEncoder, *, precision: str, pad: int | None, tokenizer: dict[str, Any]
) -> None:
    """Writes ``onnx.json`` beside the graphs.

    Args:
        folder: With both graphs.
        encoder: What they were made of.
        precision: ``"float32"`` or ``"int8"``.
        pad: The padding that texts may come without; None: the graph takes L tokens alone.
        tokenizer: From :func:`cloob.models.onnx.tokens.store_tokenizer`.
    """
    content = {
        "format": FORMAT,
        "name": encoder.name,
        "embed_dim": encoder.embed_dim,
        "context_length": encoder.context_length,
        "logit_scale": float(encoder.model.logit_scale.detach()),
        "precision": precision,
        "pad": pad,
        "preprocess_cfg": encoder.preprocess_cfg,
        "tokenizer": tokenizer,
        "fingerprint": fingerprint(folder),
    }
    (folder / ONNX_FILE).write_text(json.dumps(content, indent=2, allow_nan=False), encoding="utf-8")


def load(folder: Path, content: dict[str, Any], objective: dict[str, Any]) -> OnnxEncoder:
    """The encoder of such a folder; its graphs are opened when they are first used.

    Args:
        folder: The model folder.
        content: What its ``onnx.json`` says.
        objective: What its ``objective.json`` says.

    Raises:
        InputError: A file is missing, damaged, not to be trusted or does not fit the others.
    """
    where = folder / ONNX_FILE
    fields = Fields(where, content)
    fields.integer("format", least=FORMAT, most=FORMAT)
    dim = fields.integer("embed_dim")
    length = fields.integer("context_length", least=2, most=_LONGEST_TEXT)
    precision = fields.one_of("precision", ("float32", "int8"))
    pad = fields.integer("pad", least=0) if content.get("pad") is not None else None
    preprocess = _preprocess(fields.inside("preprocess_cfg"))
    for name in (IMAGE_FILE, TEXT_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name} beside {ONNX_FILE}")
    check_graph(folder / IMAGE_FILE, *image_ports(preprocess["size"], dim))
    check_graph(folder / TEXT_FILE, *text_ports(None if pad is not None else length, dim))
    images = GraphImages(folder / IMAGE_FILE, PIXELS, IMAGE_ROWS, preprocess)
    texts = GraphTexts(folder / TEXT_FILE, TOKENS, TEXT_ROWS, pad)
    towers = Towers(images, texts, fields.number("logit_scale", positive=False))
    tokenizer = read_tokenizer(folder, fields.inside("tokenizer"), length)
    settings = {"precision": precision, "pad": pad, "fingerprint": str(content.get("fingerprint", ""))[:64]}
    config = EncoderConfig("onnx", dim, length, settings)
    return OnnxEncoder(str(content.get("name", folder.name)), towers, tokenizer, config, objective)


def _preprocess(fields: Fields) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``, each part checked."""
    fill = fields.values.get("fill_color", 0)
    if type(fill) is not int or not 0 <= fill <= 255:
        raise fields.wrong("fill_color", "a whole number from 0 to 255")
    return {
        "size": fields.integer("size", most=_LARGEST_IMAGE),
        "mode": fields.one_of("mode", ("RGB",), "RGB"),
        "mean": fields.channels("mean"),
        "std": fields.channels("std", positive=True),
        "interpolation": fields.one_of("interpolation", ("bicubic", "bilinear", "lanczos"), "bicubic"),
        "resize_mode": fields.one_of("resize_mode", ("shortest", "longest", "squash"), "shortest"),
        "fill_color": fill,
    }

"""An ONNX folder (:mod:`cloob.models.onnx.contents`): written, and read as the encoder that runs its graphs."""

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
from cloob.models.onnx.contents import FORMAT, IMAGE_FILE, TEXT_FILE, read_contents
from cloob.models.onnx.graph import EXTERNAL
from cloob.models.onnx.pixels import ShortestTransform
from cloob.models.onnx.reading import read_tokenizer
from cloob.models.onnx.towers import GraphImages, GraphTexts
from cloob.models.runs import ONNX_FILE
from cloob.models.weights.blocks import Towers

if TYPE_CHECKING:
    from PIL.Image import Image


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
    found = read_contents(folder, content)
    if found.settings["fingerprint"] not in ("", fingerprint(folder)):  # vectors of two models would mix
        raise InputError(f"{folder}: its graphs are not those that {ONNX_FILE} was written for; export the model again")
    images, texts = GraphImages(found.images, found.preprocess_cfg), GraphTexts(found.texts)
    towers = Towers(images, texts, found.logit_scale)
    tokenizer = read_tokenizer(folder, found.tokenizer, found.context_length)
    config = EncoderConfig("onnx", found.embed_dim, found.context_length, found.settings)
    return OnnxEncoder(found.name, towers, tokenizer, config, objective)

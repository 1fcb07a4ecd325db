"""An ONNX folder (:mod:`cloob.models.onnx.plain`): written, and read as the encoder that runs its graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.onnx.plain import FORMAT, Graph, PlainEncoder, graphs_digest
from cloob.models.onnx.tokens import store_tokenizer
from cloob.models.runs import ONNX_FILE
from cloob.models.weights.blocks import Towers


class OnnxEncoder(DualEncoder):
    """A ``DualEncoder`` whose towers are graphs on onnxruntime: it embeds and does not train."""

    def check_weights(self) -> None:
        raise InputError(f"{self.name}: an ONNX export embeds and does no more; give the model that it was made of")

    def _dtype(self) -> torch.dtype:
        return torch.float32


class _Tower(nn.Module):
    """A graph in the place of a tower: (n, 3, H, W) normalised pixels or (n, L) tokens to (n, D)."""

    def __init__(self, graph: Graph, dtype: torch.dtype, preprocess_cfg: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.graph, self.dtype, self.preprocess_cfg = graph, dtype, preprocess_cfg

    def forward(self, items: Tensor) -> Tensor:
        array = items.detach().to("cpu", self.dtype).contiguous().numpy()
        return torch.from_numpy(self.graph(array)).to(items.device)


def write_config(folder: Path, encoder: DualEncoder, *, precision: str, pad: int | None) -> dict[str, Any]:
    """Writes the tokenizer and ``onnx.json``; texts may lack the padding ``pad``. Returns what ``onnx.json`` says."""
    content = {
        "format": FORMAT,
        "name": encoder.name,
        "embed_dim": encoder.embed_dim,
        "context_length": encoder.context_length,
        "logit_scale": float(encoder.model.logit_scale.detach()),
        "precision": precision,
        "pad": pad,
        "preprocess_cfg": encoder.preprocess_cfg,
        "tokenizer": store_tokenizer(encoder.tokenizer, folder, encoder.context_length),
        "fingerprint": graphs_digest(folder),
    }
    (folder / ONNX_FILE).write_text(json.dumps(content, indent=2, allow_nan=False), encoding="utf-8")
    return content


def load(folder: Path, objective: dict[str, Any]) -> OnnxEncoder:
    plain = PlainEncoder(folder)
    images = _Tower(plain.image_graph, torch.float32, plain.preprocess_cfg)
    towers = Towers(images, _Tower(plain.text_graph, torch.int64), plain.logit_scale)
    config = EncoderConfig("onnx", plain.embed_dim, plain.context_length, plain.settings)
    return OnnxEncoder(plain.name, towers, plain.tokenizer, config, objective)

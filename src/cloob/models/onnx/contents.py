"""An ONNX folder: what ``onnx.json`` says, each part checked; without torch.

::

    onnx.json        format, name, sizes, preprocess_cfg, tokenizer
    image.onnx       pixel_values float32 (n, 3, H, W), normalised -> image_embeds float32 (n, D), unit rows
    text.onnx        input_ids int64 (n, L), or (n, L') for L' ≤ L without padding -> text_embeds float32 (n, D)
    *.onnx.data      the weights of either, which onnxruntime maps; in older folders they are in the graphs themselves
    tokenizer.json   for the package tokenizers; spiece.model for rinna's
    objective.json   as in every model folder
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloob.data.content import add_part
from cloob.errors import InputError
from cloob.models.onnx.graph import FLOAT, INT64, Port, check_graph
from cloob.models.onnx.session import Graph
from cloob.models.runs import ONNX_FILE
from cloob.models.weights.fields import RESIZE_MODES, Fields

FORMAT = 1
IMAGE_FILE, TEXT_FILE = "image.onnx", "text.onnx"
PIXELS, TOKENS = "pixel_values", "input_ids"
IMAGE_ROWS, TEXT_ROWS = "image_embeds", "text_embeds"
_LARGEST_IMAGE, _LONGEST_TEXT = 4096, 1 << 16


@dataclass(frozen=True)
class Contents:
    """What an ONNX folder holds.

    Attributes:
        name: Of the model.
        embed_dim: D.
        context_length: L.
        logit_scale: ln τ⁻¹.
        settings: ``precision``, ``pad`` and ``fingerprint``.
        preprocess_cfg: open_clip's.
        tokenizer: What is said of the tokenizer, not looked at yet.
        images: The image tower.
        texts: The text tower.
    """

    name: str
    embed_dim: int
    context_length: int
    logit_scale: float
    settings: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    tokenizer: Fields
    images: Graph
    texts: Graph

    @property
    def fingerprint(self) -> str:
        """What :func:`cloob.models.fingerprint.fingerprint` gives for the loaded encoder."""
        facts = {"config": self.settings, "preprocess": self.preprocess_cfg}
        state = hashlib.blake2b(digest_size=16)
        add_part(state, json.dumps(facts, sort_keys=True, default=str).encode())
        add_part(state, b"model.logit_scale torch.float32 ()")
        state.update(np.float32(self.logit_scale).tobytes())
        return str(state.hexdigest())


def image_ports(image_size: int, embed_dim: int) -> tuple[Port, Port]:
    """Input and output of the image tower's graph."""
    return Port(PIXELS, FLOAT, (None, 3, image_size, image_size)), Port(IMAGE_ROWS, FLOAT, (None, embed_dim))


def text_ports(length: int | None, embed_dim: int) -> tuple[Port, Port]:
    """Input and output of the text tower's graph; ``length`` is None where any up to L goes."""
    return Port(TOKENS, INT64, (None, length)), Port(TEXT_ROWS, FLOAT, (None, embed_dim))


def read_contents(folder: Path, content: dict[str, Any]) -> Contents:
    """What such a folder holds; its graphs are opened when they are first used.

    Args:
        folder: The model folder.
        content: What its ``onnx.json`` says.

    Raises:
        InputError: A file is missing, damaged, not to be trusted or does not fit the others.
    """
    fields = Fields(folder / ONNX_FILE, content)
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
    return Contents(
        name=str(content.get("name", folder.name)),
        embed_dim=dim,
        context_length=length,
        logit_scale=fields.number("logit_scale", positive=False),
        settings={"precision": precision, "pad": pad, "fingerprint": str(content.get("fingerprint", ""))[:64]},
        preprocess_cfg=preprocess,
        tokenizer=fields.inside("tokenizer"),
        images=Graph(folder / IMAGE_FILE, PIXELS, IMAGE_ROWS, dim),
        texts=Graph(folder / TEXT_FILE, TOKENS, TEXT_ROWS, dim, pad),
    )


def _preprocess(fields: Fields) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``, each part checked."""
    return {
        "size": fields.integer("size", most=_LARGEST_IMAGE),
        "mode": fields.one_of("mode", ("RGB",), "RGB"),
        "mean": fields.channels("mean"),
        "std": fields.channels("std", positive=True),
        "interpolation": fields.one_of("interpolation", ("bicubic", "bilinear", "lanczos"), "bicubic"),
        "resize_mode": fields.one_of("resize_mode", RESIZE_MODES, "shortest"),
        "fill_color": fields.integer("fill_color", 0, least=0, most=255),
    }

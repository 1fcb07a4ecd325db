"""An ONNX folder by onnxruntime and NumPy alone: it answers a query while torch would still be imported.

::

    onnx.json        format, name, sizes, preprocess_cfg, tokenizer, fingerprint of the graphs
    image.onnx       pixel_values float32 (n, 3, H, W), normalised -> image_embeds float32 (n, D), unit rows
    text.onnx        input_ids int64 (n, L), or (n, L') for L' ≤ L without padding -> text_embeds float32 (n, D)
    *.onnx.data      the weights of either, which onnxruntime maps
    tokenizer.json   for the package tokenizers; spiece.model for rinna's
    objective.json   as in every model folder
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cloob.cache import Cache
from cloob.data.content import add_part
from cloob.errors import InputError
from cloob.models.onnx.session import Graph, Rows
from cloob.models.onnx.tokens import read_tokenizer
from cloob.models.pixels import EvalTransform
from cloob.models.runs import ONNX_FILE, config_file
from cloob.models.untrusted import check_folder, read_json

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
IMAGE_FILE, TEXT_FILE = "image.onnx", "text.onnx"
_YOUNG_SECONDS = 2.0


class PlainEncoder:
    """Pictures and texts to (n, D) unit rows of NumPy: the rows of ``cloob.load_model`` without torch.

    Its graphs are opened when they are first used.

    Attributes:
        name: Of the model.
        embed_dim: D.
        context_length: L.
        logit_scale: ln τ⁻¹.
        settings: ``precision``, ``pad`` and ``fingerprint``, as ``onnx.json`` says them.
        preprocess_cfg: open_clip's.
        image_graph: The image tower.
        text_graph: The text tower.
        tokenizer: Texts to tokens.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        file = folder / ONNX_FILE
        content = read_json(file)
        if content.get("format") != FORMAT:
            raise InputError(f"{file}: format is {content.get('format')!r}; this version reads {FORMAT}")
        try:
            self.name, self.logit_scale = str(content["name"]), float(content["logit_scale"])
            self.embed_dim, self.context_length = int(content["embed_dim"]), int(content["context_length"])
            pad = None if content["pad"] is None else int(content["pad"])
            self.settings = {"precision": content["precision"], "pad": pad, "fingerprint": content["fingerprint"]}
            preprocess = dict(content["preprocess_cfg"])
            self.preprocess_cfg = preprocess | {key: tuple(preprocess[key]) for key in ("mean", "std")}
            self._transform = EvalTransform(preprocess)
            self._mean, self._std = (np.array(preprocess[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
            self.image_graph = Graph(folder / IMAGE_FILE, self.embed_dim)
            self.text_graph = Graph(folder / TEXT_FILE, self.embed_dim, pad)
            tokens = dict(content["tokenizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: damaged ({type(error).__name__}: {error})") from None
        if content["fingerprint"] != graphs_digest(folder):  # else vectors of two models would mix
            raise InputError(
                f"{folder}: its graphs are not those that {ONNX_FILE} was written for; export the model again"
            )
        self.tokenizer = read_tokenizer(folder, tokens, self.context_length)

    @classmethod
    def open(cls, source: str) -> Self | None:
        """The encoder of what ``cloob.load_model`` takes; None where that is no ONNX folder."""
        folder = Path(source.removeprefix("local-dir:"))
        return cls(folder) if config_file(folder).name == ONNX_FILE else None

    @property
    def fingerprint(self) -> str:
        """What :func:`cloob.models.fingerprint.fingerprint` gives for the loaded encoder."""
        facts = {"config": self.settings, "preprocess": self.preprocess_cfg}
        state = hashlib.blake2b(digest_size=16)
        add_part(state, json.dumps(facts, sort_keys=True, default=str).encode())
        add_part(state, b"model.logit_scale torch.float32 ()")
        state.update(np.float32(self.logit_scale).tobytes())
        return str(state.hexdigest())

    def texts(self, texts: Sequence[str]) -> Rows:
        """Embeds n texts, at least one."""
        return _unit_rows(self.text_graph(self.tokenizer.ids(list(texts))))

    def pictures(self, images: Sequence[Image]) -> Rows:
        """Embeds n pictures, at least one."""
        pixels = np.stack([self._transform.array(image) for image in images]).astype(np.float32)
        return _unit_rows(self.image_graph((pixels / np.float32(255) - self._mean) / self._std))


def _unit_rows(rows: Rows) -> Rows:
    unit: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return unit


def graphs_digest(folder: Path) -> str:
    """SHA-256 of both graphs with their weights, kept in the cache; InputError where a graph is missing."""
    files: dict[Path, Any] = {}
    for name in (IMAGE_FILE, TEXT_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name} beside {ONNX_FILE}")
        files |= {path: path.stat() for path in (folder / name, folder / f"{name}.data") if path.is_file()}
    stamp = [(str(path.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in files.items()]
    if (known := Cache().find("digests", f"onnx {stamp}")) is not None:
        return known.read_text(encoding="ascii")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    if max(s.st_ctime for s in files.values()) < time.time() - _YOUNG_SECONDS:  # else a change may leave the same stamp
        with contextlib.suppress(InputError):  # a cache that cannot be written
            Cache().put("digests", f"onnx {stamp}", digest.hexdigest().encode())
    return digest.hexdigest()

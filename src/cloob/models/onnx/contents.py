"""An ONNX folder: what ``onnx.json`` says and which graphs lie beside it; without torch.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloob.cache import Cache
from cloob.data.content import add_part
from cloob.errors import InputError
from cloob.models.onnx.session import Graph
from cloob.models.pixels import EvalTransform
from cloob.models.runs import ONNX_FILE
from cloob.models.untrusted import check_folder, read_json

FORMAT = 1
IMAGE_FILE, TEXT_FILE = "image.onnx", "text.onnx"
WEIGHTS_SUFFIX = ".data"
"""What the file with a graph's weights adds to the graph's name."""
_YOUNG_SECONDS = 2.0


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
        transform: A picture to its pixels.
        mean: Of each channel, (3, 1, 1).
        std: Likewise.
        tokenizer: Settings of the tokenizer.
        images: The image tower.
        texts: The text tower.
    """

    name: str
    embed_dim: int
    context_length: int
    logit_scale: float
    settings: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    transform: EvalTransform
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    tokenizer: dict[str, Any]
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


def read_contents(folder: Path) -> Contents:
    """What such a folder holds; onnxruntime opens its graphs, and checks them, when they are first used.

    Raises:
        InputError: ``onnx.json`` is damaged, or the graphs beside it are not those that it was written for.
    """
    check_folder(folder)
    file = folder / ONNX_FILE
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise InputError(f"{file}: format is {content.get('format')!r}; this version reads {FORMAT}")
    try:
        preprocess = dict(content["preprocess_cfg"])
        preprocess |= {key: tuple(preprocess[key]) for key in ("mean", "std")}
        pad = None if content["pad"] is None else int(content["pad"])
        embed_dim = int(content["embed_dim"])
        contents = Contents(
            name=str(content["name"]),
            embed_dim=embed_dim,
            context_length=int(content["context_length"]),
            logit_scale=float(content["logit_scale"]),
            settings={"precision": content["precision"], "pad": pad, "fingerprint": content["fingerprint"]},
            preprocess_cfg=preprocess,
            transform=EvalTransform(preprocess),
            mean=np.array(preprocess["mean"], np.float32).reshape(3, 1, 1),
            std=np.array(preprocess["std"], np.float32).reshape(3, 1, 1),
            tokenizer=dict(content["tokenizer"]),
            images=Graph(folder / IMAGE_FILE, embed_dim),
            texts=Graph(folder / TEXT_FILE, embed_dim, pad),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: damaged ({type(error).__name__}: {error})") from None
    if content["fingerprint"] != graphs_digest(folder):  # else vectors of two models would mix
        raise InputError(f"{folder}: its graphs are not those that {ONNX_FILE} was written for; export the model again")
    return contents


def graphs_digest(folder: Path) -> str:
    """SHA-256 of both graphs with their weights; kept in the cache by what the system says of the files.

    Raises:
        InputError: A graph is missing.
    """
    graphs = [folder / IMAGE_FILE, folder / TEXT_FILE]
    for path in graphs:
        if not path.is_file():
            raise InputError(f"{folder}: no {path.name} beside {ONNX_FILE}")
    files = [*graphs, *filter(Path.is_file, (path.with_name(path.name + WEIGHTS_SUFFIX) for path in graphs))]
    stats = {path: path.stat() for path in files}
    stamp = [(str(path.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats.items()]
    name = f"onnx {stamp}"
    if (known := Cache().find("digests", name)) is not None:
        return known.read_text(encoding="ascii")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    if max(s.st_ctime for s in stats.values()) < time.time() - _YOUNG_SECONDS:  # else a change may leave the same stamp
        with contextlib.suppress(InputError):  # a cache that cannot be written
            Cache().put("digests", name, digest.hexdigest().encode())
    return digest.hexdigest()

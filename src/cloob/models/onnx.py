"""An ONNX folder by onnxruntime and NumPy alone.

It answers a query while torch would still be imported::

    onnx.json                format, name, sizes, preprocess_cfg, tokenizer,
                             fingerprint of the graphs
    onnx/vision_model.onnx   pixel_values float32 (n, 3, H, W), normalised ->
                             image_embeds float32 (n, D), unit rows
    onnx/text_model.onnx     input_ids int64 (n, L), or L' <= L without padding ->
                             text_embeds float32 (n, D)
    onnx/*.onnx_data         the weights of either
    tokenizer.json or spiece.model; objective.json as in every model folder
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from cloob.errors import require
from cloob.machine import processors
from cloob.models.importing import check_folder, read_json, translated
from cloob.models.pixels import EvalTransform
from cloob.models.runs import ONNX_FILE, config_file
from cloob.models.settings import Pixels
from cloob.models.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession  # type: ignore[import-untyped]
    from PIL.Image import Image

Array = npt.NDArray[np.float32]
Items = npt.NDArray[np.float32] | npt.NDArray[np.int64]
FORMAT = 1
_GRAPHS = {"image": "vision_model", "text": "text_model"}
_BATCH = 32  # items a run: more are not faster on a CPU, and take memory
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_STEP = 8  # lengths of texts are multiples of it, so that a session meets few shapes


@dataclass
class Graph:
    """A graph with one input and one output, opened when first used.

    ``pad`` is the token that texts may come without; ``weights`` the folder of weights
    that lie outside the graph's own.
    """

    path: Path
    embed_dim: int
    pad: int | None = None
    weights: Path | None = None
    _session: InferenceSession | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_session": None}

    def __call__(self, items: Items) -> Array:
        """The rows of n items, at least one, in the dtype that the graph takes.

        Raises:
            InputError: onnxruntime cannot run the graph.
        """
        with translated(f"{self.path}: onnxruntime cannot run it"):
            session = self._session = self._session or self._open()
            starts = range(0, len(items), _BATCH)
            parts = [self._rows(session, items[i : i + _BATCH]) for i in starts]
            return np.concatenate(parts)

    def _open(self) -> InferenceSession:
        """A session of onnxruntime for the graph, on the CPU."""
        runtime = require("onnxruntime", "train")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = _threads()
        options.log_severity_level = 4
        if self.weights is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(self.weights))
        # A graph from bytes finds its weights in the folder that the options name.
        graph = str(self.path) if self.weights is None else self.path.read_bytes()
        providers = ["CPUExecutionProvider"]
        return runtime.InferenceSession(graph, options, providers=providers)

    def _rows(self, session: InferenceSession, items: Items) -> Array:
        """(n, embed_dim) float32 rows of a batch; texts without the padding that they
        share.
        """
        if self.pad is not None:
            longest = int((items != self.pad).any(axis=0).nonzero()[0].max()) + 1
            items = items[:, : math.ceil(longest / _STEP) * _STEP]
        [source] = session.get_inputs()
        [rows] = session.run(None, {source.name: np.ascontiguousarray(items)})
        return np.asarray(rows, np.float32).reshape(len(items), self.embed_dim)


def _threads() -> int:
    """As many as torch has where it is imported, else OMP_NUM_THREADS, else all."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdecimal() else processors()


class PlainEncoder:
    """Pictures and texts to (n, D) unit rows of NumPy: the rows of ``cloob.load_model``
    without torch.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        file = folder / ONNX_FILE
        content = read_json(file)
        with translated(f"{file}: damaged"):
            digest = str(content["fingerprint"])
            if content["format"] != FORMAT:
                raise ValueError("written in another format; export the model again")
            self.name = str(content["name"])
            self.logit_scale = float(content["logit_scale"])
            self.embed_dim = int(content["embed_dim"])
            self.context_length = int(content["context_length"])
            self.preprocess_cfg: Pixels = content["preprocess_cfg"]
            self._transform = EvalTransform(self.preprocess_cfg)
            self._mean = _channels(self.preprocess_cfg["mean"])
            self._std = _channels(self.preprocess_cfg["std"])
            pad = content["pad"]
            self.image_graph = Graph(graph_file(folder, "image"), self.embed_dim)
            self.text_graph = Graph(graph_file(folder, "text"), self.embed_dim, pad)
            self.tokenizer = read_tokenizer(
                file, content["tokenizer"], self.context_length
            )
        self.settings = {"pad": pad, "fingerprint": digest}
        identity = [self.settings, self.preprocess_cfg, self.logit_scale]
        identity_json = json.dumps(identity, sort_keys=True).encode()
        # What ``cloob.models.load.fingerprint`` gives for the loaded encoder.
        self.fingerprint = hashlib.blake2b(identity_json, digest_size=16).hexdigest()

    @classmethod
    def open(cls, source: str) -> Self | None:
        """The encoder of what ``cloob.load_model`` takes; None where that is no ONNX
        folder.
        """
        folder = Path(source.removeprefix("local-dir:"))
        return cls(folder) if config_file(folder).name == ONNX_FILE else None

    def texts(self, texts: Sequence[str]) -> Array:
        return unit_rows(self.text_graph(self.tokenizer.ids(list(texts))))

    def pictures(self, images: Sequence[Image]) -> Array:
        arrays = [self._transform.array(image) for image in images]
        pixels = np.stack(arrays).astype(np.float32) / np.float32(255)
        return unit_rows(self.image_graph((pixels - self._mean) / self._std))


def _channels(values: Sequence[float]) -> Array:
    """(3, 1, 1) numbers of the channels."""
    return np.array(values, np.float32).reshape(3, 1, 1)


def unit_rows(rows: Array) -> Array:
    """Rows scaled to length 1."""
    return np.asarray(
        rows
        / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    )


def graph_file(folder: Path, kind: str) -> Path:
    return folder / "onnx" / f"{_GRAPHS[kind]}.onnx"

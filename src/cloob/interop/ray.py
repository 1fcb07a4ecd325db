"""Embedding over many machines by Ray Data: an actor for ``Dataset.map_batches``.

``ray.data.read_binary_files("s3://…").map_batches(Embed,
fn_constructor_args=("runs/mine",), concurrency=8)`` embeds with eight actors. The page
“More processes, more machines” has the program.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cloob.data.batch import BadSample, decoding
from cloob.distributed import resolve_device
from cloob.evaluation.embed import embed_texts, evaluating
from cloob.models.load import load_model
from cloob.pictures import decode


class Embed:
    """Adds ``embedding``, (n, D) float32 unit rows, and ``error`` to batches of encoded
    pictures; other columns stay.

    A picture that cannot be read, or a caption that is missing, keeps its row, with
    NaN, and the reason in ``error``, which is empty otherwise.

    Args:
        model: A model as ``load_model`` takes it, at the same place on all machines.
        image: The column of encoded pictures: ``bytes`` of ``read_binary_files``,
            ``jpg`` of a webdataset.
        text: A column of captions, whose embeddings become ``text_embedding``. What is
            no text (None, NaN, blanks alone) is missing.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    def __init__(
        self,
        model: str,
        image: str = "bytes",
        text: str | None = None,
        device: str = "auto",
    ) -> None:
        self.encoder = load_model(model, device=resolve_device(device))
        self.image, self.text = image, text

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embeds a batch of columns, as Ray hands them over."""
        rows, errors = self._embed_pictures(batch[self.image])
        added: dict[str, np.ndarray] = {}
        if self.text is not None:
            added["text_embedding"], missing = self._embed_texts(batch[self.text])
            for i in missing:
                errors[i].append(f"{self.text}: missing caption")
        error = np.array(["; ".join(reasons) for reasons in errors], object)
        return {**batch, "embedding": rows, "error": error, **added}

    def _embed_pictures(
        self, pictures: np.ndarray
    ) -> tuple[np.ndarray, list[list[str]]]:
        """Rows, and the reasons of those that are NaN."""
        pixels: dict[int, torch.Tensor] = {}
        errors: list[list[str]] = [[] for _ in pictures]
        for i, data in enumerate(pictures):
            try:
                with decoding(str(i)):
                    pixels[i] = self.encoder.preprocess(decode(data))
            except BadSample as error:
                errors[i].append(f"{error.reason}: {error.detail}")
        rows = self._empty(len(pictures))
        if pixels:
            with evaluating(self.encoder):
                embedded = self.encoder.encode_image(torch.stack([*pixels.values()]))
            rows[[*pixels]] = embedded.float().cpu().numpy()
        return rows, errors

    def _embed_texts(self, texts: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Rows, and the places of the captions that are missing."""
        captions = {
            i: text
            for i, text in enumerate(texts)
            if isinstance(text, str) and text.strip()
        }
        rows = self._empty(len(texts))
        if captions:
            embedded = embed_texts(self.encoder, list(captions.values()))
            rows[[*captions]] = embedded.numpy()
        return rows, [i for i in range(len(texts)) if i not in captions]

    def _empty(self, n: int) -> np.ndarray:
        return np.full((n, self.encoder.embed_dim), np.nan, np.float32)

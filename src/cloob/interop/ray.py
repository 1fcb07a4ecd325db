"""Embedding over many machines by Ray Data: an actor for ``Dataset.map_batches``.

``ray.data.read_binary_files("s3://…").map_batches(Embed,
fn_constructor_args=("runs/mine",), concurrency=8)`` embeds with eight actors. The page
“More processes, more machines” has the program.
"""

from __future__ import annotations

from typing import Any

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

    A picture that cannot be read keeps its row, with NaN, and the reason in ``error``,
    which is empty otherwise.

    Args:
        model: A model as ``load_model`` takes it, at the same place on all machines.
        image: The column of encoded pictures: ``bytes`` of ``read_binary_files``,
            ``jpg`` of a webdataset.
        text: A column of captions, whose embeddings become ``text_embedding``.
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

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embeds a batch of columns, as Ray hands them over."""
        pictures, pixels = batch[self.image], {}
        errors = [""] * len(pictures)
        for i, data in enumerate(pictures):
            try:
                with decoding(str(i)):
                    pixels[i] = self.encoder.preprocess(decode(data))
            except BadSample as error:
                errors[i] = f"{error.reason}: {error.detail}"
        rows = np.full((len(pictures), self.encoder.embed_dim), np.nan, np.float32)
        if pixels:
            with evaluating(self.encoder):
                embedded = self.encoder.encode_image(
                    torch.stack(list(pixels.values())).to(self.encoder.device)
                )
            rows[list(pixels)] = embedded.float().cpu().numpy()
        added = {"embedding": rows, "error": np.array(errors, object)}
        if self.text is not None:
            added["text_embedding"] = embed_texts(
                self.encoder, [str(text) for text in batch[self.text]]
            ).numpy()
        return {**batch, **added}

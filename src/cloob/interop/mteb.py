"""MTEB (with MIEB, its image part) evaluates our checkpoints: any model by name,
registered by importing this module.

    import mteb, cloob.interop.mteb
    mteb.evaluate(mteb.get_model("cloob/runs/demo/cloob"),
    mteb.get_tasks(["CIFAR10ZeroShot"]))

``python -m cloob.interop.mteb`` is MTEB's command line with these names. A name is
``cloob/`` and an argument of :func:`cloob.load_model`. MTEB keeps results by name and
revision: a hash of the bytes of a folder or file, ``None`` for models elsewhere. An
item with an image and a text is the unit row of their sum, as for MTEB's CLIP models.
MTEB 2.26.
"""

from __future__ import annotations

import importlib
import json
from collections import UserDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.citation import BIBTEX
from cloob.errors import command_line, needs, require

with command_line(__name__), needs("train"):
    from cloob.evaluation.embed import Encoder, evaluating
    from cloob.evaluation.embeddings import folder_key
    from cloob.models.load import find_model_folder, load_model
    from cloob.models.runs import CONFIG_FILE
    from cloob.models.source import ModelSource

    require("mteb", "mteb")
from mteb.models.abs_encoder import AbsEncoder  # type: ignore[import-not-found, unused-ignore]
from mteb.models.model_meta import ModelMeta, ScoringFunction  # type: ignore[import-not-found, unused-ignore]

PREFIX = "cloob/"


class CloobEncoder(AbsEncoder):  # type: ignore[misc, unused-ignore]  # untyped where mteb is not installed
    """A model of ours under MTEB's ``EncoderProtocol``; ``revision`` has no effect."""

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        **_: Any,
    ) -> None:
        self.encoder: Encoder = load_model(
            model_name.removeprefix(PREFIX), device=device or "auto"
        )

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: Any) -> Tensor:
        """Unit rows of what a loader of MTEB hands out: batches of texts (``text``),
        PIL images (``image``) or both.
        """
        encoder, rows = self.encoder, []
        with evaluating(encoder):
            for batch in inputs:
                embedded = []
                if "text" in batch:
                    embedded.append(encoder.encode_text(list(batch["text"])))
                if "image" in batch:
                    embedded.append(encoder.encode_image(list(batch["image"])))
                both = F.normalize(torch.stack(embedded).sum(dim=0), dim=1)
                rows.append(both.float().cpu())
        return torch.cat(rows)


def meta(model_name: str) -> ModelMeta:
    """What MTEB writes next to the results of a model; the weights are
    hashed, and not loaded.
    """
    source = model_name.removeprefix(PREFIX)
    folder = find_model_folder(source)
    # files and folders of other programs
    place = folder or ModelSource.parse(source).path
    sizes: dict[str, Any] = {}
    # heads on frozen encoders have none
    if folder is not None and (folder / CONFIG_FILE).is_file():
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))[
            "model_cfg"
        ]
        sizes = {
            "embed_dim": config["embed_dim"],
            "max_tokens": config["text_cfg"].get("context_length", 77),
        }
    names = (
        "release_date n_parameters memory_usage_mb license public_training_code"
        " public_training_data"
    )
    return ModelMeta(
        loader=CloobEncoder,
        name=model_name,
        revision=None if place is None else folder_key(place, "cpu"),
        languages=None,
        open_weights=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["image", "text"],
        citation=BIBTEX,
        **{**dict.fromkeys([*names.split(), "max_tokens", "embed_dim"]), **sizes},
    )


class _Registry(UserDict[str, Any]):
    """MTEB's registry, in which every name that begins with ``cloob/`` is known."""

    def __contains__(self, name: object) -> bool:
        return name in self.data or (isinstance(name, str) and name.startswith(PREFIX))

    def __getitem__(self, name: str) -> ModelMeta:
        return (
            meta(name)
            if name not in self.data and name.startswith(PREFIX)
            else self.data[name]
        )


_lookup: Any = importlib.import_module("mteb.models.get_model_meta")
_registry = _Registry()
# the same dictionary: what MTEB or anyone adds is here too
_registry.data = _lookup.MODEL_REGISTRY
_lookup.MODEL_REGISTRY = _registry

if __name__ == "__main__":
    from mteb.cli import main  # type: ignore[import-not-found, unused-ignore]

    with command_line(__name__):
        main()

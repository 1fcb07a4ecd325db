"""Public checkpoints by name: where each lies, and what is published of its size and hash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cloob.errors import nearest


@dataclass(frozen=True)
class PublicFile:
    """One file.

    Attributes:
        url: Where it lies.
        name: What it is called in the cache.
        sha256: As its publisher gives it; None: not published.
        size: Bytes, likewise.
    """

    url: str
    name: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class PublicModel:
    """One model.

    Attributes:
        about: What it is, in a line.
        files: What has to be there.
        folder: Whether the folder is the model; else the first file is.
        config: The configuration of a crowsonkb file.
    """

    about: str
    files: tuple[PublicFile, ...]
    folder: bool = False
    config: dict[str, Any] | None = field(default=None, hash=False)


_VIT_B_16 = {
    "d_embed": 512,
    "inv_tau": 30.0,
    "scale_hopfield": 15.0,
    "image_encoder": {
        "type": "ViT",
        "image_size": 224,
        "input_channels": 3,
        "normalize": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
        "patch_size": 16,
        "n_layers": 12,
        "d_model": 768,
        "n_heads": 12,
    },
    "text_encoder": {
        "type": "transformer",
        "tokenizer": "clip",
        "text_size": 77,
        "vocab_size": 49408,
        "n_layers": 12,
        "d_model": 512,
        "n_heads": 8,
    },
}
_JKU = "https://ml.jku.at/research/CLOOB/downloads/checkpoints"
_EYE = "https://the-eye.eu/public/AI/models/cloob"
_RINNA = "https://huggingface.co/rinna"
_OPENAI = "https://openaipublic.azureedge.net/clip/models"


def _mljku(encoder: str, about: str) -> PublicModel:
    name = f"cloob_{encoder}_yfcc_epoch_28.pt"
    return PublicModel(f"CLOOB, {about}, YFCC15M, 28 epochs (ml-jku)", (PublicFile(f"{_JKU}/{name}", name),))


def _crowsonkb(epochs: int, sha256: str) -> PublicModel:
    stem = f"cloob_laion_400m_vit_b_16_{epochs}_epochs"
    file = PublicFile(f"{_EYE}/{stem}-{sha256}.pkl", f"{stem}.pkl", sha256)
    return PublicModel(f"CLOOB, ViT-B/16, LAION-400M, {epochs} epochs (crowsonkb)", (file,), config=_VIT_B_16)


def _openai(name: str, sha256: str) -> PublicModel:
    return PublicModel(f"CLIP, {name} (OpenAI)", (PublicFile(f"{_OPENAI}/{sha256}/{name}.pt", f"{name}.pt", sha256),))


_RINNA_MODEL = f"{_RINNA}/japanese-cloob-vit-b-16/resolve/main"
MODELS: dict[str, PublicModel] = {
    "ml-jku/rn50-yfcc": _mljku("rn50", "RN50"),
    "ml-jku/rn50x4-yfcc": _mljku("rn50x4", "RN50x4"),
    "crowsonkb/vit-b-16-laion400m-16": _crowsonkb(
        16, "405a3c31572e0a38f8632fa0db704d0e4521ad663555479f86babd3d178b1892"
    ),
    "crowsonkb/vit-b-16-laion400m-32": _crowsonkb(
        32, "646f61628eb4bc03a01ce5c23b727a348105f0405b6037a329da062739a06441"
    ),
    "rinna/japanese-cloob-vit-b-16": PublicModel(
        "CLOOB, ViT-B/16 and a Japanese text tower (rinna)",
        (
            PublicFile(f"{_RINNA_MODEL}/config.json", "config.json"),
            PublicFile(f"{_RINNA_MODEL}/model.safetensors", "model.safetensors"),
            PublicFile(f"{_RINNA}/japanese-roberta-base/resolve/main/spiece.model", "spiece.model"),
        ),
        folder=True,
    ),
    "openai/RN50": _openai("RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "openai/RN101": _openai("RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "openai/RN50x4": _openai("RN50x4", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "openai/ViT-B-32": _openai("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "openai/ViT-B-16": _openai("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "openai/ViT-L-14": _openai("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
}


def suggestion(source: str) -> str | None:
    """What was meant by a name that has a publisher of ours in front and is none of the models; None for others."""
    publisher = source.partition("/")[0]
    if source in MODELS or publisher not in {name.partition("/")[0] for name in MODELS}:
        return None
    return nearest(source, MODELS)

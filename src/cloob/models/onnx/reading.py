"""The tokenizer of an ONNX folder, read back without torch; :mod:`cloob.models.onnx.tokens` says what there may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cloob.errors import InputError
from cloob.models.importing import import_open_clip
from cloob.models.onnx.words import read_tables
from cloob.models.runs import ONNX_FILE
from cloob.models.tokenizer import Tokens, as_tensor
from cloob.models.weights.fields import Fields
from cloob.models.weights.tokenizer_json import TRIAL, encoded, guarded, opened
from cloob.models.weights.tokens import HUB_FILE, ClipTokenizer, NoTokenizer, RinnaTokenizer, hub_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

CLEANINGS = ("whitespace", "lower", "canonicalize")
"""open_clip's, by name."""


class Tokenizer(Protocol):
    """Texts to tokens, for torch and for NumPy."""

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens of n texts, (n, L) int64."""
        ...

    def ids(self, texts: Sequence[str]) -> Tokens:
        """As ``__call__``, without torch."""
        ...


def read_tokenizer(folder: Path, settings: dict[str, Any], context_length: int) -> Tokenizer:
    """The tokenizer that the settings in ``onnx.json`` ask for.

    Args:
        folder: With its file.
        settings: What it says of the tokenizer.
        context_length: L.

    Raises:
        InputError: They are none, or its file is missing or damaged.
    """
    fields = Fields(folder / ONNX_FILE, settings, "tokenizer.")
    kind = fields.one_of("kind", ("clip", "json", "hub", "rinna", "none"))
    if kind == "none":
        return NoTokenizer(f"{fields.path}: the model has no tokenizer; give tokens, not texts")
    path = folder / (RinnaTokenizer.FILE if kind == "rinna" else HUB_FILE)
    if not path.is_file():
        raise InputError(f"{folder}: no {path.name} in it, the tokenizer that {fields.path.name} asks for")
    if kind == "rinna":
        return RinnaTokenizer(path, context_length)
    if kind == "hub":
        return hub_tokenizer(folder, context_length, fields.integer("pad", least=0), fields.integer("end", least=0))
    if kind == "json":
        strip = fields.integer("strip", least=0) if fields.values.get("strip") is not None else None
        cleaning = fields.one_of("clean", CLEANINGS) if fields.values.get("clean") is not None else None
        return JsonTokenizer(path, context_length, cleaning, strip)
    match fields.values.get("specials"):
        case [str(start), str(end)] if start and end and start != end:
            ending: Any = fields.one_of("ending", ("kept", "cut"))
            tables = read_tables(path, context_length, (start, end))
            return ClipTokenizer((start, end), ending, context_length, tables)
    raise fields.wrong("specials", "two words")


class JsonTokenizer:
    """The tokens of a ``tokenizer.json`` that pads and cuts by itself.

    Args:
        path: The file.
        context_length: L.
        cleaning: Which of open_clip's cleanings a text goes through first; None for none.
        strip: The token that zeros take the place of; None for none.

    Raises:
        InputError: The file cannot be read.
    """

    def __init__(self, path: Path, context_length: int, cleaning: str | None, strip: int | None) -> None:
        self.path, self.context_length, self.cleaning, self.strip = path, context_length, cleaning, strip
        self._tokenizer = opened(path, "onnx")
        with guarded(f"{path}: not a tokenizer that pads its rows"):
            padding = self._tokenizer.padding
            self._tokenizer.enable_padding(**{**padding, "length": context_length, "pad_to_multiple_of": None})
            self._tokenizer.enable_truncation(context_length)
        encoded(path, self._tokenizer, [TRIAL])

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens of n texts, (n, L) int64."""
        return as_tensor(self.ids(texts))

    def ids(self, texts: str | Sequence[str]) -> Tokens:
        """As ``__call__``, without torch; open_clip's cleanings import it all the same."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.cleaning is not None:
            clean = import_open_clip(".tokenizer").get_clean_fn(self.cleaning)
            texts = [clean(text) for text in texts]
        ids = encoded(self.path, self._tokenizer, texts)
        tokens = np.array(ids, np.int64).reshape(len(texts), self.context_length)
        return tokens if self.strip is None else np.where(tokens == self.strip, 0, tokens)

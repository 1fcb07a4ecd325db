"""The tokenizer of an ONNX folder: written so that others can use it, and read back.

What ``onnx.json`` says of it is one of

- ``{"kind": "clip", "specials": [start, end], "ending": "kept" | "cut"}``: CLIP's byte pairs, tables in tokenizer.json;
- ``{"kind": "json", "clean": …, "strip": …}``: tokenizer.json as it is, behind one of open_clip's cleanings;
- ``{"kind": "hub", "pad": …, "end": …}``: tokenizer.json as ``HubTokenizer`` uses it;
- ``{"kind": "rinna"}``: sentencepiece's ``spiece.model``;
- ``{"kind": "none", "why": …}``: none; the model takes tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError, one_line, require
from cloob.models.aligned.encoders import PaddedTokenizer
from cloob.models.onnx.words import SPECIALS, read_tables, tokenizer_json, write_json
from cloob.models.tokenizer import FastTokenizer
from cloob.models.weights.formats.fields import Fields
from cloob.models.weights.tokens import (
    HUB_FILE,
    ClipTokenizer,
    HubTokenizer,
    NoTokenizer,
    RinnaTokenizer,
    hub_tokenizer,
)

_CLEANINGS = ("whitespace", "lower", "canonicalize")
_LARGEST_JSON = 64 << 20
CLIP_NOTE = (
    "`tokenizer.json` gives the model's tokens but for texts that ftfy mends beyond single characters: HTML entities "
    "(`&amp;`), text that was decoded wrongly (`Ã¶`), escapes of terminals."
)


def store_tokenizer(tokenizer: Any, folder: Path, context_length: int) -> dict[str, Any]:
    """Writes a tokenizer's file into a folder.

    Args:
        tokenizer: Of a ``DualEncoder``.
        folder: Where to.
        context_length: L.

    Returns:
        What ``onnx.json`` says of it.
    """
    if isinstance(tokenizer, FastTokenizer):
        settings = dict(getattr(tokenizer, "settings", {"kind": "clip", "specials": list(SPECIALS), "ending": "kept"}))
        start, end = settings["specials"]
        write_json(folder / HUB_FILE, tokenizer_json(tokenizer, (start, end)))
        return settings
    if isinstance(tokenizer, RinnaTokenizer):
        (folder / RinnaTokenizer.FILE).write_bytes(tokenizer.content)
        return {"kind": "rinna"}
    if isinstance(tokenizer, HubTokenizer):
        tokenizer.save_pretrained(folder)
        pad, content = tokenizer.settings["pad"], (folder / HUB_FILE).read_text(encoding="utf-8")
        (folder / HUB_FILE).write_text(_with_length(content, context_length, pad, "right"), encoding="utf-8")
        return dict(tokenizer.settings)
    original, cleaning, strip = _hub_parts(tokenizer)
    backend = getattr(original, "backend_tokenizer", None)
    if backend is None or original.pad_token_id is None:
        takes = isinstance(tokenizer, NoTokenizer)
        kind = "the model takes tokens" if takes else f"its own ({type(tokenizer).__name__}) has no form in a file"
        return {"kind": "none", "why": kind}
    pad, side = int(original.pad_token_id), str(original.padding_side)
    (folder / HUB_FILE).write_text(_with_length(backend.to_str(), context_length, pad, side), encoding="utf-8")
    return {"kind": "json", "clean": cleaning, "strip": strip}


def tokenizer_note(settings: dict[str, Any]) -> str:
    """A sentence for people who use the folder without this package: how its tokens differ from the model's."""
    match settings:
        case {"kind": "clip", "ending": "kept"}:
            return CLIP_NOTE
        case {"kind": "clip"}:
            return f"{CLIP_NOTE} A text that is too long ends with the end token, which the model's own tokens lack."
        case {"kind": "json", "clean": str(cleaning)}:
            return f"`tokenizer.json` does not clean texts; open_clip's cleaning {cleaning!r} goes before it."
        case {"kind": "json" | "hub"}:
            return "`tokenizer.json` gives the model's tokens."
        case {"kind": "rinna"}:
            return "Tokens: `[CLS]` (4), then the pieces of `spiece.model` for the text in lower case, padded with 3."
    return f"No tokenizer is in the folder: {settings['why']}."


def read_tokenizer(folder: Path, fields: Fields, context_length: int) -> Callable[[list[str]], Tensor]:
    """The tokenizer that the settings in ``onnx.json`` ask for.

    Args:
        folder: With its file.
        fields: The settings.
        context_length: L.

    Raises:
        InputError: They are none, or its file is missing or damaged.
    """
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
        cleaning = fields.one_of("clean", _CLEANINGS) if fields.values.get("clean") is not None else None
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
        library = require("tokenizers", "onnx")
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes are too many for a tokenizer")
        try:
            self._tokenizer: Any = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            padding = self._tokenizer.padding
            self._tokenizer.enable_padding(**{**padding, "length": context_length, "pad_to_multiple_of": None})
            self._tokenizer.enable_truncation(context_length)
        except Exception as error:  # whatever the library raises for a damaged file
            raise InputError(f"{path}: not a tokenizer that pads its rows ({one_line(error, 100)})") from None

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens of n texts, (n, L) int64."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.cleaning is not None:
            clean = require("open_clip.tokenizer", "train").get_clean_fn(self.cleaning)
            texts = [clean(text) for text in texts]
        ids = [encoded.ids for encoded in self._tokenizer.encode_batch(texts)]
        tokens = torch.tensor(ids, dtype=torch.int64).view(len(texts), self.context_length)
        return tokens if self.strip is None else tokens.masked_fill(tokens == self.strip, 0)


def _hub_parts(tokenizer: Any) -> tuple[Any, str | None, int | None]:
    """The tokenizer of transformers that another one wraps, its cleaning, and the token that it strips."""
    if isinstance(tokenizer, PaddedTokenizer):
        return tokenizer.original, None, None
    module = sys.modules.get("open_clip.tokenizer")
    if module is None or type(tokenizer) is not module.HFTokenizer or tokenizer.tokenizer_mode:
        return None, None, None
    cleaning = next((name for name in _CLEANINGS if tokenizer.clean_fn is module.get_clean_fn(name)), None)
    if cleaning is None:
        return None, None, None
    strip = int(tokenizer.tokenizer.sep_token_id) if tokenizer.strip_sep_token else None
    return tokenizer.tokenizer, cleaning, strip


def _with_length(content: str, length: int, pad: int, side: str) -> str:
    """A ``tokenizer.json`` whose rows have a fixed length."""
    tokenizer: Any = require("tokenizers", "onnx").Tokenizer.from_str(content)
    tokenizer.enable_padding(direction=side, pad_id=pad, pad_token=tokenizer.id_to_token(pad) or "", length=length)
    tokenizer.enable_truncation(length)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))

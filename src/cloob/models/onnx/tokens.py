"""The tokenizer of an ONNX folder, written so that others can use it; :mod:`cloob.models.onnx.reading` reads it back.

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
from pathlib import Path
from typing import Any

from cloob.errors import require
from cloob.models.aligned.encoders import PaddedTokenizer
from cloob.models.onnx.reading import CLEANINGS
from cloob.models.onnx.words import SPECIALS, tokenizer_json, write_json
from cloob.models.tokenizer import FastTokenizer
from cloob.models.weights.tokens import HUB_FILE, HubTokenizer, NoTokenizer, RinnaTokenizer

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


def _hub_parts(tokenizer: Any) -> tuple[Any, str | None, int | None]:
    """The tokenizer of transformers that another one wraps, its cleaning, and the token that it strips."""
    if isinstance(tokenizer, PaddedTokenizer):
        return tokenizer.original, None, None
    module = sys.modules.get("open_clip.tokenizer")
    if module is None or type(tokenizer) is not module.HFTokenizer or tokenizer.tokenizer_mode:
        return None, None, None
    cleaning = next((name for name in CLEANINGS if tokenizer.clean_fn is module.get_clean_fn(name)), None)
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

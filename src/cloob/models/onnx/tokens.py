"""The tokenizer of an ONNX folder: written so that others can use it, and read back without torch.

What ``onnx.json`` says of it is one of

- ``{"kind": "clip", "specials": [start, end], "ending": "kept" | "cut"}``: CLIP's byte pairs in tokenizer.json;
- ``{"kind": "json", "clean": …, "strip": …}``: tokenizer.json as it is, after one of open_clip's cleanings;
- ``{"kind": "rinna"}``: sentencepiece's ``spiece.model``;
- ``{"kind": "none", "why": …}``: none; the model takes tokens.

The package ``tokenizers`` alone makes other tokens of CLIP's file where ftfy fixes more than single characters: text
that was decoded wrongly, HTML entities, escapes of terminals.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

from cloob.errors import require
from cloob.models.runs import ONNX_FILE
from cloob.models.tokenizer import SPECIALS, ClipTokenizer, Tokenizer, clip_rules
from cloob.models.weights.tokens import HUB_FILE, FileTokenizer, NoTokenizer, RinnaTokenizer

CLIP_NOTE = (
    "`tokenizer.json` gives the model's tokens but for texts that ftfy mends beyond single characters: HTML entities "
    "(`&amp;`), text that was decoded wrongly (`Ã¶`), escapes of terminals."
)
_CLEANINGS = ("whitespace", "lower", "canonicalize")  # open_clip's
_DROPPED = "[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\\u206a-\\u206f\\ufeff\\ufff9-\\ufffc]"
_LIGATURES = {"Ĳ": "IJ", "ĳ": "ij", "ŉ": "'n", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj"}
_LIGATURES |= {"Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl"}
_LIGATURES |= {"ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
_WIDE = range(0xFF01, 0xFFF0)
# Python lowers a sigma at a word's end to ς, the package every one to σ (Unicode, section 3.13, Final_Sigma). The
# letter before it is up to three marks away: Oniguruma looks back over fixed lengths alone, and JavaScript has no \K.
_CASED = r"[\p{Cased}&&[^\p{Case_Ignorable}]]"
_BEFORE = "|".join(_CASED + r"\p{Case_Ignorable}" * marks for marks in range(4))
_LAST_SIGMA = rf"(?<={_BEFORE})Σ(?!\p{{Case_Ignorable}}*{_CASED})"


def read_tokenizer(folder: Path, settings: dict[str, Any], context_length: int) -> Tokenizer:
    match settings:
        case {"kind": "rinna"}:
            return RinnaTokenizer(folder / RinnaTokenizer.FILE, context_length)
        case {"kind": "json"}:
            clean, strip = settings["clean"], settings["strip"]
            return FileTokenizer(folder / HUB_FILE, context_length, clean=clean, strip=strip)
        case {"kind": "clip", "specials": [start, end]}:
            return ClipTokenizer.read(folder / HUB_FILE, (start, end), context_length, settings["ending"])
    return NoTokenizer(f"{folder / ONNX_FILE}: the model has no tokenizer; give tokens, not texts")


def store_tokenizer(tokenizer: Any, folder: Path, context_length: int) -> dict[str, Any]:
    """Writes the file of a ``DualEncoder``'s tokenizer for L tokens; returns what ``onnx.json`` says of it."""
    if isinstance(tokenizer, RinnaTokenizer):
        (folder / RinnaTokenizer.FILE).write_bytes(tokenizer.content)
        return {"kind": "rinna"}
    library: Any = require("tokenizers", "train")
    settings: dict[str, Any] = {"kind": "json", "clean": None, "strip": None}
    pad, side = 0, "right"
    if isinstance(tokenizer, ClipTokenizer):
        settings = tokenizer.settings or {"kind": "clip", "specials": list(SPECIALS), "ending": "kept"}
        rules = clip_rules(tokenizer, settings["specials"], _cleaning(library), lower=True)
    elif isinstance(tokenizer, FileTokenizer):
        rules, pad = tokenizer.rules(), tokenizer.pad or 0
    elif (original := _of_transformers(tokenizer, settings)) is not None:
        rules = library.Tokenizer.from_str(original.backend_tokenizer.to_str())
        pad, side = int(original.pad_token_id), str(original.padding_side)
    elif isinstance(tokenizer, NoTokenizer):
        return {"kind": "none", "why": "the model takes tokens"}
    else:
        return {"kind": "none", "why": f"its own ({type(tokenizer).__name__}) has no form in a file"}
    word = rules.id_to_token(pad) or ""
    rules.enable_padding(direction=side, pad_id=pad, pad_token=word, length=context_length)
    rules.enable_truncation(context_length)
    (folder / HUB_FILE).write_text(rules.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length}
    config |= {"pad_token": word, "padding_side": side}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return settings


def tokenizer_note(settings: dict[str, Any]) -> str:
    """A sentence for people who use the folder without this package: how its tokens differ from the model's."""
    match settings:
        case {"kind": "clip", "ending": "kept"}:
            return CLIP_NOTE
        case {"kind": "clip"}:
            return f"{CLIP_NOTE} A text that is too long ends with the end token, which the model's own tokens lack."
        case {"kind": "json", "clean": str(cleaning)}:
            return f"`tokenizer.json` does not clean texts; open_clip's cleaning {cleaning!r} goes before it."
        case {"kind": "json"}:
            return "`tokenizer.json` gives the model's tokens."
        case {"kind": "rinna"}:
            return "Tokens: `[CLS]` (4), then the pieces of `spiece.model` for the text in lower case, padded with 3."
    return f"No tokenizer is in the folder: {settings['why']}."


def _cleaning(library: Any) -> list[Any]:
    """open_clip's cleaning: what ftfy replaces or drops of single characters, NFC, spaces and case."""
    normalizers, pattern = library.normalizers, library.Regex
    wide = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in _WIDE}
    single = _LIGATURES | {old: new for old, new in wide.items() if old != new}
    patterns = {"[ʼ‘-‛]": "'", "[“-‟]": '"', _LAST_SIGMA: "ς", "\\s+": " "}
    return [
        normalizers.Replace(pattern(_DROPPED), ""),
        *(normalizers.Replace(old, new) for old, new in single.items()),
        *(normalizers.Replace(pattern(old), new) for old, new in patterns.items()),
        normalizers.NFC(),
        normalizers.Strip(),
        normalizers.Lowercase(),
    ]


def _of_transformers(tokenizer: Any, settings: dict[str, Any]) -> Any:
    """The fast tokenizer of transformers that another one wraps; its cleaning and stripping go into the settings."""
    original: Any = getattr(tokenizer, "original", None)  # a PaddedTokenizer's
    module = sys.modules.get("open_clip.tokenizer")
    if module is not None and type(tokenizer) is module.HFTokenizer and not tokenizer.tokenizer_mode:
        cleanings = {module.get_clean_fn(name): name for name in _CLEANINGS}
        settings["clean"] = cleanings.get(tokenizer.clean_fn)
        settings["strip"] = int(tokenizer.tokenizer.sep_token_id) if tokenizer.strip_sep_token else None
        original = tokenizer.tokenizer if settings["clean"] is not None else None
    usable = getattr(original, "backend_tokenizer", None) is not None and original.pad_token_id is not None
    return original if usable else None

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

import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cloob.errors import InputError, require
from cloob.models.runs import ONNX_FILE
from cloob.models.tokenizer import SPECIALS, ClipTokenizer, Tokens, clip_rules
from cloob.models.weights.tokens import HUB_FILE, FileTokenizer, NoTokenizer, RinnaTokenizer

if TYPE_CHECKING:
    from torch import Tensor

_CLEANINGS = ("whitespace", "lower", "canonicalize")
"""open_clip's, by name."""
CLIP_NOTE = (
    "`tokenizer.json` gives the model's tokens but for texts that ftfy mends beyond single characters: HTML entities "
    "(`&amp;`), text that was decoded wrongly (`Ã¶`), escapes of terminals."
)
_DROPPED = "[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\\u206a-\\u206f\\ufeff\\ufff9-\\ufffc]"
_LIGATURES = {"Ĳ": "IJ", "ĳ": "ij", "ŉ": "'n", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj"}
_LIGATURES |= {"Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl"}
_LIGATURES |= {"ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
_WIDE = range(0xFF01, 0xFFF0)
# Python lowers a sigma at a word's end to ς, the package every one to σ (Unicode, section 3.13, Final_Sigma).
_CASED = r"(?!\p{Case_Ignorable})\p{Cased}"
_LAST_SIGMA = rf"{_CASED}\p{{Case_Ignorable}}*\KΣ(?!\p{{Case_Ignorable}}*{_CASED})"


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

    Raises:
        InputError: They are none, or its file is missing or damaged.
    """
    kind = settings.get("kind")
    if kind == "none":
        return NoTokenizer(f"{folder / ONNX_FILE}: the model has no tokenizer; give tokens, not texts")
    path = folder / (RinnaTokenizer.FILE if kind == "rinna" else HUB_FILE)
    if not path.is_file():
        raise InputError(f"{folder}: no {path.name} in it, the tokenizer that {ONNX_FILE} asks for")
    match settings:
        case {"kind": "rinna"}:
            return RinnaTokenizer(path, context_length)
        case {"kind": "json", "clean": None | str() as clean, "strip": None | int() as strip}:
            return FileTokenizer(path, context_length, clean=clean, strip=strip)
        case {"kind": "clip", "specials": [str(start), str(end)], "ending": "cut" | "kept" as ending}:
            return ClipTokenizer.read(path, (start, end), context_length, ending)
    raise InputError(f"{folder / ONNX_FILE}: its tokenizer is described in a way that this version does not know")


def store_tokenizer(tokenizer: Any, folder: Path, context_length: int) -> dict[str, Any]:
    """Writes a tokenizer's file into a folder.

    Args:
        tokenizer: Of a ``DualEncoder``.
        folder: Where to.
        context_length: L.

    Returns:
        What ``onnx.json`` says of it.
    """
    if isinstance(tokenizer, RinnaTokenizer):
        (folder / RinnaTokenizer.FILE).write_bytes(tokenizer.content)
        return {"kind": "rinna"}
    library: Any = require("tokenizers", "onnx")
    settings: dict[str, Any]
    if isinstance(tokenizer, ClipTokenizer):
        settings = tokenizer.settings or {"kind": "clip", "specials": list(SPECIALS), "ending": "kept"}
        rules = clip_rules(tokenizer, settings["specials"], _cleaning(library), lower=True)
        pad, side = 0, "right"
    elif isinstance(tokenizer, FileTokenizer):
        settings = {"kind": "json", "clean": None, "strip": None}
        rules, pad, side = tokenizer.rules(), tokenizer.pad or 0, "right"
    else:
        original, clean, strip = _hub_parts(tokenizer)
        if original is None:
            takes = isinstance(tokenizer, NoTokenizer)
            own = f"its own ({type(tokenizer).__name__}) has no form in a file"
            return {"kind": "none", "why": "the model takes tokens" if takes else own}
        settings = {"kind": "json", "clean": clean, "strip": strip}
        rules = library.Tokenizer.from_str(original.backend_tokenizer.to_str())
        pad, side = int(original.pad_token_id), str(original.padding_side)
    rules.enable_padding(direction=side, pad_id=pad, pad_token=rules.id_to_token(pad) or "", length=context_length)
    rules.enable_truncation(context_length)
    (folder / HUB_FILE).write_text(rules.to_str(), encoding="utf-8")
    return dict(settings)


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


def _hub_parts(tokenizer: Any) -> tuple[Any, str | None, int | None]:
    """The fast tokenizer of transformers that another one wraps, its cleaning, and the token that it strips."""
    original: Any = getattr(tokenizer, "original", None)  # a PaddedTokenizer's
    cleaning = strip = None
    module = sys.modules.get("open_clip.tokenizer")
    if module is not None and type(tokenizer) is module.HFTokenizer and not tokenizer.tokenizer_mode:
        cleaning = next((name for name in _CLEANINGS if tokenizer.clean_fn is module.get_clean_fn(name)), None)
        original = tokenizer.tokenizer if cleaning is not None else None
        strip = int(tokenizer.tokenizer.sep_token_id) if tokenizer.strip_sep_token else None
    usable = getattr(original, "backend_tokenizer", None) is not None and original.pad_token_id is not None
    return (original, cleaning, strip) if usable else (None, None, None)

"""Tokenizers beside open_clip's own: read from files, and written so that others can use them, without torch.

What ``onnx.json`` says of its tokenizer is one of

- ``{"kind": "clip", "specials": [start, end], "ending": "kept" | "cut"}``: CLIP's byte pairs in tokenizer.json;
- ``{"kind": "json", "clean": …, "strip": …}``: tokenizer.json as it is, after one of open_clip's cleanings;
- ``{"kind": "rinna"}``: sentencepiece's ``spiece.model``;
- ``{"kind": "none", "why": …}``: none; the model takes tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cloob.errors import InputError, require
from cloob.models.importing import import_open_clip, translated
from cloob.models.runs import ONNX_FILE
from cloob.models.tokenizer import SPECIALS, ClipTokenizer, Ending, Tokenizer, Tokens, clip_rules

CLIP_VOCABULARY = 49408
HUB_FILE = "tokenizer.json"
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


class NoTokenizer(Tokenizer):
    """In the place of a missing tokenizer: the model takes tokens, and texts are an error that says why."""

    def __init__(self, why: str, settings: dict[str, Any] | None = None) -> None:
        self._why, self.settings = why, settings

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing, as there is nothing."""

    def ids(self, texts: Sequence[str]) -> Tokens:
        raise InputError(self._why)


class FileTokenizer(Tokenizer):
    """The tokens of a ``tokenizer.json``, in rows of L, filled up with ``pad``, or as the file says.

    ``clean`` is one of open_clip's cleanings, which goes first; zeros take the place of the token ``strip``.
    """

    def __init__(
        self,
        path: Path,
        context_length: int,
        pad: int | None = None,
        end: int | None = None,
        *,
        clean: str | None = None,
        strip: int | None = None,
    ) -> None:
        self.context_length, self.pad, self.end, self.clean, self.strip = context_length, pad, end, clean, strip
        self.settings = {"kind": "hub", "pad": pad, "end": end}
        with translated(f"{path}: no tokenizer that can be used"):
            self.rules = require("tokenizers", "train").Tokenizer.from_file(str(path))
            if pad is not None:
                _set_rows(self.rules, context_length, pad)
            self.ids(["A photo of 3 red hearts."])

    def ids(self, texts: Sequence[str]) -> Tokens:
        if self.clean is not None:
            texts = list(map(import_open_clip(".tokenizer").get_clean_fn(self.clean), texts))
        rows = [encoding.ids for encoding in self.rules.encode_batch(list(texts))]
        tokens = np.array(rows, np.int64).reshape(len(texts), self.context_length)
        return tokens if self.strip is None else np.where(tokens == self.strip, 0, tokens)

    def description(self) -> str:
        return f"{self.settings} {self.context_length} {self.clean} {self.strip} {self.rules.to_str()}"

    def save_pretrained(self, folder: Path) -> None:
        _write(self.rules, folder, self.context_length, self.pad or 0, self.end)


class RinnaTokenizer(Tokenizer):
    """rinna's Japanese pieces by sentencepiece alone: the text in lower case, ``[CLS]`` in front, no end token."""

    FILE = "spiece.model"
    PAD = 3
    _CLS = 4
    _SPECIAL = re.compile(r"(<unk>|<s>|</s>|\[PAD\]|\[CLS\]|\[SEP\]|\[MASK\])")

    def __init__(self, path: Path, context_length: int) -> None:
        self.context_length, self.content = context_length, path.read_bytes()
        with translated(f"{path}: not a model of sentencepiece"):
            self._pieces = require("sentencepiece", "train").SentencePieceProcessor(model_proto=self.content)

    def ids(self, texts: Sequence[str]) -> Tokens:
        rows = np.full((len(texts), self.context_length), self.PAD, np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._CLS, *self._encode(text)][: self.context_length]
            row[: len(ids)] = ids
        return rows

    def description(self) -> str:
        return f"{hashlib.sha256(self.content).hexdigest()} {self.context_length}"

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._SPECIAL.split(text):
            if self._SPECIAL.fullmatch(part):
                ids.append(self._pieces.piece_to_id(part))
            elif words := part.strip():
                ids += self._pieces.encode(words.lower())
        return ids


def clip_tokenizer(
    path: Path, vocabulary: int, context_length: int, specials: tuple[str, str], ending: Ending
) -> Tokenizer:
    """CLIP's tokenizer for a model with CLIP's vocabulary; for another one a placeholder that raises InputError."""
    if vocabulary == CLIP_VOCABULARY:
        original = import_open_clip(".tokenizer").SimpleTokenizer(context_length=context_length)
        return ClipTokenizer.of(original, specials, ending)
    why = f"{path}: its vocabulary has {vocabulary} words, not CLIP's {CLIP_VOCABULARY}; give tokens, not texts"
    return NoTokenizer(why, {"kind": "clip", "specials": list(specials), "ending": ending})


def hub_tokenizer(folder: Path, context_length: int, pad: int, end: int) -> Tokenizer:
    """The tokenizer in a folder of Hugging Face's, or a placeholder that raises InputError when called."""
    if (folder / HUB_FILE).is_file():
        return FileTokenizer(folder / HUB_FILE, context_length, pad, end)
    why = f"{folder}: no {HUB_FILE} in it; give tokens, or save the tokenizer there"
    return NoTokenizer(why, {"kind": "hub", "pad": pad, "end": end})


def stored_tokenizer(path: Path, settings: dict[str, Any], text_cfg: dict[str, Any]) -> Tokenizer:
    length = text_cfg.get("context_length", 77)
    if settings["kind"] == "hub":
        return hub_tokenizer(path.parent, length, settings["pad"], settings["end"])
    start, end = settings["specials"]
    return clip_tokenizer(path, text_cfg.get("vocab_size", CLIP_VOCABULARY), length, (start, end), settings["ending"])


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
        rules, pad = tokenizer.rules, tokenizer.pad or 0
    elif (original := _of_transformers(tokenizer, settings)) is not None:
        rules = library.Tokenizer.from_str(original.backend_tokenizer.to_str())
        pad, side = int(original.pad_token_id), str(original.padding_side)
    else:
        none = isinstance(tokenizer, NoTokenizer)
        why = "the model takes tokens" if none else f"its own ({type(tokenizer).__name__}) has no form in a file"
        return {"kind": "none", "why": why}
    _write(rules, folder, context_length, pad, side=side)
    return settings


def _set_rows(rules: Any, length: int, pad: int, side: str = "right") -> None:
    """Has a ``tokenizers.Tokenizer`` give rows of one length."""
    rules.enable_padding(direction=side, pad_id=pad, pad_token=rules.id_to_token(pad) or "", length=length)
    rules.enable_truncation(length)


def _write(rules: Any, folder: Path, length: int, pad: int, end: int | None = None, side: str = "right") -> None:
    """Writes a ``tokenizers.Tokenizer`` as transformers reads it."""
    _set_rows(rules, length, pad, side)
    (folder / HUB_FILE).write_text(rules.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "padding_side": side}
    config |= {"pad_token": rules.id_to_token(pad) or ""} | (
        {} if end is None else {"eos_token": rules.id_to_token(end)}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


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
    original: Any = getattr(tokenizer, "tokenizer", None)  # a PaddedTokenizer's
    module = sys.modules.get("open_clip.tokenizer")
    if module is not None and type(tokenizer) is module.HFTokenizer:
        cleanings = {module.get_clean_fn(name): name for name in _CLEANINGS}
        settings["clean"] = cleanings.get(tokenizer.clean_fn)
        settings["strip"] = int(tokenizer.tokenizer.sep_token_id) if tokenizer.strip_sep_token else None
        original = None if settings["clean"] is None or tokenizer.tokenizer_mode else original
    usable = getattr(original, "backend_tokenizer", None) is not None and original.pad_token_id is not None
    return original if usable else None

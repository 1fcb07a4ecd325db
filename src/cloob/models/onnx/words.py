"""``tokenizer.json`` for CLIP's byte pairs: written from the tables of a ``FastTokenizer``, and read back as one.

What the package ``tokenizers`` makes of such a file differs from the tokens here in what ftfy mends beyond single
characters: text that was decoded wrongly, HTML entities, escapes of terminals.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloob.errors import InputError, printable, require
from cloob.models.tokenizer import FastTokenizer
from cloob.models.untrusted import read_json

SPECIALS = ("<start_of_text>", "<end_of_text>")
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MOST_WORDS = 1 << 20
_DROPPED = "[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\\u206a-\\u206f\\ufeff\\ufff9-\\ufffc]"
_LIGATURES = {"Ĳ": "IJ", "ĳ": "ij", "ŉ": "'n", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj"}
_LIGATURES |= {"Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl"}
_LIGATURES |= {"ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
_WIDE = range(0xFF01, 0xFFF0)
# Python lowers a sigma at a word's end to ς, the package every one to σ (Unicode, section 3.13, Final_Sigma).
_CASED = r"(?!\p{Case_Ignorable})\p{Cased}"
_LAST_SIGMA = rf"{_CASED}\p{{Case_Ignorable}}*\KΣ(?!\p{{Case_Ignorable}}*{_CASED})"


def _mended() -> list[tuple[dict[str, str], str]]:
    """What ftfy replaces or drops of single characters, as (pattern, replacement)."""
    wide = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in _WIDE}
    single = _LIGATURES | {old: new for old, new in wide.items() if old != new}
    return [
        ({"Regex": _DROPPED}, ""),
        *(({"String": old}, new) for old, new in single.items()),
        ({"Regex": "[ʼ‘-‛]"}, "'"),
        ({"Regex": "[“-‟]"}, '"'),
        ({"Regex": _LAST_SIGMA}, "ς"),
        ({"Regex": "\\s+"}, " "),
    ]


def byte_letters() -> dict[int, str]:
    """The character that stands for each byte in CLIP's vocabulary.

    Visible characters of Latin-1 stand for themselves, the other bytes in turn for what follows on U+00FF.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in visible else next(others)) for byte in range(256)}


def tokenizer_json(tokenizer: FastTokenizer, specials: tuple[str, str] = SPECIALS) -> dict[str, Any]:
    """The content of ``tokenizer.json``: texts become rows of L tokens, as the encoder takes them.

    Args:
        tokenizer: CLIP's.
        specials: How a text writes the start and the end token.
    """
    (ids, merges), length = tokenizer.tables(), tokenizer.context_length
    ends = dict(zip(specials, (tokenizer.sot_token_id, tokenizer.eot_token_id), strict=True))
    start, end = ({"SpecialToken": {"id": word, "type_id": 0}} for word in specials)
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": old, "content": new} for old, new in _mended()]
    normalizers += [{"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Lowercase"}]
    split = {"type": "Split", "pattern": {"Regex": f"(?i){_PIECES}"}, "behavior": "Removed", "invert": True}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
        "added_tokens": [{"id": number, "content": word, **flags} for word, number in ends.items()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}, end],
            "special_tokens": {word: {"id": word, "ids": [number], "tokens": [word]} for word, number in ends.items()},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted((ids | ends).items(), key=lambda item: item[1])),
            "merges": [" ".join(pair) for pair in merges],
        },
    }


@dataclass(frozen=True)
class ClipTables:
    """What a ``FastTokenizer`` takes over, from ``tokenizer.json`` and without open_clip, with open_clip's specials."""

    encoder: dict[str, int]
    bpe_ranks: dict[tuple[str, str], int]
    byte_encoder: dict[int, str]
    pat: Any
    context_length: int
    vocab_size: int
    sot_token_id: int
    eot_token_id: int


def read_tables(path: Path, context_length: int, specials: tuple[str, str]) -> ClipTables:
    """The tables in a file that :func:`tokenizer_json` is the content of.

    Args:
        path: ``tokenizer.json``.
        context_length: L.
        specials: How a text writes the start and the end token.

    Raises:
        InputError: It is no such file: words that merging can make are missing, or numbers are not 0, 1, 2, …
    """
    content = read_json(path).get("model")
    words = content.get("vocab") if isinstance(content, dict) else None
    merges = content.get("merges") if isinstance(content, dict) else None
    if not isinstance(words, dict) or not isinstance(merges, list) or not 0 < len(words) <= _MOST_WORDS:
        raise InputError(f"{path}: not CLIP's byte pairs (model.vocab and model.merges)")
    if set(map(type, words.values())) != {int} or sorted(words.values()) != list(range(len(words))):
        raise InputError(f"{path}: the numbers of its words are not those from 0 to {len(words) - 1}")
    letters = byte_letters()
    ids = {word: number for word, number in words.items() if word not in specials}
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else () for pair in merges]
    made = [*letters.values(), *(f"{letter}</w>" for letter in letters.values()), *map("".join, pairs)]
    missing = next((word for word in made if word not in ids), None)
    if missing is not None or len(ids) + 2 != len(words) or {len(pair) for pair in pairs} - {2}:
        what = "the start and end token" if missing is None else repr(printable(missing)[:40])
        raise InputError(f"{path}: not CLIP's byte pairs; {what} cannot be found in its vocabulary")
    start, end = (words[word] for word in specials)
    regex = require("regex", "onnx")
    return ClipTables(
        encoder=ids | {SPECIALS[0]: start, SPECIALS[1]: end},
        bpe_ranks={(pair[0], pair[1]): rank for rank, pair in enumerate(pairs)},
        byte_encoder=letters,
        pat=regex.compile("|".join((*SPECIALS, _PIECES)), regex.IGNORECASE),
        context_length=context_length,
        vocab_size=len(words),
        sot_token_id=start,
        eot_token_id=end,
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON as compact as it goes: a vocabulary has a hundred thousand lines."""
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

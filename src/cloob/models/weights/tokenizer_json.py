"""A stranger's ``tokenizer.json``: looked at before the ``tokenizers`` package reads it, which may panic all the same.

Each step that prepares a text takes what the one before it made: n steps of "a" to "aa" make 2^n letters of one.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloob.errors import InputError, is_failure, one_line, printable, require
from cloob.files import TooLarge, read_at_most
from cloob.models.untrusted import parse_json

_LARGEST = 64 << 20
TRIAL = "A photo of 3 red hearts."
"""A text that every tokenizer has to take, tried when it is opened."""
_MOST_STEPS = 1024
_MOST = 256
"""Letters that all steps make of one, and tokens that a step puts around a text."""
_SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
_KNOWN = {  # the most letters that a step makes of one, as _letters counts them
    "normalizer": {
        **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents"), 1),
        "BertNormalizer": 3,  # spaces around Chinese
        "ByteLevel": 12,  # 4 bytes, of whose letters one (¼) counts three
    },
    "pre_tokenizer": {
        **dict.fromkeys(("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation"), 1),
        **dict.fromkeys(("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"), 1),
        "Metaspace": 2,  # a space in front
        "ByteLevel": 8,  # the same, each 4 bytes
    },
    "post_processor": dict.fromkeys(("BertProcessing", "RobertaProcessing", "ByteLevel"), 1),
}


def opened(path: Path, extra: str) -> Any:
    """The ``Tokenizer`` of a ``tokenizer.json``.

    Args:
        path: The file.
        extra: Ours that brings the package.

    Raises:
        InputError: The package is not installed, or the file is none for it, or as :func:`read_rules`.
    """
    library, rules = require("tokenizers", extra), read_rules(path)
    with guarded(f"{path}: not a tokenizer"):
        return library.Tokenizer.from_str(rules)


def encoded(path: Path, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text; InputError, which names the file, where the package makes none."""
    with guarded(f"{path}: makes no tokens of a text"):
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turns whatever the package raises, panics too, into an InputError that begins so."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(f"{what} ({one_line(error, 100)})") from None


def read_rules(path: Path) -> str:
    """The text of a ``tokenizer.json``.

    Args:
        path: The file.

    Raises:
        InputError: It cannot be read, has more than 64 MB, has steps that are not known here, more than 1,024 of them,
            or such as may make more than 256 letters of one.
    """
    try:
        content = read_at_most(path, _LARGEST)
    except TooLarge as error:
        raise InputError(f"{path}: {error.size:,} bytes are too many for a tokenizer") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    rules, letters = parse_json(path, content), 1.0
    for part, inner in _SEQUENCES.items():
        steps = _steps(rules.get(part), inner)
        if len(steps) > _MOST_STEPS:
            raise InputError(f"{path}: its {part} has {len(steps):,} steps; {_MOST_STEPS:,} are the most")
        for step in steps:
            growth = _growth(part, step)
            if growth is None:
                raise InputError(f"{path}: its {part} has a step that is not known: {printable(repr(step))[:100]}")
            letters *= max(growth, 1)
            if letters > _MOST:
                raise InputError(f"{path}: its {part} may make {letters:,.0f} letters of one; {_MOST} are the most")
    return content.decode()


def _steps(step: Any, inner: str) -> list[Any]:
    """A step, or those that it consists of."""
    if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(inner), list):
        return [each for item in step[inner] for each in _steps(item, inner)]
    return [] if step is None else [step]


def _growth(part: str, step: Any) -> float | None:
    """How many letters a step may make of one; None if it is not known."""
    match part, step:
        case "normalizer", {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return _letters(new) / _letters(old)
        case "normalizer", {"type": "Replace", "pattern": {"Regex": str()}, "content": str(new)}:
            return 1 + _letters(new)  # it may match between two letters
        case "normalizer", {"type": "Prepend", "prepend": str(new)}:
            return 1 + _letters(new)
        case "normalizer", {"type": "Precompiled", "precompiled_charsmap": str(table)}:
            return _longest(table)
        case "post_processor", {"type": "TemplateProcessing", "special_tokens": dict(words)}:
            return _template(step, words)
        case _, {"type": str(kind)}:
            return _KNOWN[part].get(kind)
    return None


def _letters(text: str) -> int:
    """How many letters a text has once they are taken apart, so that none of Unicode's forms makes more of it."""
    return len(unicodedata.normalize("NFKD", text))


def _longest(table: str) -> int | None:
    """The letters of the longest text that sentencepiece's table puts in the place of one; None if it is no table."""
    try:
        content = base64.b64decode(table, validate=True)
        texts = content[4 + int.from_bytes(content[:4], "little") // 4 * 4 :].decode()  # behind the trie
    except ValueError:
        return None
    return max(map(_letters, texts.split("\0")))


def _template(template: dict[Any, Any], words: dict[Any, Any]) -> int | None:
    """1 for a template with the text once in it, and few tokens around it; else None."""
    match template:
        case {"single": list(single), "pair": list(pair)}:
            times = [sum(isinstance(piece, dict) and "Sequence" in piece for piece in side) for side in (single, pair)]
            ids = [word.get("ids") for word in words.values() if isinstance(word, dict)]
            tokens = sum(len(numbers) for numbers in ids if isinstance(numbers, list))
            if times[0] <= 1 and times[1] <= 2 and (len(single) + len(pair)) * tokens <= _MOST:
                return 1
    return None

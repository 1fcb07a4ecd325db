"""CLIP's byte-pair tokenizer: open_clip's tokens in a tenth of its time.

The package ``tokenizers`` merges the bytes of a word's pieces. Printable ASCII without ``&`` comes out of ftfy and
``html.unescape`` as it went in, so it is spared them. No part of the pattern matches white space, so the tokens of a
text are those of its words, and a word's are kept.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from cloob.errors import require
from cloob.models.importing import translated

if TYPE_CHECKING:
    from torch import Tensor

Tokens = npt.NDArray[np.int64]
Ending = Literal["cut", "kept"]

SPECIALS = ("<start_of_text>", "<end_of_text>")
"""How a text of open_clip's writes the start and the end token."""
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_LETTERS = [chr(byte) for byte in range(256)]
"""The letter that stands for each byte: itself where it is visible, else the next one from U+0100 on."""
for _place, _byte in enumerate(sorted({*range(256)} - _VISIBLE)):
    _LETTERS[_byte] = chr(0x100 + _place)
_SENTENCE = "Rules & words: 3 cats, élan — naïve!"
_MAX_WORDS, _MAX_LETTERS = 1 << 16, 32
"""So many words of so many letters are kept (about 15 MB); when they are full, all are forgotten."""


class Tokenizer(ABC):
    """Texts to rows of L = ``context_length`` tokens, for torch and for NumPy."""

    context_length: int
    settings: dict[str, Any] | None = None  # what a model folder says of the tokenizer; None: it is open_clip's

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        torch: Any = importlib.import_module("torch")  # without which an ONNX folder is searched
        tensor: Tensor = torch.from_numpy(self.ids([texts] if isinstance(texts, str) else texts))
        return tensor

    @abstractmethod
    def ids(self, texts: Sequence[str]) -> Tokens: ...


class ClipTokenizer(Tokenizer):
    """The tokens that open_clip's ``SimpleTokenizer`` makes with its default cleaning, and those of its relatives.

    ``specials`` are how a text writes the start and the end token, and their numbers. A text that is too long ends with
    the end token where the ending is ``"kept"``, else with whatever stands there.
    """

    def __init__(self, model: Any, specials: dict[str, int], context_length: int = 77, ending: Ending = "kept") -> None:
        self.context_length = context_length
        self.sot_token_id, self.eot_token_id = specials.values()
        if (*specials, ending) != (*SPECIALS, "kept"):
            self.settings = {"kind": "clip", "specials": list(specials), "ending": ending}
        self._model, self._specials, self._ending = model, specials, ending
        regex = require("regex", "train")  # the pattern of tokenizers knows other letters
        self._pieces = regex.compile("|".join((*map(regex.escape, specials), _PIECES)), regex.IGNORECASE)
        self._words: dict[str, tuple[int, ...]] = {}

    @classmethod
    def of(cls, original: Any, specials: tuple[str, str] = SPECIALS, ending: Ending = "kept") -> Self:
        """With the tables of open_clip's ``SimpleTokenizer``, for which :func:`is_open_clips` holds."""
        ids = {symbol: number for symbol, number in original.encoder.items() if symbol not in SPECIALS}
        pairs = sorted(original.bpe_ranks, key=original.bpe_ranks.__getitem__)
        model = require("tokenizers", "train").models.BPE(ids, pairs, end_of_word_suffix="</w>")
        ends = dict(zip(specials, (original.sot_token_id, original.eot_token_id), strict=True))
        return cls(model, ends, original.context_length, ending)

    @classmethod
    def read(cls, path: Path, specials: tuple[str, str], context_length: int, ending: Ending) -> Self:
        """With the byte pairs of a file that :func:`clip_rules` is the content of."""
        with translated(f"{path}: not CLIP's byte pairs"):
            rules = require("tokenizers", "train").Tokenizer.from_file(str(path))
            vocabulary = rules.get_vocab()
            return cls(rules.model, {word: vocabulary[word] for word in specials}, context_length, ending)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_words": {}}

    def ids(self, texts: Sequence[str]) -> Tokens:
        length = self.context_length
        rows = array("q")
        for text in texts:
            tokens = [self.sot_token_id, *self.encode(text, length)]
            if self._ending == "kept" or len(tokens) < length:
                tokens[length - 1 :] = [self.eot_token_id]
            rows.extend((*tokens[:length], *[0] * (length - len(tokens))))
        return np.array(rows, np.int64).reshape(len(texts), length)

    def encode(self, text: str, enough: int = sys.maxsize) -> list[int]:
        """All tokens of a text, without start and end; or the first of them once they are ``enough``."""
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(require("ftfy", "train").fix_text(text)))
        tokens: list[int] = []
        # White space is made equal before lower() looks at what stands around a capital sigma.
        for word in " ".join(text.split()).lower().split():
            known = self._words.get(word)
            tokens += self._encode_word(word) if known is None else known
            if len(tokens) >= enough:
                break
        return tokens

    def _encode_word(self, word: str) -> tuple[int, ...]:
        tokens: list[int] = []
        for piece in self._pieces.findall(word):
            if piece in self._specials:
                tokens.append(self._specials[piece])
            else:
                letters = "".join([_LETTERS[byte] for byte in piece.encode()])
                tokens += [token.id for token in self._model.tokenize(letters)]
        if len(word) <= _MAX_LETTERS:
            if len(self._words) >= _MAX_WORDS:
                self._words.clear()
            self._words[word] = tuple(tokens)
        return tuple(tokens)


def clip_rules(tokenizer: ClipTokenizer, specials: Sequence[str], normalizers: Sequence[Any], *, lower: bool) -> Any:
    """A ``tokenizers.Tokenizer`` of the same byte pairs for other programs: start, tokens, end.

    Special words are looked for in the prepared text where ``lower`` is set.
    """
    library: Any = require("tokenizers", "train")
    start, end = zip(specials, (tokenizer.sot_token_id, tokenizer.eot_token_id), strict=True)
    byte_pairs = json.loads(library.Tokenizer(tokenizer._model).to_str())["model"]
    ids = {word: number for word, number in byte_pairs["vocab"].items() if word not in tokenizer._specials}
    ids = dict(sorted((ids | dict((start, end))).items(), key=lambda item: item[1]))
    pairs = [tuple(pair) for pair in byte_pairs["merges"]]
    rules = library.Tokenizer(
        library.models.BPE(ids, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=end[0])
    )
    rules.normalizer = library.normalizers.Sequence(list(normalizers))
    split = library.Regex(f"(?i:{'|'.join((*map(re.escape, specials), _PIECES))})")
    rules.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(split, behavior="removed", invert=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rules.decoder = library.decoders.ByteLevel()
    rules.post_processor = library.processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    rules.add_special_tokens([library.AddedToken(word, special=True, normalized=lower) for word in specials])
    return rules


def is_open_clips(tokenizer: Any) -> bool:
    """Whether a tokenizer is open_clip's own, with its default cleaning, vocabulary ends and truncation."""
    module = sys.modules.get("open_clip.tokenizer")  # not imported: then it cannot be one
    return bool(
        module is not None
        and type(tokenizer) is module.SimpleTokenizer
        and tokenizer.clean_fn is module.get_clean_fn("lower")
        and tokenizer.reduction_fn is None
        and len(tokenizer.all_special_ids) == 2
    )


def describe(tokenizer: Any) -> str:
    """What tells a tokenizer from others: its rules, or its vocabulary and the tokens of a sentence."""
    if hasattr(tokenizer, "description"):
        return str(tokenizer.description())
    tokens = None
    with contextlib.suppress(Exception):  # there is no tokenizer, or it is anybody's
        tokens = np.asarray(tokenizer([_SENTENCE])).tolist()
    vocabulary: dict[str, int] = getattr(getattr(tokenizer, "tokenizer", None), "get_vocab", dict)()  # of transformers
    return f"{getattr(tokenizer, 'settings', None)} {tokens} {sorted(vocabulary.items())}"

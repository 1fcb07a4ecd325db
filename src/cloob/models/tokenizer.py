"""CLIP's byte-pair tokenizer, open_clip's tokens in a tenth of its time; and those of
files, without torch.

No part of CLIP's pattern matches white space: the tokens of a text are those of its
words, and a word's are kept.

Settings, in ``open_clip_config.json`` or ``onnx.json``, have one of these kinds:

- ``clip`` (``specials``: [start, end]; ``ending``: kept or cut): CLIP's byte pairs;
- ``hub`` (``pad``, ``end``): tokenizer.json, rows of which are filled with ``pad``;
- ``json`` (``clean``, ``strip``): tokenizer.json after one of open_clip's cleanings;
  zeros replace the token ``strip``;
- ``rinna``: sentencepiece's ``spiece.model``; ``none`` (``why``): the model takes
  tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, require
from cloob.models.importing import import_open_clip, translated

if TYPE_CHECKING:
    from torch import Tensor

Tokens = npt.NDArray[np.int64]
Ending = Literal["cut", "kept"]

SPECIALS = (
    "<start_of_text>",
    "<end_of_text>",
)  # open_clip's start and end tokens as a text writes them
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = sorted({*range(256)} - _VISIBLE)
_LETTERS = [
    chr(byte if byte in _VISIBLE else 0x100 + _HIDDEN.index(byte))
    for byte in range(256)
]
_SENTENCE = "Rules & words: 3 cats, élan — naïve!"
_MAX_WORDS, _MAX_LETTERS = 1 << 16, 32  # kept: about 15 MB
CLIP_VOCABULARY = 49408
HUB_FILE = "tokenizer.json"
_CLEANINGS = ("whitespace", "lower", "canonicalize")  # open_clip's


class Tokenizer(ABC):
    """Texts to rows of L = ``context_length`` tokens, for torch and for NumPy."""

    context_length: int
    settings: dict[str, Any] | None = (
        None  # as a model folder stores them; None: it is open_clip's
    )

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        import torch  # without which an ONNX folder is searched

        return torch.from_numpy(self.ids([texts] if isinstance(texts, str) else texts))

    @abstractmethod
    def ids(self, texts: Sequence[str]) -> Tokens: ...


class ClipTokenizer(Tokenizer):
    """The tokens of open_clip's ``SimpleTokenizer``; ``ending``: whether a text that is
    cut keeps its end token.
    """

    def __init__(
        self,
        model: Any,
        specials: dict[str, int],
        context_length: int = 77,
        ending: Ending = "kept",
    ) -> None:
        self.context_length = context_length
        self.sot_token_id, self.eot_token_id = specials.values()
        if (*specials, ending) != (*SPECIALS, "kept"):
            self.settings = {
                "kind": "clip",
                "specials": list(specials),
                "ending": ending,
            }
        self._model, self._specials, self._ending = model, specials, ending
        regex = require(
            "regex", "train"
        )  # the pattern of tokenizers knows other letters
        self._pieces = regex.compile(
            "|".join((*map(regex.escape, specials), _PIECES)), regex.IGNORECASE
        )
        self._words: dict[str, list[int]] = {}

    @classmethod
    def of(
        cls,
        original: Any,
        specials: tuple[str, str] = SPECIALS,
        ending: Ending = "kept",
    ) -> Self:
        ids = {
            symbol: number
            for symbol, number in original.encoder.items()
            if symbol not in SPECIALS
        }
        pairs = sorted(original.bpe_ranks, key=original.bpe_ranks.__getitem__)
        model = require("tokenizers", "train").models.BPE(
            ids, pairs, end_of_word_suffix="</w>"
        )
        ends = dict(
            zip(specials, (original.sot_token_id, original.eot_token_id), strict=True)
        )
        return cls(model, ends, original.context_length, ending)

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
        """All tokens of a text, without start and end; or the first of them once they
        are ``enough``.
        """
        if not (
            text.isascii() and text.isprintable() and "&" not in text
        ):  # which ftfy leaves as it is
            text = html.unescape(html.unescape(require("ftfy", "train").fix_text(text)))
        tokens: list[int] = []
        # White space is made equal before lower() looks at what stands around a capital
        # sigma.
        for word in " ".join(text.split()).lower().split():
            known = self._words.get(word)
            if known is None:
                known = []
                for piece in self._pieces.findall(word):
                    if piece in self._specials:
                        known.append(self._specials[piece])
                    else:
                        letters = "".join([_LETTERS[byte] for byte in piece.encode()])
                        known += [token.id for token in self._model.tokenize(letters)]
                if len(word) <= _MAX_LETTERS:
                    if len(self._words) >= _MAX_WORDS:
                        self._words.clear()
                    self._words[word] = known
            tokens += known
            if len(tokens) >= enough:
                break
        return tokens


def clip_rules(
    tokenizer: ClipTokenizer,
    specials: Sequence[str],
    normalizers: Sequence[Any],
    *,
    lower: bool,
) -> Any:
    """A ``tokenizers.Tokenizer`` of the same byte pairs for other programs; ``lower``:
    its specials are normalised.
    """
    library: Any = require("tokenizers", "train")
    start, end = zip(
        specials, (tokenizer.sot_token_id, tokenizer.eot_token_id), strict=True
    )
    byte_pairs = json.loads(library.Tokenizer(tokenizer._model).to_str())["model"]
    ids = {
        word: number
        for word, number in byte_pairs["vocab"].items()
        if word not in tokenizer._specials
    }
    ids = dict(sorted((ids | dict((start, end))).items(), key=lambda item: item[1]))
    pairs = [tuple(pair) for pair in byte_pairs["merges"]]
    options = {
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>",
        "unk_token": end[0],
    }
    rules = library.Tokenizer(library.models.BPE(ids, pairs, **options))
    rules.normalizer = library.normalizers.Sequence(list(normalizers))
    split = library.Regex(f"(?i:{'|'.join((*map(re.escape, specials), _PIECES))})")
    pieces = library.pre_tokenizers.Split(split, behavior="removed", invert=True)
    letters = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules.pre_tokenizer = library.pre_tokenizers.Sequence([pieces, letters])
    rules.decoder = library.decoders.ByteLevel()
    rules.post_processor = library.processors.RobertaProcessing(
        end, start, trim_offsets=False, add_prefix_space=False
    )
    rules.add_special_tokens(
        [library.AddedToken(word, special=True, normalized=lower) for word in specials]
    )
    return rules


def is_open_clips(tokenizer: Any) -> bool:
    """Whether a tokenizer is open_clip's, with its default cleaning, vocabulary ends
    and truncation.
    """
    module = sys.modules.get(
        "open_clip.tokenizer"
    )  # not imported: then it cannot be one
    if (
        module is None
        or type(tokenizer) is not module.SimpleTokenizer
        or tokenizer.reduction_fn is not None
    ):
        return False
    return (
        tokenizer.clean_fn is module.get_clean_fn("lower")
        and len(tokenizer.all_special_ids) == 2
    )


def describe(tokenizer: Any) -> str:
    """What tells a tokenizer from others: its rules, or its vocabulary and the tokens
    of a sentence.
    """
    if isinstance(tokenizer, FileTokenizer):
        return (
            f"{tokenizer.settings} {tokenizer.context_length}"
            f" {tokenizer.rules.to_str()}"
        )
    if isinstance(tokenizer, RinnaTokenizer):
        return (
            f"{hashlib.sha256(tokenizer.content).hexdigest()}"
            f" {tokenizer.context_length}"
        )
    tokens = None
    with contextlib.suppress(Exception):  # there is no tokenizer, or it is anybody's
        tokens = np.asarray(tokenizer([_SENTENCE])).tolist()
    vocabulary: dict[str, int] = getattr(
        getattr(tokenizer, "tokenizer", None), "get_vocab", dict
    )()  # of transformers
    return (
        f"{getattr(tokenizer, 'settings', None)} {tokens} {sorted(vocabulary.items())}"
    )


@dataclass(eq=False)
class NoTokenizer(Tokenizer):
    """In the place of a missing tokenizer: the model takes tokens, and texts raise an
    InputError with the reason.
    """

    why: str
    settings: dict[str, Any] | None = None

    def ids(self, texts: Sequence[str]) -> Tokens:
        raise InputError(self.why)


class FileTokenizer(Tokenizer):
    """The tokens of a ``tokenizer.json``: by the model folder's padding and end, or by
    an export's cleaning.
    """

    def __init__(
        self, path: Path, context_length: int, settings: dict[str, Any]
    ) -> None:
        self.context_length, self.settings = context_length, settings
        self.pad, self.end, self.clean, self.strip = (
            settings.get(key) for key in ("pad", "end", "clean", "strip")
        )
        with translated(f"{path}: no tokenizer that can be used"):
            self.rules = require("tokenizers", "train").Tokenizer.from_file(str(path))
            if self.pad is not None:
                token = self.rules.id_to_token(self.pad) or ""
                self.rules.enable_padding(
                    pad_id=self.pad, pad_token=token, length=context_length
                )
                self.rules.enable_truncation(context_length)
            self.ids(["A photo of 3 red hearts."])

    def ids(self, texts: Sequence[str]) -> Tokens:
        if self.clean is not None:
            texts = list(
                map(import_open_clip(".tokenizer").get_clean_fn(self.clean), texts)
            )
        rows = [encoding.ids for encoding in self.rules.encode_batch(list(texts))]
        tokens = np.array(rows, np.int64).reshape(len(texts), self.context_length)
        return (
            tokens if self.strip is None else np.where(tokens == self.strip, 0, tokens)
        )

    def save_pretrained(self, folder: Path) -> None:
        _write(self.rules, folder, self.context_length, self.pad or 0, self.end)


class RinnaTokenizer(Tokenizer):
    """rinna's Japanese pieces by sentencepiece alone: the text in lower case, ``[CLS]``
    in front, no end token.
    """

    FILE = "spiece.model"
    PAD = 3
    _CLS = 4
    _SPECIAL = re.compile(r"(<unk>|<s>|</s>|\[PAD\]|\[CLS\]|\[SEP\]|\[MASK\])")

    def __init__(self, path: Path, context_length: int) -> None:
        self.context_length, self.content = context_length, path.read_bytes()
        with translated(f"{path}: not a model of sentencepiece"):
            self._pieces = require("sentencepiece", "train").SentencePieceProcessor(
                model_proto=self.content
            )

    def ids(self, texts: Sequence[str]) -> Tokens:
        rows = np.full((len(texts), self.context_length), self.PAD, np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._CLS]
            for i, part in enumerate(
                self._SPECIAL.split(text)
            ):  # every other part is special
                ids += (
                    [self._pieces.piece_to_id(part)]
                    if i % 2
                    else self._pieces.encode(part.strip().lower())
                )
            row[: len(ids)] = ids[: self.context_length]
        return rows


def clip_tokenizer(
    path: Path,
    vocabulary: int,
    context_length: int,
    specials: tuple[str, str],
    ending: Ending,
) -> Tokenizer:
    """CLIP's tokenizer for a model with CLIP's vocabulary; for another one a
    placeholder that raises InputError.
    """
    if vocabulary == CLIP_VOCABULARY:
        original = import_open_clip(".tokenizer").SimpleTokenizer(
            context_length=context_length
        )
        return ClipTokenizer.of(original, specials, ending)
    why = (
        f"{path}: its vocabulary has {vocabulary} words, not CLIP's {CLIP_VOCABULARY};"
        " give tokens, not texts"
    )
    return NoTokenizer(
        why, {"kind": "clip", "specials": list(specials), "ending": ending}
    )


def read_tokenizer(
    file: Path, settings: dict[str, Any], length: int, vocabulary: int | None = None
) -> Tokenizer:
    """The tokenizer by the settings in a model folder's ``file``; CLIP's is open_clip's
    where a vocabulary is given.
    """
    stored = file.parent / HUB_FILE
    match settings:
        case {"kind": "rinna"}:
            return RinnaTokenizer(file.parent / RinnaTokenizer.FILE, length)
        case {"kind": "hub"} if not stored.is_file():
            why = (
                f"{file.parent}: no {HUB_FILE} in it; give tokens, or save the"
                " tokenizer there"
            )
            return NoTokenizer(why, settings)
        case {"kind": "json", "clean": _, "strip": _} | {"kind": "hub"}:
            return FileTokenizer(stored, length, settings)
        case {"kind": "json"}:
            raise InputError(f"{file}: its tokenizer lacks clean or strip")
        case {"kind": "clip", "specials": [start, end], "ending": ending}:
            if vocabulary is not None:
                return clip_tokenizer(file, vocabulary, length, (start, end), ending)
            with translated(f"{stored}: not CLIP's byte pairs"):
                rules = require("tokenizers", "train").Tokenizer.from_file(str(stored))
                words = {word: rules.get_vocab()[word] for word in (start, end)}
                return ClipTokenizer(rules.model, words, length, ending)
    return NoTokenizer(f"{file}: the model has no tokenizer; give tokens, not texts")


def store_tokenizer(
    tokenizer: Any, folder: Path, context_length: int
) -> dict[str, Any]:
    """Writes the file of a ``DualEncoder``'s tokenizer for L tokens; returns its
    settings for ``onnx.json``.
    """
    if isinstance(tokenizer, RinnaTokenizer):
        (folder / RinnaTokenizer.FILE).write_bytes(tokenizer.content)
        return {"kind": "rinna"}
    library: Any = require("tokenizers", "train")
    settings: dict[str, Any] = {"kind": "json", "clean": None, "strip": None}
    pad, side = 0, "right"
    if isinstance(tokenizer, ClipTokenizer):
        settings = tokenizer.settings or {
            "kind": "clip",
            "specials": list(SPECIALS),
            "ending": "kept",
        }
        # open_clip's cleaning of usual texts: straight quotes, NFC, spaces and case.
        normalizers, patterns = (
            library.normalizers,
            {"[ʼ‘-‛]": "'", "[“-‟]": '"', "\\s+": " "},
        )
        quotes = [
            normalizers.Replace(library.Regex(old), new)
            for old, new in patterns.items()
        ]
        cleaning = [
            *quotes,
            normalizers.NFC(),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
        rules = clip_rules(tokenizer, settings["specials"], cleaning, lower=True)
    elif isinstance(tokenizer, FileTokenizer):
        rules, pad = tokenizer.rules, tokenizer.pad or 0
    else:
        original: Any = getattr(
            tokenizer, "tokenizer", None
        )  # of transformers, in open_clip's or a PaddedTokenizer
        module = sys.modules.get("open_clip.tokenizer")
        if module is not None and type(tokenizer) is module.HFTokenizer:
            cleanings = {module.get_clean_fn(name): name for name in _CLEANINGS}
            settings["clean"] = cleanings.get(tokenizer.clean_fn)
            settings["strip"] = (
                int(tokenizer.tokenizer.sep_token_id)
                if tokenizer.strip_sep_token
                else None
            )
            original = (
                None
                if settings["clean"] is None or tokenizer.tokenizer_mode
                else original
            )
        if (
            getattr(original, "backend_tokenizer", None) is None
            or original.pad_token_id is None
        ):
            none = isinstance(tokenizer, NoTokenizer)
            why = (
                "the model takes tokens"
                if none
                else f"{type(tokenizer).__name__} cannot be written as a file"
            )
            return {"kind": "none", "why": why}
        rules = library.Tokenizer.from_str(original.backend_tokenizer.to_str())
        pad, side = int(original.pad_token_id), str(original.padding_side)
    _write(rules, folder, context_length, pad, side=side)
    return settings


def _write(
    rules: Any,
    folder: Path,
    length: int,
    pad: int,
    end: int | None = None,
    side: str = "right",
) -> None:
    token = rules.id_to_token(pad) or ""
    rules.enable_padding(direction=side, pad_id=pad, pad_token=token, length=length)
    rules.enable_truncation(length)
    (folder / HUB_FILE).write_text(rules.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    config |= {"padding_side": side, "pad_token": token}
    config |= {} if end is None else {"eos_token": rules.id_to_token(end)}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2), encoding="utf-8"
    )


def tokenizer_note(settings: dict[str, Any]) -> str:
    """A sentence for people who use the folder without this package: how its tokens
    differ from the model's.
    """
    notes = json.loads(
        Path(__file__).with_name("tokenizer_notes.json").read_text("utf-8")
    )
    which = (
        settings["kind"],
        settings.get("ending"),
        "clean" if settings.get("clean") else None,
    )
    return str(notes[" ".join(filter(None, which))]).format(**settings)

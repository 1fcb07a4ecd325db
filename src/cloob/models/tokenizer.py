"""CLIP's byte-pair tokenizer, open_clip's tokens in less time than its; and those of
files, without torch.

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
import html
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, Self, TypedDict

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, require
from cloob.models.importing import import_open_clip, translated

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Tokenizer as Rules
    from tokenizers.models import BPE
    from torch import Tensor

Tokens = npt.NDArray[np.int64]
Ending = Literal["cut", "kept"]


class TokenizerSettings(TypedDict, total=False):
    """What a model folder stores of its tokenizer, by its kind."""

    kind: Required[Literal["clip", "hub", "json", "rinna", "none"]]
    specials: list[str]
    ending: Ending
    pad: int
    end: int
    clean: str | None
    strip: int | None
    why: str


SPECIALS = ("<start_of_text>", "<end_of_text>")  # open_clip's, as a text writes them
OPENAI_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
CLIP_VOCABULARY = 49408
HUB_FILE = "tokenizer.json"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SENTENCES = [
    "Rules & words: 3 cats, élan — naïve!",
    "Ωmega, ЛЕТО, 猫と犬; don't over-fit 1,024 <b>numbers</b> &amp; 🐈",
    "the quick brown fox jumps over the lazy dog " * 20,
]
_CLEANINGS = ("whitespace", "lower", "canonicalize")  # open_clip's


class Tokenizer(ABC):
    """Texts to rows of L = ``context_length`` tokens, for torch and for NumPy."""

    context_length: int
    # as a model folder stores them; None: it is open_clip's
    settings: TokenizerSettings | None = None

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        import torch  # without which an ONNX folder is searched

        return torch.from_numpy(self.ids([texts] if isinstance(texts, str) else texts))

    @abstractmethod
    def ids(self, texts: Sequence[str]) -> Tokens: ...

    @abstractmethod
    def store(self, folder: Path) -> TokenizerSettings:
        """Writes its file, if it has one; returns its settings for ``onnx.json``."""


class ClipTokenizer(Tokenizer):
    """The tokens of open_clip's ``SimpleTokenizer``; ``ending``: whether a text that is
    cut keeps its end token.
    """

    def __init__(
        self,
        model: BPE,
        specials: dict[str, int],
        context_length: int = 77,
        ending: Ending = "kept",
    ) -> None:
        self.context_length = context_length
        self.specials = specials
        self.sot_token_id, self.eot_token_id = specials.values()
        self.ending = ending
        if (*specials, ending) != (*SPECIALS, "kept"):
            self.settings = _clip_settings(specials, ending)
        library = require("tokenizers", "train")
        self.rules = library.Tokenizer(model)
        self.rules.pre_tokenizer = library.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        self.rules.add_special_tokens([*specials])
        # The pattern of tokenizers knows other letters.
        regex = require("regex", "train")
        self._pieces = regex.compile(_pattern(specials), regex.IGNORECASE)

    @classmethod
    def of(
        cls,
        original: SimpleTokenizer,
        specials: tuple[str, str] = SPECIALS,
        ending: Ending = "kept",
    ) -> Self:
        """open_clip's, which may write its two special tokens in another way."""
        ids = dict(original.encoder)
        ends = dict(zip(specials, [ids.pop(word) for word in SPECIALS], strict=True))
        pairs = sorted(original.bpe_ranks, key=original.bpe_ranks.__getitem__)
        library = require("tokenizers", "train")
        model = library.models.BPE(ids | ends, pairs, end_of_word_suffix="</w>")
        return cls(model, ends, original.context_length, ending)

    def ids(self, texts: Sequence[str]) -> Tokens:
        length = self.context_length
        rows = np.zeros((len(texts), length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            tokens = [self.sot_token_id, *self.encode(text, length)][:length]
            if len(tokens) < length:
                tokens.append(self.eot_token_id)
            elif self.ending == "kept":
                tokens[-1] = self.eot_token_id
            row[: len(tokens)] = tokens
        return rows

    def encode(self, text: str, pieces: int | None = None) -> list[int]:
        """All tokens of a text, without start and end; or those of its first pieces, of
        one token at least each.
        """
        # ftfy leaves other texts as they are.
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(require("ftfy", "train").fix_text(text)))
        # White space is made equal before lower() looks at what stands around a capital
        # sigma.
        text = " ".join(text.split()).lower()
        encoding = self.rules.encode(
            self._pieces.findall(text)[:pieces],
            is_pretokenized=True,
            add_special_tokens=False,
        )
        return list(encoding.ids)

    def store(self, folder: Path) -> TokenizerSettings:
        rules = clip_rules(self, list(self.specials), lower=True)
        _write_rules(rules, folder, self.context_length, pad=0)
        return _clip_settings(self.specials, self.ending)


def _clip_settings(specials: Iterable[str], ending: Ending) -> TokenizerSettings:
    return {"kind": "clip", "specials": list(specials), "ending": ending}


def _pattern(specials: Iterable[str]) -> str:
    """What matches the pieces of a text, special words first."""
    return "|".join([*map(re.escape, specials), _PIECES])


def clip_rules(
    tokenizer: ClipTokenizer, specials: Sequence[str], *, lower: bool
) -> Rules:
    """A ``tokenizers.Tokenizer`` of the same byte pairs for other programs, with these
    words for start and end. It cleans usual texts as open_clip does: straight quotes,
    NFC, spaces and case; ``lower``: also what may be a special word.
    """
    library = require("tokenizers", "train")
    model = json.loads(tokenizer.rules.to_str())["model"]
    vocabulary = model["vocab"]
    for word in tokenizer.specials:
        del vocabulary[word]
    ends = list(zip(specials, tokenizer.specials.values(), strict=True))
    content = json.loads(Path(__file__).with_name("clip_rules.json").read_text("utf-8"))
    content["model"]["vocab"] = vocabulary | dict(ends)
    content["model"]["merges"] = model["merges"]
    content["model"]["unk_token"] = specials[1]
    content["post_processor"]["cls"], content["post_processor"]["sep"] = ends
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = f"(?i:{_pattern(specials)})"
    rules: Rules = library.Tokenizer.from_str(json.dumps(content))
    rules.add_special_tokens(
        [library.AddedToken(word, special=True, normalized=lower) for word in specials]
    )
    return rules


def is_open_clips(tokenizer: Any) -> bool:
    """Whether a tokenizer is open_clip's, with its default cleaning, vocabulary ends
    and truncation.
    """
    module = sys.modules.get("open_clip.tokenizer")
    # Not imported: then it cannot be one.
    if module is None or type(tokenizer) is not module.SimpleTokenizer:
        return False
    return (
        tokenizer.reduction_fn is None
        and tokenizer.clean_fn is module.get_clean_fn("lower")
        and len(tokenizer.all_special_ids) == 2
    )


def describe(tokenizer: Callable[[list[str]], object]) -> str:
    """What tells a tokenizer from others: its settings, and the tokens of sentences."""
    tokens = None
    with contextlib.suppress(Exception):  # there is no tokenizer, or it is anybody's
        tokens = np.asarray(tokenizer(_SENTENCES)).tolist()
    return f"{getattr(tokenizer, 'settings', None)} {tokens}"


@dataclass(eq=False)
class NoTokenizer(Tokenizer):
    """In the place of a missing tokenizer: the model takes tokens, and texts raise an
    InputError with the reason.
    """

    why: str
    settings: TokenizerSettings | None = None

    def ids(self, texts: Sequence[str]) -> Tokens:
        raise InputError(self.why)

    def store(self, folder: Path) -> TokenizerSettings:
        return {"kind": "none", "why": "the model takes tokens"}


class FileTokenizer(Tokenizer):
    """The tokens of a ``tokenizer.json``: by the model folder's padding and end, or by
    an export's cleaning.
    """

    settings: TokenizerSettings

    def __init__(
        self, path: Path, context_length: int, settings: TokenizerSettings
    ) -> None:
        self.context_length = context_length
        self.settings = settings
        self.pad = settings.get("pad")
        self.end = settings.get("end")
        with translated(f"{path}: no tokenizer that can be used"):
            self.rules = require("tokenizers", "train").Tokenizer.from_file(str(path))
            if self.pad is not None:
                _fix_length(self.rules, context_length, self.pad)
            self.ids(_SENTENCES)

    def ids(self, texts: Sequence[str]) -> Tokens:
        texts = list(texts)
        cleaning = self.settings.get("clean")
        if cleaning is not None:
            clean = import_open_clip(".tokenizer").get_clean_fn(cleaning)
            texts = [clean(text) for text in texts]
        rows = [encoding.ids for encoding in self.rules.encode_batch(texts)]
        tokens = np.array(rows, np.int64).reshape(len(texts), self.context_length)
        separator = self.settings.get("strip")
        if separator is not None:
            tokens[tokens == separator] = 0
        return tokens

    def store(self, folder: Path) -> TokenizerSettings:
        _write_rules(self.rules, folder, self.context_length, self.pad or 0, self.end)
        return {"kind": "json", "clean": None, "strip": None}


class RinnaTokenizer(Tokenizer):
    """rinna's Japanese pieces by sentencepiece alone: the text in lower case, ``[CLS]``
    in front, no end token.
    """

    FILE = "spiece.model"
    PAD = 3
    _CLS = 4
    _SPECIAL = re.compile(r"(<unk>|<s>|</s>|\[PAD\]|\[CLS\]|\[SEP\]|\[MASK\])")

    def __init__(self, path: Path, context_length: int) -> None:
        self.context_length = context_length
        self.content = path.read_bytes()
        library = require("sentencepiece", "train")
        with translated(f"{path}: not a model of sentencepiece"):
            self._pieces = library.SentencePieceProcessor(model_proto=self.content)

    def ids(self, texts: Sequence[str]) -> Tokens:
        rows = np.full((len(texts), self.context_length), self.PAD, np.int64)
        for row, text in zip(rows, texts, strict=True):
            tokens = [self._CLS]
            for part in self._SPECIAL.split(text):
                if self._SPECIAL.fullmatch(part):
                    tokens.append(self._pieces.piece_to_id(part))
                else:
                    tokens += self._pieces.encode(part.strip().lower())
            row[: len(tokens)] = tokens[: self.context_length]
        return rows

    def store(self, folder: Path) -> TokenizerSettings:
        (folder / self.FILE).write_bytes(self.content)
        return {"kind": "rinna"}


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
        library = import_open_clip(".tokenizer")
        original = library.SimpleTokenizer(context_length=context_length)
        return ClipTokenizer.of(original, specials, ending)
    why = (
        f"{path}: its vocabulary has {vocabulary} words, not CLIP's {CLIP_VOCABULARY};"
        " give tokens, not texts"
    )
    return NoTokenizer(why, _clip_settings(specials, ending))


def read_tokenizer(
    file: Path, settings: TokenizerSettings, length: int, vocabulary: int | None = None
) -> Tokenizer:
    """The tokenizer by the settings in a model folder's ``file``; CLIP's is open_clip's
    where a vocabulary is given.
    """
    folder = file.parent
    rules_file = folder / HUB_FILE
    match settings:
        case {"kind": "rinna"}:
            return RinnaTokenizer(folder / RinnaTokenizer.FILE, length)
        case {"kind": "hub"} if not rules_file.is_file():
            why = f"no {HUB_FILE} in it; give tokens, or save the tokenizer there"
            return NoTokenizer(f"{folder}: {why}", settings)
        case {"kind": "json", "clean": _, "strip": _} | {"kind": "hub"}:
            return FileTokenizer(rules_file, length, settings)
        case {"kind": "json"}:
            raise InputError(f"{file}: its tokenizer lacks clean or strip")
        case {"kind": "clip", "specials": [start, end], "ending": ending}:
            if vocabulary is not None:
                return clip_tokenizer(file, vocabulary, length, (start, end), ending)
            with translated(f"{rules_file}: not CLIP's byte pairs"):
                library = require("tokenizers", "train")
                rules = library.Tokenizer.from_file(str(rules_file))
                specials = {word: rules.token_to_id(word) for word in (start, end)}
                return ClipTokenizer(rules.model, specials, length, ending)
    return NoTokenizer(f"{file}: the model has no tokenizer; give tokens, not texts")


def store_tokenizer(
    tokenizer: object, folder: Path, context_length: int
) -> TokenizerSettings:
    """Writes the file of a ``DualEncoder``'s tokenizer for L tokens; returns its
    settings for ``onnx.json``.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.store(folder)
    settings = _file_settings(tokenizer)
    original: Any = getattr(tokenizer, "tokenizer", None)  # of transformers
    backend = getattr(original, "backend_tokenizer", None)
    if settings is None or backend is None or original.pad_token_id is None:
        why = f"{type(tokenizer).__name__} cannot be written as a file"
        return {"kind": "none", "why": why}
    rules = require("tokenizers", "train").Tokenizer.from_str(backend.to_str())
    pad = int(original.pad_token_id)
    _write_rules(rules, folder, context_length, pad, side=str(original.padding_side))
    return settings


def _file_settings(tokenizer: Any) -> TokenizerSettings | None:
    """Settings by which a ``tokenizer.json`` gives what a tokenizer does: with what
    open_clip does to texts before, and to tokens after; None where no file can.
    """
    settings: TokenizerSettings = {"kind": "json", "clean": None, "strip": None}
    module: Any = sys.modules.get("open_clip.tokenizer")
    if module is None or type(tokenizer) is not module.HFTokenizer:
        return settings
    cleanings = {module.get_clean_fn(name): name for name in _CLEANINGS}
    if tokenizer.tokenizer_mode or tokenizer.clean_fn not in cleanings:
        return None
    settings["clean"] = cleanings[tokenizer.clean_fn]
    if tokenizer.strip_sep_token:
        settings["strip"] = int(tokenizer.tokenizer.sep_token_id)
    return settings


def _write_rules(
    rules: Rules,
    folder: Path,
    length: int,
    pad: int,
    end: int | None = None,
    side: str = "right",
) -> None:
    """Writes a tokenizer's rules and settings as transformers reads them."""
    _fix_length(rules, length, pad, side)
    (folder / HUB_FILE).write_text(rules.to_str(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "padding_side": side,
        "pad_token": rules.id_to_token(pad) or "",
    }
    if end is not None:
        config["eos_token"] = rules.id_to_token(end)
    text = json.dumps(config, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _fix_length(rules: Rules, length: int, pad: int, side: str = "right") -> None:
    """Every row has this length from now on."""
    token = rules.id_to_token(pad) or ""
    rules.enable_padding(direction=side, pad_id=pad, pad_token=token, length=length)
    rules.enable_truncation(length)

"""The tokens that the original programs make of a text, where they are not open_clip's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cloob.errors import InputError, require
from cloob.models.importing import import_open_clip
from cloob.models.tokenizer import FastTokenizer, Tokens, as_tensor
from cloob.models.untrusted import read_json
from cloob.models.weights.tokenizer_json import TRIAL, encoded, opened, read_rules

if TYPE_CHECKING:
    from torch import Tensor

CLIP_VOCABULARY = 49408
HUB_FILE = "tokenizer.json"
Ending = Literal["cut", "kept"]


class ClipTokenizer(FastTokenizer):
    """CLIP's byte pairs with the special words and the handling of long texts of one program.

    Args:
        specials: How a text writes the start and the end token.
        ending: What a text that is too long ends with: ``"kept"`` the end token, ``"cut"`` whatever stands there.
        context_length: L.
        tables: What ``FastTokenizer`` takes over; None: open_clip's.
    """

    def __init__(self, specials: tuple[str, str], ending: Ending, context_length: int = 77, tables: Any = None) -> None:
        original = tables or import_open_clip(".tokenizer").SimpleTokenizer(context_length=context_length)
        super().__init__(original)
        if specials != self._specials:
            ids = dict(zip(specials, (self.sot_token_id, self.eot_token_id), strict=True))
            self._ids = {key: value for key, value in self._ids.items() if key not in self._specials} | ids
            pieces = original.pat.pattern.removeprefix("|".join(self._specials))
            words = "|".join(map(re.escape, specials))
            self._pieces = require("regex", "train").compile(words + pieces, original.pat.flags)
        self._specials, self._ending = specials, ending
        self.settings = _settings(specials, ending)

    def _row(self, tokens: list[int], length: int) -> list[int]:
        """As ``FastTokenizer``; where long texts are cut, their last token is one of their own."""
        if self._ending == "cut" and len(tokens) >= length:
            return tokens[:length]
        return super()._row(tokens, length)


class NoTokenizer:
    """In the place of a tokenizer that is not there: such a model takes tokens, and says so of texts.

    Args:
        why: The line of the error.
        settings: What a model folder says of the tokenizer.
    """

    def __init__(self, why: str, settings: dict[str, Any] | None = None) -> None:
        self._why = why
        self.settings = settings

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing, as there is nothing."""

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Raises InputError."""
        raise InputError(self._why)

    def ids(self, texts: str | Sequence[str], context_length: int | None = None) -> Tokens:
        """Raises InputError."""
        raise InputError(self._why)


def _settings(specials: tuple[str, str], ending: Ending) -> dict[str, Any]:
    """What a model folder says of a tokenizer that is not quite open_clip's."""
    return {"kind": "clip", "specials": list(specials), "ending": ending}


def clip_tokenizer(
    path: Path, vocabulary: int, context_length: int, specials: tuple[str, str], ending: Ending
) -> ClipTokenizer | NoTokenizer:
    """CLIP's tokenizer for a model with CLIP's vocabulary; for another one what says that there is none."""
    if vocabulary == CLIP_VOCABULARY:
        return ClipTokenizer(specials, ending, context_length)
    why = f"{path}: its vocabulary has {vocabulary} words, not CLIP's {CLIP_VOCABULARY}; give tokens, not texts"
    return NoTokenizer(why, _settings(specials, ending))


def stored_tokenizer(path: Path, settings: Any, text: dict[str, Any]) -> Any:
    """The tokenizer that the settings in a model folder ask for.

    Args:
        path: The file that the settings are in.
        settings: As the ``settings`` of the tokenizer that was saved.
        text: open_clip's ``text_cfg``.

    Raises:
        InputError: They are none.
    """
    length, vocabulary = text.get("context_length", 77), text.get("vocab_size", CLIP_VOCABULARY)
    match settings:
        case {"kind": "clip", "specials": [str(start), str(end)], "ending": "cut" | "kept" as ending} if start and end:
            return clip_tokenizer(path, vocabulary, length, (start, end), ending)
        case {"kind": "hub", "pad": int(pad), "end": int(end)} if 0 <= pad < vocabulary and 0 <= end < vocabulary:
            return hub_tokenizer(path.parent, length, pad, end)
    raise InputError(f"{path}: its tokenizer is described in a way that this version does not know")


class HubTokenizer:
    """The tokens of a ``tokenizer.json`` as transformers makes them: nothing of a text is cleaned.

    Args:
        path: ``tokenizer.json``.
        context_length: L.
        pad: What rows are filled up with.
        end: What a text that is too long ends with.

    Raises:
        InputError: The file cannot be read.
    """

    def __init__(self, path: Path, context_length: int, pad: int, end: int) -> None:
        self.path, self.context_length, self.pad, self.end = path, context_length, pad, end
        self.settings: dict[str, Any] = {"kind": "hub", "pad": pad, "end": end}
        self._tokenizer = opened(path, "align")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        encoded(path, self._tokenizer, [TRIAL])

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokens of n texts, (n, L) int64."""
        return as_tensor(self.ids(texts, context_length))

    def ids(self, texts: str | Sequence[str], context_length: int | None = None) -> Tokens:
        """As ``__call__``, without torch."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = np.full((len(texts), length), self.pad, np.int64)
        for row, ids in zip(rows, encoded(self.path, self._tokenizer, texts), strict=True):
            if len(ids) > length:
                ids[length - 1 :] = [self.end]
            row[: len(ids)] = ids
        return rows

    def check_clip(self, start: str, end: str) -> None:
        """Refuses rules that are not those of transformers' ``CLIPTokenizer``, which reads no rules from the file.

        Args:
            start: The word that rows begin with.
            end: The word that texts end with.

        Raises:
            InputError: The file has other rules.
        """
        capital, small, composed, letter = self.ids(["A  B", "a b", "E\u0301", "\u00e9"]).tolist()
        words = capital[0], self.end if self.end in small else None
        if words != (self._tokenizer.token_to_id(start), self._tokenizer.token_to_id(end)):
            raise InputError(f"{self.path}: puts no {start!r} before and {end!r} behind a text, as CLIPTokenizer does")
        if capital != small or composed != letter:
            raise InputError(f"{self.path}: makes no text lower-case, NFC and singly spaced, as CLIPTokenizer does")

    def description(self) -> str:
        """The vocabulary and the rules, as one text."""
        return f"{self.settings} {self.context_length} {self._tokenizer.to_str()}"

    def save_pretrained(self, folder: Path) -> None:
        """Writes what a tokenizer of transformers needs into a folder."""
        (folder / HUB_FILE).write_text(self._tokenizer.to_str(), encoding="utf-8")
        words = {key: self._tokenizer.id_to_token(number) for key, number in (("pad", self.pad), ("eos", self.end))}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            "pad_token": words["pad"],
            "eos_token": words["eos"],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def check_rules(folder: Path) -> None:
    """Looks at the ``tokenizer.json`` in a folder, if there is one, before transformers makes a tokenizer of it.

    Raises:
        InputError: As :func:`read_rules`, or transformers would take another file than that one.
    """
    config = folder / "tokenizer_config.json"
    if config.is_file() and read_json(config).get("fast_tokenizer_files"):
        raise InputError(f"{config}: fast_tokenizer_files names other files than {HUB_FILE}, which alone is read")
    if (folder / HUB_FILE).is_file():
        read_rules(folder / HUB_FILE)


def hub_tokenizer(folder: Path, context_length: int, pad: int, end: int) -> HubTokenizer | NoTokenizer:
    """The tokenizer in a folder of Hugging Face's; what says that there is none, where there is none."""
    if (folder / HUB_FILE).is_file():
        return HubTokenizer(folder / HUB_FILE, context_length, pad, end)
    why = f"{folder}: no {HUB_FILE} in it; give tokens, or save the tokenizer there"
    return NoTokenizer(why, {"kind": "hub", "pad": pad, "end": end})


class RinnaTokenizer:
    """rinna's Japanese pieces by sentencepiece alone: the text in lower case, ``[CLS]`` in front, no end token.

    Args:
        path: ``spiece.model``.
        context_length: L.

    Raises:
        InputError: sentencepiece is not installed, or cannot read the file.
    """

    FILE = "spiece.model"
    PAD = 3
    _CLS = 4
    _SPECIAL = re.compile(r"(<unk>|<s>|</s>|\[PAD\]|\[CLS\]|\[SEP\]|\[MASK\])")

    def __init__(self, path: Path, context_length: int) -> None:
        self.path, self.context_length = path, context_length
        self.content = path.read_bytes()
        self._processor = self._load()

    def _load(self) -> Any:
        library = require("sentencepiece", "sentencepiece")
        try:
            processor = library.SentencePieceProcessor(model_proto=self.content)
        except Exception as error:
            raise InputError(
                f"{self.path}: not a model of sentencepiece ({' '.join(str(error).split())[:100]})"
            ) from None
        return processor

    def __getstate__(self) -> dict[str, Any]:
        """Without the processor, which is made again where it is needed."""
        return self.__dict__ | {"_processor": None}

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokens of n texts, (n, L) int64."""
        return as_tensor(self.ids(texts, context_length))

    def ids(self, texts: str | Sequence[str], context_length: int | None = None) -> Tokens:
        """As ``__call__``, without torch."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = np.full((len(texts), length), self.PAD, np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._CLS, *self._encode(text)][:length]
            row[: len(ids)] = ids
        return rows

    def description(self) -> str:
        """A digest of the pieces, and how many a text may have."""
        return f"{hashlib.sha256(self.content).hexdigest()} {self.context_length}"

    def _encode(self, text: str) -> list[int]:
        if self._processor is None:
            self._processor = self._load()
        ids: list[int] = []
        for part in self._SPECIAL.split(text):
            if self._SPECIAL.fullmatch(part):
                ids.append(self._processor.piece_to_id(part))
            elif words := part.strip():
                ids += self._processor.encode(words.lower())
        return ids

"""The tokens that the original programs make of a text, where they are not open_clip's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cloob.errors import InputError, require
from cloob.models.importing import import_open_clip, translated
from cloob.models.tokenizer import ClipTokenizer, Ending, Tokenizer, Tokens

CLIP_VOCABULARY = 49408
HUB_FILE = "tokenizer.json"


class NoTokenizer(Tokenizer):
    """In the place of a missing tokenizer: the model takes tokens, and texts are an error that says why."""

    def __init__(self, why: str, settings: dict[str, Any] | None = None) -> None:
        self._why, self.settings = why, settings

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing, as there is nothing."""

    def ids(self, texts: Sequence[str]) -> Tokens:
        raise InputError(self._why)


class FileTokenizer(Tokenizer):
    """The tokens of a ``tokenizer.json``, in rows of L; InputError where the file makes none.

    Rows are filled up with ``pad``, or as the file says. ``clean`` is one of open_clip's cleanings, which goes first;
    zeros take the place of the token ``strip``.
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
            self._rules = require("tokenizers", "train").Tokenizer.from_file(str(path))
            if pad is not None:
                word = self._rules.id_to_token(pad) or ""
                self._rules.enable_padding(pad_id=pad, pad_token=word, length=context_length)
                self._rules.enable_truncation(context_length)
            self.ids(["A photo of 3 red hearts."])

    def ids(self, texts: Sequence[str]) -> Tokens:
        if self.clean is not None:
            texts = list(map(import_open_clip(".tokenizer").get_clean_fn(self.clean), texts))
        rows = [encoding.ids for encoding in self._rules.encode_batch(list(texts))]
        tokens = np.array(rows, np.int64).reshape(len(texts), self.context_length)
        return tokens if self.strip is None else np.where(tokens == self.strip, 0, tokens)

    def description(self) -> str:
        return f"{self.settings} {self.context_length} {self.clean} {self.strip} {self._rules.to_str()}"

    def rules(self) -> Any:
        rules = type(self._rules).from_str(self._rules.to_str())
        rules.no_padding()
        rules.no_truncation()
        return rules

    def save_pretrained(self, folder: Path) -> None:
        (folder / HUB_FILE).write_text(self.rules().to_str(), encoding="utf-8")
        pad, end = (self._rules.id_to_token(number) for number in (self.pad, self.end))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.context_length}
        config |= {"pad_token": pad, "eos_token": end}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


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

"""The tokens that the original programs make of a text, where they are not open_clip's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cloob.errors import InputError, require
from cloob.models.tokenizer import FastTokenizer

CLIP_VOCABULARY = 49408
Ending = Literal["cut", "kept"]


class ClipTokenizer(FastTokenizer):
    """CLIP's byte pairs with the special words and the handling of long texts of one program.

    Args:
        specials: How a text writes the start and the end token.
        ending: What a text that is too long ends with: ``"kept"`` the end token, ``"cut"`` whatever stands there.
        context_length: L.
    """

    def __init__(self, specials: tuple[str, str], ending: Ending, context_length: int = 77) -> None:
        original = require("open_clip.tokenizer", "train").SimpleTokenizer(context_length=context_length)
        super().__init__(original)
        if specials != self._specials:
            ids = dict(zip(specials, (self.sot_token_id, self.eot_token_id), strict=True))
            self._ids = {key: value for key, value in self._ids.items() if key not in self._specials} | ids
            pieces = original.pat.pattern.removeprefix("|".join(self._specials))
            words = "|".join(map(re.escape, specials))
            self._pieces = require("regex", "train").compile(words + pieces, original.pat.flags)
        self._specials, self._ending = specials, ending

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """As ``FastTokenizer``; where long texts are cut, their last token is one of their own."""
        tokens = super().__call__(texts, context_length)
        if self._ending == "kept":
            return tokens
        length = tokens.shape[1]
        for row, text in enumerate([texts] if isinstance(texts, str) else texts):
            if tokens[row, -1] == self.eot_token_id:
                words = [self.sot_token_id, *self._encode(text, length)]
                if len(words) >= length:
                    tokens[row, -1] = words[length - 1]
        return tokens


class NoTokenizer:
    """In the place of a tokenizer that is not there: such a model takes tokens, and says so of texts.

    Args:
        why: The line of the error.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Raises InputError."""
        raise InputError(self._why)


def clip_tokenizer(
    path: Path, vocabulary: int, context_length: int, specials: tuple[str, str], ending: Ending
) -> ClipTokenizer | NoTokenizer:
    """CLIP's tokenizer for a model with CLIP's vocabulary; for another one what says that there is none."""
    if vocabulary == CLIP_VOCABULARY:
        return ClipTokenizer(specials, ending, context_length)
    return NoTokenizer(
        f"{path}: its vocabulary has {vocabulary} words, not CLIP's {CLIP_VOCABULARY}; give tokens, not texts"
    )


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
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = torch.full((len(texts), length), self.PAD)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._CLS, *self._encode(text)][:length]
            row[: len(ids)] = torch.tensor(ids)
        return rows

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

"""open_clip's byte-pair tokeniser with the same tokens in a tenth of the time.

What makes ``SimpleTokenizer`` slow on captions, and what is done about it:

- Every text goes through ftfy. Printable ASCII without ``&`` comes out of ftfy and ``html.unescape`` as it went in, so
  it is spared them.
- Every text is cut up by a regular expression. No part of that matches white space, so the tokens of a text are those
  of its words, one after the other, and a word's tokens are kept.
- Every text gets a tensor of its own. Here a batch is one array.
- Merging looks through the whole word for each merge, which takes minutes for a word of 64 kB (a caption without
  spaces). Here a heap holds the pairs.
"""

from __future__ import annotations

import html
import importlib
import json
import sys
from array import array
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cloob.errors import require

if TYPE_CHECKING:
    from torch import Tensor

Tokens = npt.NDArray[np.int64]

_SENTENCE = "Rules & words: 3 cats, élan — naïve!"
_WORDS_KEPT = 1 << 16
_LONGEST_KEPT = 32
"""So many words of so many characters at most are kept (about 15 MB); when they are full, all are forgotten."""


class FastTokenizer:
    """The tokens of open_clip's ``SimpleTokenizer`` with its default cleaning, for every text.

    It holds what it needs, so that a loader's worker gets it without importing open_clip.

    Attributes:
        context_length: L, tokens per text.
        vocab_size: Number of different tokens.
        sot_token_id: What each row begins with.
        eot_token_id: What each text ends with.
    """

    def __init__(self, original: Any) -> None:
        """Takes over the tables of a tokeniser.

        Args:
            original: A ``SimpleTokenizer`` for which ``can_replace`` holds.
        """
        self.context_length: int = original.context_length
        self.vocab_size: int = original.vocab_size
        self.sot_token_id: int = original.sot_token_id
        self.eot_token_id: int = original.eot_token_id
        self._ids: dict[str, int] = original.encoder
        self._ranks: dict[tuple[str, str], int] = original.bpe_ranks
        self._letters: dict[int, str] = original.byte_encoder
        self._pieces: Any = original.pat
        self._words: dict[str, tuple[int, ...]] = {}
        self._specials: tuple[str, str] = ("<start_of_text>", "<end_of_text>")

    @staticmethod
    def can_replace(tokenizer: Any) -> bool:
        """Whether a tokeniser is open_clip's own, with its default cleaning, vocabulary ends and truncation."""
        module = sys.modules.get("open_clip.tokenizer")  # not imported: then it cannot be one
        return bool(
            module is not None
            and type(tokenizer) is module.SimpleTokenizer
            and tokenizer.clean_fn is module.get_clean_fn("lower")
            and tokenizer.reduction_fn is None
            and len(tokenizer.all_special_ids) == 2
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the words met so far."""
        return self.__dict__ | {"_words": {}}

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokens of texts.

        Args:
            texts: n strings, or one.
            context_length: L, if not the tokeniser's own.

        Returns:
            (n, L) int64: start, tokens, end, zeros. A text that is too long is cut, and ends with the end token.
        """
        return as_tensor(self.ids(texts, context_length))

    def ids(self, texts: str | Sequence[str], context_length: int | None = None) -> Tokens:
        """As ``__call__``, without torch."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = array("q")
        for text in texts:
            tokens = self._row([self.sot_token_id, *self._encode(text, length)], length)
            rows.extend((*tokens, *[0] * (length - len(tokens))))
        return np.array(rows, np.int64).reshape(len(texts), length)

    def _row(self, tokens: list[int], length: int) -> list[int]:
        """Start and text with the end token behind them, cut to what fits."""
        return [*tokens[: length - 1], self.eot_token_id]

    def encode(self, text: str) -> list[int]:
        """All tokens of a text, without start and end."""
        return self._encode(text, sys.maxsize)

    def tables(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The numbers of all symbols but the two special words, and the pairs that may be joined, lowest rank first."""
        ids = {symbol: number for symbol, number in self._ids.items() if symbol not in self._specials}
        return ids, sorted(self._ranks, key=self._ranks.__getitem__)

    def _encode(self, text: str, enough: int) -> list[int]:
        """The tokens of a text, or the first of them once they are ``enough``."""
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(require("ftfy", "train").fix_text(text)))
        tokens: list[int] = []
        # White space is made equal before lower() looks at what stands around a capital sigma.
        for word in " ".join(text.split()).lower().split():
            known = self._words.get(word)
            tokens += self._encode_word(word, enough) if known is None else known
            if len(tokens) >= enough:
                break
        return tokens

    def _encode_word(self, word: str, enough: int) -> Sequence[int]:
        if len(word) > _LONGEST_KEPT:
            return self._encode_pieces(word, enough)
        if len(self._words) >= _WORDS_KEPT:
            self._words.clear()
        self._words[word] = tokens = tuple(self._encode_pieces(word, sys.maxsize))
        return tokens

    def _encode_pieces(self, word: str, enough: int) -> list[int]:
        tokens: list[int] = []
        for piece in self._pieces.finditer(word):
            text = piece.group()
            if text in self._specials:
                tokens.append(self._ids[text])
                continue
            symbols = [self._letters[byte] for byte in text.encode()]
            symbols[-1] += "</w>"
            tokens += [self._ids[symbol] for symbol in merge_pairs(symbols, self._ranks)]
            if len(tokens) >= enough:
                break
        return tokens


def describe(tokenizer: Any) -> str:
    """What tells a tokeniser from others: its vocabulary and rules if it can say them, else the tokens of a sentence.

    Args:
        tokenizer: Any of an encoder's; None where it has none.
    """
    if hasattr(tokenizer, "description"):
        return str(tokenizer.description())
    backend = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)  # open_clip's, of transformers
    # Each call leaves its own padding and truncation there.
    calls = {"padding": None, "truncation": None}
    rules = None if backend is None else json.dumps(json.loads(backend.to_str()) | calls)
    try:
        tokens = None if tokenizer is None else np.asarray(tokenizer([_SENTENCE])).tolist()
    except Exception:  # there is none, or it is anybody's
        tokens = None
    return f"{getattr(tokenizer, 'settings', None)} {tokens} {rules}"


def as_tensor(tokens: Tokens) -> Tensor:
    """Tokens for torch, which is imported here: a search by an ONNX folder has its tokens without it."""
    tensor: Tensor = importlib.import_module("torch").from_numpy(tokens)
    return tensor


def merge_pairs(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: joins neighbours, the pair of the lowest rank first, from left to right.

    All places of a pair are joined before another pair's, as in the definition by repeated scans; in
    O(n log n) for n symbols instead of O(n²).

    Args:
        symbols: The n symbols of a word; used up.
        ranks: Rank of each pair that may be joined; no two pairs share one.

    Returns:
        The symbols that are left.
    """
    n = len(symbols)
    after = list(range(1, n + 1))
    before = list(range(-1, n - 1))

    def rank_at(left: int) -> int | None:
        """Rank of the pair whose left symbol lies there; symbols that were joined to another are empty."""
        return ranks.get((symbols[left], symbols[after[left]])) if left >= 0 and after[left] < n else None

    heap = [(rank, left) for left in range(n - 1) if (rank := rank_at(left)) is not None]
    heapify(heap)
    while heap:
        lowest = heap[0][0]
        joined: list[int] = []
        while heap and heap[0][0] == lowest:
            left = heappop(heap)[1]
            if rank_at(left) != lowest:
                continue  # one of the two has meanwhile been joined to another
            right = after[left]
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[left] < n:
                before[after[left]] = left
            joined.append(left)
        for left in joined:
            for place in (before[left], left):
                if (rank := rank_at(place)) is not None:
                    heappush(heap, (rank, place))
    return [symbol for symbol in symbols if symbol]

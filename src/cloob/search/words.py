"""Words in names, captions and text columns, and how their hits and those of a model become one list."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from cloob.search.records import Item

K = 60  # of reciprocal rank fusion, as in Cormack, Clarke and Büttcher, 2009
_WORD = re.compile(r"[^\W_]+")
_MOST = 100_000  # letters of an item that are looked through


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without accents: ``IMG_1092`` is two."""
    text = text.casefold()
    if not text.isascii():
        letters = unicodedata.normalize("NFKD", text)
        text = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return _WORD.findall(text)


def texts(item: Item) -> dict[str, str]:
    """What of an item is text: its file's name, its caption, and columns."""
    name = re.split(r"/|::", item.path)[-1]
    columns = {name: value for name, value in item.columns.items() if isinstance(value, str) and name != "date_from"}
    return columns | {"name": name, "caption": item.caption or ""}


def all_words(item: Item) -> str:
    return " ".join(words(" ".join(texts(item).values())[:_MOST]))


def places(item: Item, asked: Sequence[str]) -> tuple[str, ...]:
    """In which texts of an item some of the words are, where all of them are in one or another."""
    there = {name: set(asked).intersection(words(text[:_MOST])) for name, text in texts(item).items()}
    found = set(asked) == set().union(*there.values())
    return tuple(sorted(name for name, some in there.items() if some)) if asked and found else ()


def fused(*rankings: Mapping[int, int]) -> list[int]:
    """Ids in order of the sum of 1 / (K + rank) over rankings, each of which has ranks from 1, by id."""
    scores: dict[int, float] = {}
    for ranks in rankings:
        for id_, rank in ranks.items():
            scores[id_] = scores.get(id_, 0.0) + 1 / (K + rank)
    return sorted(scores, key=lambda id_: -scores[id_])

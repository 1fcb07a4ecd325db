"""Captions that are wrong in the ways that captions from the web are: pure functions of
texts and generators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FILE_NAMES = 8192
"""How many file names there are to draw from."""
_FORMS = (
    "IMG_{n:04d}.JPG",
    "img {n}",
    "DSC{n:05d}",
    "image-{n}.png",
    "untitled {k}",
    "photo ({k}).jpg",
    "screenshot {y}-{m:02d}-{d:02d}",
    "{d:02d}.{m:02d}.{y}",
    "{m}/{d}/{y}",
    "{y}{m:02d}{d:02d}_{n:04d}.jpg",
)
_NUMBERS = {
    "y": (2001, 2025),
    "m": (1, 13),
    "d": (1, 29),
    "k": (1, 100),
    "n": (1, 10_000),
}


def cut(caption: str, generator: np.random.Generator) -> str:
    """A random run of the caption's words: as many as are drawn from 1 to all but one,
    anywhere. One word stays.
    """
    words = caption.split()
    if len(words) < 2:
        return caption
    length = int(generator.integers(1, len(words)))
    start = int(generator.integers(len(words) - length + 1))
    return " ".join(words[start : start + length])


def cut_all(captions: Sequence[str], seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [cut(caption, generator) for caption in captions]


def file_names(n: int, seed: int) -> list[str]:
    """File names and dates, as cameras and people leave them in the place of a caption;
    n different ones.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        form = _FORMS[generator.integers(len(_FORMS))]
        numbers = {
            name: int(generator.integers(*bounds)) for name, bounds in _NUMBERS.items()
        }
        found[form.format(**numbers)] = None
    return list(found)


def wrong_rows(
    kind: str,
    share: float,
    own: np.ndarray,
    cut_rows: np.ndarray,
    names: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Which text stands beside each picture.

    Args:
        kind: ``"swap"``: the texts of the chosen pairs go round among them, so that
            none keeps its place. ``"cut"``: a random part of the own text. ``"name"``:
            a file name or a date.
        share: Of the pairs that are chosen for it.
        own: (n,) rows of the own texts in the table of texts.
        cut_rows: (n,) rows of their parts.
        names: Rows of the file names.
        generator: Chooses.

    Returns:
        (n,) rows.
    """
    chosen = generator.permutation(len(own))[: round(share * len(own))]
    rows = own.copy()
    if kind == "swap":
        rows[chosen] = own[np.roll(chosen, 1)]
    elif kind == "cut":
        rows[chosen] = cut_rows[chosen]
    elif kind == "name":
        rows[chosen] = generator.choice(names, len(chosen))
    else:
        raise ValueError(f"kind is {kind!r}; swap, cut or name is expected")
    return rows

"""``cloob data … --suspects``: the pairs that do not seem to belong together, as a list and as a page."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloob
from cloob.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from cloob.functional.suspects import Suspicion

_LEAST = 20  # distinct ids
_SHOWN = 10
Caption = Callable[[int], str]


@dataclass(frozen=True)
class Suspects:
    """The pairs of a set with their scores; ``order`` has the lowest first."""

    name: str
    keys: tuple[str, ...]
    found: Suspicion
    order: list[int]
    caption: Caption  # of the pair at a place

    def lines(self) -> list[dict[str, Any]]:
        """A line for each pair: what it is called, its score and what fits better among a part of the others."""
        lines = []
        for place in self.order:
            better = int(self.found.better[place])
            fits = "" if better == place else self.caption(better)
            score = round(float(self.found.scores[place]), 4)
            lines.append({"pair": self.keys[place], "score": score, "b": self.caption(place), "fits better": fits})
        return lines


def of_vectors(a: str, b: str, ids: str | None) -> Suspects:
    """Of two files of vectors; a row of b is called as its pair."""
    import numpy as np

    from cloob.data.vectors import open_pairs

    pairs = open_pairs(a, b, ids)
    rows_a, rows_b, of_ids, keys = pairs.take(np.arange(len(pairs)))
    return _suspects(pairs.name, keys, rows_a, rows_b, of_ids, keys.__getitem__)


def of_pictures(source: Any, config: cloob.TrainConfig) -> Suspects:
    """Of pictures with captions, by the features of the two frozen encoders of a configuration."""
    import torch

    from cloob.cache import Cache
    from cloob.training.align import Features, feature_loader, make_aligned

    config = config.override(batch_size=2, max_bad_fraction=1.0)
    encoder = make_aligned(config)
    loader = feature_loader(source, encoder, config, torch.device("cpu"), Cache(config.pairs.cache_dir), train=False)
    features = loader.features
    assert isinstance(features, Features)
    unusable = {skip.key for skip in features.skipped}
    rows = [row for row in range(len(source)) if not unusable or _key(source, row) not in unusable]

    def caption(place: int) -> str:
        text: str = source.read(rows[place]).caption
        return text

    return _suspects(source.name, features.keys, features.images, features.texts, features.ids, caption)


def _key(source: Any, row: int) -> str | None:
    """What a pair is called; None where it cannot be read, which is none of the usable ones."""
    from cloob.data.batch import BadSample

    try:
        return str(source.read(row).key)
    except BadSample as bad:
        return bad.skip.key


def _suspects(name: str, keys: tuple[str, ...], a: Tensor, b: Tensor, ids: Tensor, caption: Caption) -> Suspects:
    import torch

    from cloob.functional.suspects import suspicion

    if (distinct := len(torch.unique(ids))) < _LEAST:
        raise InputError(f"{name}: {distinct} distinct ids; --suspects needs {_LEAST} or more")
    found = suspicion(a, b, ids)
    return Suspects(name, keys, found, found.scores.argsort().tolist(), caption)


def write_list(path: Path, suspects: Suspects) -> None:
    """The list, and what is said of it: its first lines and how many are more probably wrong than right."""
    lines, count = suspects.lines(), suspects.found.count()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["pair", "score", "b", "fits better"])
        writer.writeheader()
        writer.writerows(lines)
    print(f"{suspects.name}: {count:,} of {len(lines):,} pairs are more probably wrong than right")
    for line in lines[: min(_SHOWN, count)]:
        fits = f"; fits better: {line['fits better'][:60]}" if line["fits better"] else ""
        print(f"  {line['score']:7.3f}  {line['pair']}  {line['b'][:60]}{fits}")
    print(path)


def write_page(path: Path, source: Any, suspects: Suspects, most: int) -> None:
    """The most suspicious pairs with their pictures."""
    from cloob.data.survey import pair_cards, render_sheet

    places = {key: row for row in range(len(source)) if (key := _key(source, row)) is not None}
    cards = []
    for line in suspects.lines()[:most]:
        facts = [f"score {line['score']:.3f}"]
        facts += [f"fits better: {line['fits better'][:160]}"] if line["fits better"] else []
        cards += pair_cards(source, [places[line["pair"]]], *facts)
    facts_of_all = [("pairs", f"{len(suspects.keys):,}"), ("probably wrong", f"{suspects.found.count():,}")]
    heading = f"The {len(cards):,} most suspicious pairs, lowest score first"
    render_sheet(path, f"Suspects in {suspects.name}", [("", facts_of_all, []), (heading, [], cards)])

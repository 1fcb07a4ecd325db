"""``cloob data … --suspects``: the pairs that do not seem to belong together, as a list and as a page."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cloob.cache import Cache
from cloob.data.batch import BadSample
from cloob.data.survey import pair_cards, render_sheet
from cloob.data.vectors import VectorPairs
from cloob.errors import InputError
from cloob.functional.suspects import suspicion
from cloob.training.align import feature_loader, make_aligned
from cloob.training.config import TrainConfig

_LEAST = 20  # distinct ids
_SHOWN = 10


class Suspects:
    """The pairs of a set, lowest score first; ``caption`` gives that of the pair at a place."""

    def __init__(self, pairs: VectorPairs, caption: Callable[[int], str] | None = None) -> None:
        a, b, ids, keys = pairs.take(torch.arange(len(pairs)).numpy())
        if (distinct := len(torch.unique(ids))) < _LEAST:
            raise InputError(f"{pairs.name}: {distinct} distinct ids; --suspects needs {_LEAST} or more")
        result, caption = suspicion(a, b, ids), caption or keys.__getitem__
        self.name, self.count, self.lines = pairs.name, result.count(), list[dict[str, Any]]()
        for place in result.scores.argsort().tolist():
            better = int(result.better[place])
            fits = "" if better == place else caption(better)
            score = round(float(result.scores[place]), 4)
            self.lines.append({"pair": keys[place], "score": score, "b": caption(place), "fits better": fits})

    def write(self, path: Path | None) -> None:
        """The list; prints its first lines, and how many are more probably wrong than right."""
        print(f"{self.name}: {self.count:,} of {len(self.lines):,} pairs are more probably wrong than right")
        for line in self.lines[: _SHOWN if path is None else min(_SHOWN, self.count)]:
            fits = f"; fits better: {line['fits better'][:60]}" if line["fits better"] else ""
            print(f"  {line['score']:7.3f}  {line['pair']}  {line['b'][:60]}{fits}")
        if path is not None:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["pair", "score", "b", "fits better"])
                writer.writeheader()
                writer.writerows(self.lines)
            print(path)


def of_pictures(source: Any, config: TrainConfig) -> Suspects:
    """Of pictures with captions, by the features of the two frozen encoders of a configuration."""
    config = config.override(batch_size=2, max_bad_fraction=1.0)
    encoder, cache = make_aligned(config), Cache(config.pairs.cache_dir)
    pairs = feature_loader(source, encoder, config, torch.device("cpu"), cache, train=False).pairs
    unusable = {skip.key for skip in pairs.skipped}
    rows = [row for row in range(len(source)) if not unusable or _key(source, row) not in unusable]
    return Suspects(pairs, lambda place: str(source.read(rows[place]).caption))


def _key(source: Any, row: int) -> str | None:
    """The name of a pair; None where it cannot be read, which no usable one has."""
    try:
        return str(source.read(row).key)
    except BadSample as bad:
        return bad.skip.key


def write_page(path: Path, source: Any, suspects: Suspects, most: int) -> None:
    """The most suspicious pairs with their pictures."""
    places = {key: row for row in range(len(source)) if (key := _key(source, row)) is not None}
    cards = []
    for line in suspects.lines[:most]:
        facts = [f"score {line['score']:.3f}"]
        facts += [f"fits better: {line['fits better'][:160]}"] if line["fits better"] else []
        cards += pair_cards(source, [places[line["pair"]]], *facts)
    facts_of_all = [("pairs", f"{len(suspects.lines):,}"), ("probably wrong", f"{suspects.count:,}")]
    heading = f"The {len(cards):,} most suspicious pairs, lowest score first"
    render_sheet(path, f"Suspects in {suspects.name}", [("", facts_of_all, []), (heading, [], cards)])

"""The list and the page of suspects, which ``cloob data`` and ``cloob demo`` write."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloob
from cloob.cache import Cache
from cloob.commands.console import progress, say
from cloob.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from cloob.data.batch import Skip
    from cloob.data.source import Source
    from cloob.data.vectors import VectorPairs
    from cloob.heads.suspects import Suspicion

_LEAST = 20  # distinct ids of which suspects can be judged
_SHOWN = 9  # on a page that cannot tell how many are wrong
_PRINTED = 10


@dataclass(frozen=True)
class Judged:
    """Pairs and what was found of them."""

    name: str
    keys: Sequence[str]
    found: Suspicion
    text: Callable[[int], str]  # what stands on the side of b, of a pair's place
    source: Source | None = None
    rows: Sequence[int] = ()  # of the source

    def ranked(self) -> list[int]:
        """Places, the most suspicious first."""
        order: list[int] = self.found.scores.argsort(stable=True).tolist()
        return order

    def better(self, place: int) -> str:
        """The text that fits better, if there is one."""
        other = int(self.found.better[place])
        return "" if other == place else self.text(other)

    def probability(self, place: int) -> float:
        """How probably a pair is wrong."""
        return float(self.found.wrong.probability[place])


def judge_vectors(pairs: VectorPairs, model: str | None = None) -> Judged:
    """Pairs of vectors, by a closed form or by a model of heads."""
    import numpy as np

    a, b, ids, keys = pairs.take(np.arange(len(pairs)))
    _check_ids(pairs.name, ids, pairs.skipped)
    if model is not None:
        from cloob.models.load import load_model

        encoder: Any = load_model(model).eval()
        if encoder.config.kind != "vectors":
            raise InputError(f"{model} takes pictures and texts; --a and --b are rows")
        a, b = encoder.encode_a(a).cpu(), encoder.encode_b(b).cpu()
    return Judged(pairs.name, keys, _suspicion(a, b, ids, model), keys.__getitem__)


def judge_pictures(
    source: Source, config: cloob.HeadsConfig, model: str | None = None
) -> Judged:
    """Pictures with captions, by a closed form on the two frozen encoders of a
    configuration, or by a model.
    """
    if model is not None:
        return _judge_by_model(source, model, Cache(), config.workers)
    from cloob.data.batch import BadSample
    from cloob.heads.features import embedded, open_encoders

    encoders = str(config.image_encoder), str(config.text_encoder)
    encoder = open_encoders(*encoders, config.image_size)
    pairs = embedded(source, encoder, workers=config.workers)
    unusable = {skip.key for skip in pairs.skipped}
    rows = []
    for row in range(len(source)):
        with contextlib.suppress(BadSample):
            if not unusable or source.read(row).key not in unusable:
                rows.append(row)
    judged = judge_vectors(pairs)
    return _with_pictures(source, judged.name, judged.keys, judged.found, rows)


def _judge_by_model(source: Source, model: str, cache: Cache, workers: int) -> Judged:
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings

    options = EmbedOptions(workers=workers, cache=cache)
    with progress() as update:
        embeddings = Embeddings({model: model}, options, progress=update)
        if embeddings.encoder(model).config.kind == "vectors":
            raise InputError(f"{model} takes rows: --a and --b in place of DATA")
        embedded = embeddings.pairs(model, source)
    first = embedded.first_texts
    x, y = embedded.images.features, embedded.texts[first]
    usable = (x.isfinite().all(1) & y.isfinite().all(1)).nonzero().squeeze(1)
    captions = [embedded.captions[place] for place in first[usable].tolist()]
    ids = cloob.ids(captions)
    _check_ids(source.name, ids, embedded.images.bad)
    rows = usable.tolist()
    keys = [embedded.images.keys[row] for row in rows]
    found = _suspicion(x[usable], y[usable], ids, model)
    return _with_pictures(source, source.name, keys, found, rows)


def _with_pictures(
    source: Source, name: str, keys: Sequence[str], found: Suspicion, rows: list[int]
) -> Judged:
    def caption(place: int) -> str:
        return str(source.read(rows[place]).caption)

    return Judged(name, keys, found, caption, source, rows)


def _suspicion(a: Tensor, b: Tensor, ids: Tensor, model: str | None) -> Suspicion:
    from cloob.heads.suspects import suspicion

    return suspicion(a, b, ids, in_one_space=model is not None)


def _check_ids(name: str, ids: Tensor, skipped: Sequence[Skip]) -> None:
    """Says what cannot be used; refuses too few ids."""
    if skipped:
        first = skipped[0]
        why = first.detail or first.reason
        say(f"{len(skipped):,} cannot be used, such as {first.key}: {why}")
    distinct = len(set(ids.tolist()))
    if distinct < _LEAST:
        raise InputError(
            f"{name}: {distinct} distinct ids; --suspects needs {_LEAST} or more"
        )


def report(
    judged: Judged, path: Path | None, page: Path | None = None, most: int = 0
) -> None:
    """Prints the most suspicious pairs, lists all in a file, and shows ``most`` on a
    page.
    """
    ranked = judged.ranked()
    count = judged.found.count()
    print(f"{judged.name}: {_sentence(judged)}")
    for place in ranked[: _PRINTED if path is None else min(_PRINTED, count)]:
        better = judged.better(place)
        fits = f"; fits better: {better[:60]}" if better else ""
        numbers = f"{judged.found.scores[place]:7.3f} {judged.probability(place):5.0%}"
        print(f"  {numbers}  {judged.keys[place]}  {judged.text(place)[:60]}{fits}")
    if path is not None:
        _write_list(judged, ranked, path)
        print(path)
    if page is not None:
        _write_page(judged, ranked, page, most)
        print(page)


def _sentence(judged: Judged) -> str:
    wrong, n = judged.found.wrong, len(judged.keys)
    low, high = wrong.interval
    sure = "" if wrong.is_certain else ", too uncertain to leave any out"
    return (
        f"{judged.found.count():,} of {n:,} pairs are more probably wrong than right;"
        f" wrong in all: {wrong.share:.1%} (95 %: {low:.1%} to {high:.1%}{sure})"
    )


def _write_list(judged: Judged, ranked: list[int], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pair", "score", "probability", "b", "fits better"])
        for place in ranked:
            score = round(float(judged.found.scores[place]), 4)
            probability = round(judged.probability(place), 4)
            words = judged.text(place), judged.better(place)
            writer.writerow([judged.keys[place], score, probability, *words])


def _write_page(judged: Judged, ranked: list[int], page: Path, most: int) -> None:
    """Thumbnails of those that are probably wrong, then a line on the others."""
    from cloob.data.survey import pair_cards, render_sheet

    assert judged.source is not None
    count, n = judged.found.count(), len(ranked)
    cards = []
    for place in ranked[: min(most, count or _SHOWN)]:
        better = judged.better(place)
        lines = [f"fits better: {better[:160]}"] if better else []
        lines.append(f"wrong with probability {judged.probability(place):.2f}")
        cards += pair_cards(judged.source, [judged.rows[place]], *lines)
    if count:
        heading = f"{count:,} of {n:,} pairs are probably wrong"
        closing = f"The other {n - count:,} pairs are probably right."
    else:
        low, high = judged.found.wrong.interval
        heading = f"The {len(cards)} pairs that seem to belong together least"
        closing = f"Of all {n:,} pairs {low:.1%} to {high:.1%} are wrong (95 %)."
    if len(cards) < count:
        heading += f"; the first {len(cards):,}"
    sections: list[tuple[str, Any, list[dict[str, Any]]]] = [(heading, [], cards)]
    render_sheet(page, f"Suspects in {judged.name}", sections, closing, large=True)

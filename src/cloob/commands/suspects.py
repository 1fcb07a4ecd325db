"""Pairs that seem not to belong together: what ``cloob data`` prints, lists and shows
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cloob
from cloob.commands.console import progress, say
from cloob.errors import InputError
from cloob.files import write_csv

if TYPE_CHECKING:
    from torch import Tensor

    from cloob.data.batch import Skip
    from cloob.data.source import Source
    from cloob.data.vectors import VectorPairs
    from cloob.heads.suspects import Suspicion

N_SHOWN = 60  # on a page
N_UNCERTAIN = 9  # on a page that cannot tell how many are wrong
N_PRINTED = 10


class Line(NamedTuple):
    """A pair of the list."""

    pair: str
    score: float
    probability: float  # of being wrong
    b: str  # what stands on the side of b
    better: str  # that of another pair, if it fits better


@dataclass(frozen=True)
class Judged:
    """Pairs and what was found of them."""

    name: str
    keys: Sequence[str]
    found: Suspicion
    texts: Sequence[str]  # what stands on the side of b
    source: Source | None = None  # of pictures
    rows: Sequence[int] = ()  # of the source

    def ranked(self) -> list[int]:
        """Places, the most suspicious first."""
        order: list[int] = self.found.scores.argsort(stable=True).tolist()
        return order

    def line(self, place: int) -> Line:
        """What is known of a pair."""
        better = int(self.found.better[place])
        return Line(
            self.keys[place],
            round(float(self.found.scores[place]), 4),
            round(float(self.found.wrong.probability[place]), 4),
            self.texts[place],
            "" if better == place else self.texts[better],
        )


# --- what is found of vectors, and of pictures with captions ---


def judge_vectors(pairs: VectorPairs, model: str | None) -> Judged:
    """Pairs of vectors, by a closed form or by a model of heads."""
    say_skipped(pairs.skipped)
    if model is None:
        from cloob.data.vectors import hold_out

        pairs, _ = hold_out(pairs)
        batch = pairs.batch()
        a, b = batch.parts
        found = judge(pairs.name, a, b, batch.ids)
    else:
        from torch import from_numpy

        from cloob.models.load import load_model
        from cloob.models.vectors import embed_pairs, require_vectors

        encoder = require_vectors(load_model(model).eval())
        a, b = embed_pairs(encoder, pairs)
        found = judge(pairs.name, a, b, from_numpy(pairs.ids), in_one_space=True)
    keys = pairs.keys()
    return Judged(pairs.name, keys, found, keys)


def judge_pictures(
    source: Source, config: cloob.HeadsConfig, model: str | None
) -> Judged:
    """Pictures with captions, by a closed form on the two frozen encoders of a
    configuration, or by a model.
    """
    if model is not None:
        return judge_by_model(source, model, config.workers)
    from cloob.heads.features import embedded, open_encoders

    encoders = str(config.image_encoder), str(config.text_encoder)
    encoder = open_encoders(*encoders, config.image_size)
    pairs, rows = embedded(source, encoder, config.workers)
    say_skipped(pairs.skipped)
    batch = pairs.batch()
    a, b = batch.parts
    found = judge(source.name, a, b, batch.ids)
    captions = [source.caption(row)[1] for row in rows.tolist()]
    return Judged(source.name, pairs.keys(), found, captions, source, rows.tolist())


def judge_by_model(source: Source, model: str, workers: int) -> Judged:
    """Pictures with captions by the embeddings of a model."""
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings

    options = EmbedOptions(workers=workers)
    embeddings = Embeddings({model: model}, options, progress=progress())
    if embeddings.encoder(model).config.kind == "vectors":
        raise InputError(f"{model} takes rows: --a and --b in place of DATA")
    pairs = embeddings.pairs(model, source)
    say_skipped(pairs.images.bad)
    x, y = pairs.images.features, pairs.texts[pairs.first_texts]
    usable = (x.isfinite().all(1) & y.isfinite().all(1)).nonzero().squeeze(1)
    captions = [pairs.captions[text] for text in pairs.first_texts[usable].tolist()]
    ids = cloob.ids(captions)
    found = judge(source.name, x[usable], y[usable], ids, in_one_space=True)
    rows = usable.tolist()
    keys = [pairs.images.keys[row] for row in rows]
    return Judged(source.name, keys, found, captions, source, rows)


def say_skipped(skipped: Sequence[Skip]) -> None:
    """Says what cannot be used."""
    if skipped:
        first = skipped[0]
        why = first.detail or first.reason
        say(f"{len(skipped):,} cannot be used, such as {first.key}: {why}")


def judge(
    name: str, a: Tensor, b: Tensor, ids: Tensor, *, in_one_space: bool = False
) -> Suspicion:
    """What is found of pairs, by a closed form unless a model made their rows."""
    from cloob.heads.suspects import suspicion

    try:
        return suspicion(a, b, ids, in_one_space=in_one_space)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


# --- the list and the page ---


def report(judged: Judged, table: Path | None, page: Path | None) -> None:
    """Prints the most suspicious pairs, lists all in a table, and shows some on a
    page.
    """
    ranked, count = judged.ranked(), judged.found.count()
    wrong = judged.found.wrong
    low, high = wrong.interval
    doubt = "" if wrong.is_certain else ", too uncertain to leave any out"
    print(
        f"{judged.name}: {count:,} of {len(ranked):,} pairs are more probably wrong"
        f" than right; wrong in all: {wrong.share:.1%} (95 %: {low:.1%} to"
        f" {high:.1%}{doubt})"
    )
    n_printed = N_PRINTED if table is None else min(N_PRINTED, count)
    for place in ranked[:n_printed]:
        print_line(judged.line(place))
    if table is not None:
        header = [*Line._fields[:-1], "fits better"]
        write_csv(table, [header, *map(judged.line, ranked)])
        print(table)
    if page is not None:
        write_page(judged, ranked, page)
        print(page)


def print_line(line: Line) -> None:
    """Prints a pair in one line."""
    better = f"; fits better: {line.better[:60]}" if line.better else ""
    numbers = f"{line.score:7.3f} {line.probability:5.0%}"
    print(f"  {numbers}  {line.pair}  {line.b[:60]}{better}")


def write_page(judged: Judged, ranked: Sequence[int], page: Path) -> None:
    """Thumbnails of those that are probably wrong, then a line on the others."""
    from cloob.data.sheet import Card, pair_cards, write_sheet

    assert judged.source is not None
    count, n = judged.found.count(), len(ranked)
    cards: list[Card] = []
    for place in ranked[: min(N_SHOWN, count or N_UNCERTAIN)]:
        line = judged.line(place)
        lines = [f"fits better: {line.better[:160]}"] if line.better else []
        lines.append(f"wrong with probability {line.probability:.2f}")
        cards += pair_cards(judged.source, judged.rows[place], *lines)
    low, high = judged.found.wrong.interval
    heading = f"The {len(cards)} pairs that seem to belong together least"
    closing = f"Of all {n:,} pairs {low:.1%} to {high:.1%} are wrong (95 %)."
    if count:
        heading += f", of {count:,} that are probably wrong"
        closing += f" The other {n - count:,} are probably right."
    write_sheet(page, f"Suspects in {judged.name}", heading, cards, closing)

"""The nearest pictures above a cutoff, look-alikes, and what a query retrieves."""

from __future__ import annotations

import bisect
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np

from cloob.errors import InputError
from cloob.search.ask import background
from cloob.search.ask.query import Query, Term, Vector, embed_query
from cloob.search.records import Hit, IndexedModel, Item, Results
from cloob.search.store import Ids, Store, Vectors
from cloob.search.where import Filter, parse

if TYPE_CHECKING:
    from PIL.Image import Image

    from cloob.models.encoding import Encoder
    from cloob.search.ask.embedder import Embedder
    from cloob.search.ask.explain import Retrieved

T = TypeVar("T")
Cutoff = float | Literal["auto"] | None
Asked = "Query | str | Path | Image | Vector"

MAX_TOP = 100_000
DUPLICATE = 0.97
"""Cosine from which two pictures look alike."""

LOOKED_AT = 200
"""Nearest pictures that the cutoff looks among, at least: the nearest of all need not be the one that fits."""

_ALL_IDS = 20_000  # up to here unrelated pictures are drawn among all
_BLOCK = 256  # pictures that are compared at once


class Collection(Protocol):
    """What an index has to have to be asked; :class:`cloob.search.index.Index` is one."""

    @property
    def store(self) -> Store:
        """Rows and vectors."""

    def model(self, name: str | IndexedModel | None = None) -> IndexedModel:
        """A model by its name, or one that was found before, if it has not been replaced."""

    def encoder(self, name: str | IndexedModel | None = None) -> Encoder:
        """A model, loaded once."""

    def once(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` returns, kept for later calls with an equal key."""

    def embedder(self, name: str | IndexedModel | None = None) -> Embedder:
        """What embeds words and pictures of queries."""


def search(
    index: Collection,
    query: Query | str | Path | Image | Vector,
    *,
    top: int = 20,
    where: str | Filter | None = None,
    model: str | IndexedModel | None = None,
    cutoff: Cutoff = "auto",
    row: Vector | None = None,
) -> Results:
    """The pictures nearest to a query, those alone whose margin reaches the cutoff.

    Args:
        index: What is searched.
        query: See :meth:`cloob.search.index.Index.search`.
        top: How many at most.
        where: A filter, see :mod:`cloob.search.where`.
        model: The model that is asked, or its name; None: the index's own choice.
        cutoff: A margin; ``"auto"``: the default of the query's kind; None: all.
        row: The query's unit row (D,) where it is known: then nothing of the query is embedded.

    Raises:
        InputError: The query, the filter, the model or a number is wrong, or the model was replaced meanwhile.
    """
    if not 1 <= top <= MAX_TOP:
        raise InputError(f"the {top} best are asked for; 1 to {MAX_TOP:,} are given")
    if isinstance(cutoff, float | int):
        background.check_cutoff(cutoff)
    filter_ = read_filter(index, where)
    asked = index.model(model)
    if isinstance(query, np.ndarray):
        row, others, least = checked_row(query if row is None else row, asked), None, None
        own: tuple[int, ...] = ()
    else:
        query = Query.of(query)
        row = query_row(index, query, asked) if row is None else checked_row(row, asked)
        own = tuple(int(term.what) for term in query.terms if term.kind == "item")  # type: ignore[arg-type]
        others = unrelated_rows(index, query, asked)
        least = background.default_cutoff(query) if cutoff == "auto" else cutoff
    looked = top if others is None or least is None else max(top, LOOKED_AT)
    try:
        near = index.store.nearest(asked.name, row[None], looked + len(own), filter_)
        places = [place for place, id_ in enumerate(near.ids[0].tolist()) if id_ > 0 and id_ not in own][:looked]
        ids, scores = near.ids[0][places], near.scores[0][places]
        return _results(index, asked, ids, scores, others, least, near.searched, top)
    finally:  # vectors are asked for by name: none of these are of other weights, or of another width
        index.model(asked)


def _results(
    index: Collection,
    asked: IndexedModel,
    ids: Ids,
    scores: Vectors,
    others: Vectors | None,
    least: float | None,
    searched: int,
    top: int,
) -> Results:
    """Hits with their margins, without those below the cutoff; at most ``top``."""
    margins: Sequence[float | None] = [None] * len(ids)
    if others is not None and len(ids):
        margins = background.levels(index.store.vectors(asked.name, ids.tolist()), others).margins(scores).tolist()
    kept = [place for place, margin in enumerate(margins) if least is None or margin is None or margin >= least]
    cut = min(top, len(ids)) - sum(place < top for place in kept)
    kept = kept[:top]
    items = {item.id: item for item in index.store.items(ids[kept].tolist())}
    hits = [
        Hit(items[int(ids[place])], float(scores[place]), margins[place]) for place in kept if int(ids[place]) in items
    ]
    return Results(tuple(hits), searched, cut, asked.name)


def read_filter(index: Collection, where: str | Filter | None) -> Filter | None:
    """A filter of text, or as it is."""
    return parse(where, index.store.columns()) if isinstance(where, str) else where


def query_row(index: Collection, query: Query, asked: IndexedModel) -> Vector:
    """The unit row of a query by a model of the index."""
    embedder = index.embedder(asked) if query.needs_model else None
    return checked_row(embed_query(query, embedder, lambda id_: item_row(index, id_, asked)), asked)


def item_row(index: Collection, id_: int, asked: IndexedModel) -> Vector:
    """The unit row of a picture of the index.

    Raises:
        InputError: It is not there, or has no vector of this model.
    """
    row: Vector = index.store.vectors(asked.name, [id_])[0]
    if not np.isfinite(row).all():
        there = bool(index.store.items([id_]))
        said = f"has no vector of the model {asked.name!r}" if there else "is not in this index"
        raise InputError(f"picture {id_} {said}")
    return row


def checked_row(row: Vector, asked: IndexedModel) -> Vector:
    """A row as float32 of length 1.

    Raises:
        InputError: It has another width than the model's, is not finite or zero.
    """
    row = np.asarray(row, np.float32)
    length = float(np.linalg.norm(row)) if row.ndim == 1 else 0.0
    if row.shape != (asked.dim,) or not 0 < length < np.inf:
        raise InputError(f"a query of shape {row.shape} for the model {asked.name!r}; ({asked.dim},) is wanted, not 0")
    return row / length


def unrelated_rows(index: Collection, query: Query, asked: IndexedModel) -> Vectors | None:
    """(B, D) unrelated queries of the query's shape; None where there is nothing to draw them from."""
    shape = tuple((term.kind == "words", term.weight) for term in query.terms)
    words, shown = (any(is_words is wanted for is_words, _ in shape) for wanted in (True, False))

    def work() -> Vectors | None:
        # Without words, rows for the number of draws alone.
        rows = text_rows(index, asked) if words else np.zeros((background.DRAWN, asked.dim), np.float32)
        pictures = drawn_pictures(index, asked) if shown else np.empty((0, asked.dim), np.float32)
        return background.unrelated(query, rows, pictures)

    revision = index.store.revision() if shown else None
    return index.once(("unrelated", asked.name, asked.fingerprint, revision, shape), work)


def text_rows(index: Collection, asked: IndexedModel) -> Vectors:
    """(B, D) of the background's texts by a model of the index."""
    return background.background_rows(lambda: index.embedder(asked), asked.fingerprint)


def drawn_pictures(index: Collection, asked: IndexedModel) -> Vectors:
    """(P, D) of pictures that stand for unrelated ones; the same for the same index."""
    store = index.store
    generator = np.random.default_rng(0)
    ids = store.ids(limit=_ALL_IDS + 1)
    if len(ids) > _ALL_IDS:
        starts = generator.integers(int(ids[0]) - 1, _last_id(store), size=background.DRAWN).tolist()
        ids = np.unique(np.concatenate([store.ids(after=start, limit=1) for start in starts]))
        if len(ids) < background.DRAWN // 2:  # wide gaps between the ids, behind which the same ones are drawn
            ids = store.ids()
    ids = generator.permutation(ids)[: background.DRAWN]
    rows = index.store.vectors(asked.name, ids.tolist())
    return rows[np.isfinite(rows).all(1)]


def _last_id(store: Store) -> int:
    """The largest id; of a store that is not empty."""

    def is_beyond(id: int) -> bool:
        return not len(store.ids(after=id, limit=1))

    return bisect.bisect_left(range(sys.maxsize), True, key=is_beyond)


def rows_in_blocks(
    index: Collection, asked: IndexedModel, filter_: Filter | None, size: int = 8192
) -> Iterator[tuple[Ids, Vectors]]:
    """Ids and vectors of all pictures that match and have one, a part at a time."""
    last = 0
    while len(ids := index.store.ids(filter_, after=last, limit=size)):
        last = int(ids[-1])
        rows = index.store.vectors(asked.name, ids.tolist())
        there = np.isfinite(rows).all(1)
        if there.any():
            yield ids[there], rows[there]


def duplicates(
    index: Collection,
    threshold: float = DUPLICATE,
    where: str | Filter | None = None,
    model: str | None = None,
    *,
    exact: bool = False,
) -> list[tuple[Hit, ...]]:
    """Groups of look-alikes; see :meth:`cloob.search.index.Index.duplicates`."""
    if not 0 < threshold <= 1:
        raise InputError(f"the threshold is {threshold}; a cosine above 0, at most 1, is wanted")
    filter_, last = read_filter(index, where), 0
    facts: list[tuple[int, int, str, int, str]] = []
    while len(ids := index.store.ids(filter_, after=last, limit=8192)):
        last = int(ids[-1])
        facts += [
            (-item.width * item.height, -item.bytes, item.date or "~", item.id, item.content)
            for item in index.store.items(ids.tolist())
        ]
    copies: dict[str, list[int]] = {}  # best first, and so are the copies of each
    for *_, id_, content in sorted(facts):
        copies.setdefault(content, []).append(id_)
    classes = list(copies.values())
    alike = [[(place, 1.0)] for place in range(len(classes))]
    if not exact:
        asked = index.model(model)
        alike = _look_alikes(index.store.vectors(asked.name, [ids[0] for ids in classes]), threshold)
        index.model(asked)  # as in `search`
    scores = [{id_: score for place, score in group for id_ in classes[place]} for group in alike]
    scores = [group for group in scores if len(group) > 1]
    items = {item.id: item for item in index.store.items([id_ for group in scores for id_ in group])}
    files = ((group, _files([items[id_] for id_ in group if id_ in items])) for group in scores)
    groups = [tuple(Hit(item, group[item.id]) for item in some) for group, some in files if len(some) > 1]
    return sorted(groups, key=lambda group: -len(group))


def _look_alikes(rows: Vectors, threshold: float) -> list[list[tuple[int, float]]]:
    """A partition of unit rows into groups without a pair below the threshold: places, cosines with the first.

    The first row that is in no group yet takes those near to it, nearest first, if they are near to all in its group.
    """
    rows = np.nan_to_num(rows)  # without a vector: near to none
    least = threshold - 1e-5  # a cosine of equal rows may be a rounding below 1
    free, groups = np.ones(len(rows), bool), []
    for start in range(0, len(rows), _BLOCK):
        scores = rows[start : start + _BLOCK] @ rows[start:].T
        for first, row in enumerate(scores, start):
            if not free[first]:
                continue
            free[first], group = False, [(first, 1.0)]
            near = np.flatnonzero((row >= least) & free[start:])
            near = near[np.argsort(-row[near], kind="stable")]
            while len(near):
                place = start + int(near[0])
                group.append((place, float(row[near[0]])))
                free[place] = False
                near = near[1:][rows[start + near[1:]] @ rows[place] >= least]
            groups.append(sorted(group))
    return groups


def _files(items: Sequence[Item]) -> list[Item]:
    """Each file once, by the name that is no link where there is one."""
    files: dict[str, Item] = {}
    for item in items:
        path = os.path.realpath(item.path)
        if path not in files or path == item.path:
            files[path] = item
    return list(files.values())


def explain(
    index: Collection,
    query: Query | str | Path | Image | Vector,
    *,
    beta: float | None = None,
    top: int = 20,
    where: str | Filter | None = None,
    model: str | IndexedModel | None = None,
    row: Vector | None = None,
) -> Retrieved:
    """What a query retrieves from the pictures as a Hopfield memory, see :mod:`cloob.search.ask.explain`.

    Args:
        index: Whose pictures are the memory.
        query: As for :func:`search`.
        beta: β; None: the model's own, else 8.
        top: Pictures to name, of the associated ones and of the nearest.
        where: Which pictures.
        model: The model, or its name.
        row: As for :func:`search`.

    Raises:
        InputError: As :func:`search`; β is not positive; or no picture is there.
    """
    from cloob.search.ask import explain as memory  # torch

    if beta is not None:
        memory.check_beta(beta)
    filter_, asked = read_filter(index, where), index.model(model)
    if row is not None or isinstance(query, np.ndarray):
        row = checked_row(query if row is None else row, asked)  # type: ignore[arg-type]
    else:
        row = query_row(index, Query.of(query), asked)
    if beta is None:
        beta = memory.beta_of(index.encoder(asked))[0]
    count = index.store.count(filter_)
    near = index.store.nearest(asked.name, row[None], max(1, min(count, memory.MEMORY)), filter_)
    found_rows = near.ids[0] > 0
    ids, scores = near.ids[0][found_rows], near.scores[0][found_rows]
    vectors = index.store.vectors(asked.name, ids.tolist())
    there = np.isfinite(vectors).all(1)  # others were removed meanwhile
    ids, scores, vectors = ids[there], scores[there], vectors[there]
    if not len(ids):
        raise InputError("no picture to retrieve from: the filter lets none through, or the index is empty")
    found = memory.associate(row, vectors, beta)
    best = np.argsort(-found.weights, kind="stable")[:top]
    items = {item.id: item for item in index.store.items(ids[best].tolist())}
    pictures = tuple(
        memory.Associated(items[int(ids[place])], float(found.weights[place]), float(scores[place]))
        for place in best
        if int(ids[place]) in items
    )
    after = search(index, found.pattern, top=top, where=filter_, model=asked, cutoff=None)
    agreement = float(found.pattern @ row)
    return memory.Retrieved(beta, len(ids), near.searched, pictures, found.effective, agreement, after.hits, asked.name)


def similar(
    index: Collection,
    id_: int,
    *,
    top: int = 20,
    where: str | Filter | None = None,
    model: str | None = None,
    cutoff: Cutoff = None,
) -> Results:
    """The pictures nearest to one of the index, without itself; no model is loaded."""
    return search(index, Query((Term(id_, "item"),)), top=top, where=where, model=model, cutoff=cutoff)

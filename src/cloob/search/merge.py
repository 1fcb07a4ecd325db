"""Takes what one index has into another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cloob.errors import InputError
from cloob.search.records import IndexedModel
from cloob.search.store import Store
from cloob.search.update import check_apart

_PAGE = 2000


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        added: Items that were not here.
        vectors: Vectors that were written, those of the added items included.
        present: Items that are here with the same bytes; what is said of them stays.
        other: Items of which this index has the path with other bytes; they stay as they are here.
    """

    added: int
    vectors: int
    present: int
    other: int


def merge(store: Store, from_: Store) -> Merged:
    """Adds what ``from_`` has to ``store``.

    Vectors go with their model's weights, whatever it is called there.

    Raises:
        InputError: A name stands for other weights in one than in the other, or a source of one lies in one of the
            other; nothing is written then.
    """
    check_apart(from_.sources(), store.sources())
    names = _names(store, from_)
    for source in {*from_.sources()} - {*store.sources()}:
        store.set_exclude(source, from_.exclude(source))
    added: set[int] = set()
    written, present, other = 0, 0, 0
    known = {(source, state.path): state for source in store.sources() for state in store.states(source)}
    last = 0
    while len(ids := from_.ids(after=last, limit=_PAGE)):
        last = int(ids[-1])
        items = {item.id: item for item in from_.items(ids.tolist())}
        kept = []
        for number, item in items.items():
            state = known.get((item.source, item.path))
            if state is None or state.id is None:
                kept.append(number)
            elif state.content == item.content:
                present += 1
                kept.append(number)
            else:
                other += 1
        for theirs, ours in names.items():
            vectors = from_.vectors(theirs, kept)
            chosen = [
                row
                for row in np.flatnonzero(np.isfinite(vectors).all(1)).tolist()
                if not _has(known.get((items[kept[row]].source, items[kept[row]].path)), ours)
            ]
            new = [items[kept[row]] for row in chosen]
            held = {item.id: item for item in store.items([_id(known.get((i.source, i.path))) for i in new])}
            store.write(
                [held.get(_id(known.get((i.source, i.path))), replace(i, id=0)) for i in new], ours, vectors[chosen]
            )
            written += len(new)
            added |= {item.id for item in new if _id(known.get((item.source, item.path))) == 0}
    store.optimise()
    return Merged(len(added), written, present, other)


def _names(store: Store, from_: Store) -> dict[str, str]:
    """What each of their models is called here."""
    here = store.models()
    by_weights = {model.fingerprint: model.name for model in here}
    taken = {model.name for model in here}
    names: dict[str, str] = {}
    new: list[IndexedModel] = []
    for model in from_.models():
        if model.fingerprint in by_weights:
            names[model.name] = by_weights[model.fingerprint]
        elif model.name in taken:
            raise InputError(
                f"{from_.address}: holds vectors of another model {model.name!r} than {store.address}; "
                "index one of the two anew with --replace-model, or under another --name"
            )
        else:
            names[model.name] = model.name
            new.append(model)
    for model in new:
        store.add_model(model)
    return names


def _has(state: object, model: str) -> bool:
    return model in getattr(state, "models", ())


def _id(state: object) -> int:
    return getattr(state, "id", None) or 0

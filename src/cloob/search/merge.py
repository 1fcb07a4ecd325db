"""Takes what one index has into another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cloob.errors import InputError
from cloob.search.store import FileState, Store
from cloob.search.update import check_apart

_PAGE = 2000


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        added: Items that were not here.
        vectors: Vectors that were written, those of the added items included.
        present: Items that are here with the same bytes; what is said of them stays.
        other: Items of which this index has the path with other bytes; they stay as they are here.
    """

    added: int = 0
    vectors: int = 0
    present: int = 0
    other: int = 0


def merge(store: Store, from_: Store) -> Merged:
    """Adds what ``from_`` has to ``store``.

    Vectors go with their model's weights, whatever it is called there.

    Raises:
        InputError: A name stands for other weights in one than in the other, or a source of one lies in one of the
            other; nothing is written then.
    """
    check_apart(from_.sources(), store.sources())
    names, done = _names(store, from_), Merged()
    for source in {*from_.sources()} - {*store.sources()}:
        store.set_exclude(source, from_.exclude(source))
    states = ((source, state) for source in store.sources() for state in store.states(source))
    known = {(source, state.path): state for source, state in states if state.id is not None}
    nothing = FileState(None, "", 0, None, "", None, ())
    last = 0
    while len(ids := from_.ids(after=last, limit=_PAGE)):
        last = int(ids[-1])
        pairs = [(item, known.get((item.source, item.path), nothing)) for item in from_.items(ids.tolist())]
        same = [(item, state) for item, state in pairs if state.id is None or state.content == item.content]
        done.other += len(pairs) - len(same)
        done.present += sum(state.id is not None for _, state in same)
        added: set[int] = set()
        for theirs, ours in names.items():
            vectors = from_.vectors(theirs, [item.id for item, _ in same])
            new = np.isfinite(vectors).all(1) & np.array([ours not in state.models for _, state in same], bool)
            chosen = [pair for pair, wanted in zip(same, new, strict=True) if wanted]
            held = {item.id: item for item in store.items([state.id or 0 for _, state in chosen])}
            items = [held.get(state.id or 0, replace(item, id=0)) for item, state in chosen]
            store.write(items, ours, vectors[new])
            done.vectors += len(items)
            added |= {item.id for item, state in chosen if state.id is None}
        done.added += len(added)
    store.optimise()
    return done


def _names(store: Store, from_: Store) -> dict[str, str]:
    """What each of their models is called here; adds those that are new."""
    here = {model.fingerprint: model.name for model in store.models()}
    new = [model for model in from_.models() if model.fingerprint not in here]
    for model in new:
        if model.name in here.values():
            raise InputError(
                f"{from_.address}: holds vectors of another model {model.name!r} than {store.address}; "
                "index one of the two anew with --replace-model, or under another --name"
            )
    for model in new:
        store.add_model(model)
    return {model.name: here.get(model.fingerprint, model.name) for model in from_.models()}

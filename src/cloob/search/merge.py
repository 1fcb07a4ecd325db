"""Takes what one index has into another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cloob.search.records import FileState
from cloob.search.store import Store
from cloob.search.update import check_apart


@dataclass
class Merged:
    added: int = 0  # items that were not here
    vectors: int = 0  # that were written, those of the added items included
    present: int = 0  # items that are here with the same bytes; what is said of them stays
    other: int = 0  # items of which this index has the path with other bytes; they stay as they are here


def merge(store: Store, other: Store) -> Merged:
    """Adds what ``other`` has to ``store``; vectors go with their model's weights, whatever it is called there."""
    check_apart(other.sources(), store.sources())
    here = {model.fingerprint: model.name for model in store.models()}
    new = [model for model in other.models() if model.fingerprint not in here]
    for model in new:
        store.add_model(model)
    for source in {*other.sources()} - {*store.sources()}:
        store.set_exclude(source, other.exclude(source))
    states = ((source, state) for source in store.sources() for state in store.states(source))
    known = {(source, state.path): state for source, state in states if state.id is not None}
    nothing = FileState(None, "", 0, None, "", None, ())
    done = Merged()
    for ids in other.pages():
        pairs = [(item, known.get((item.source, item.path), nothing)) for item in other.items(ids)]
        same = [(item, state) for item, state in pairs if state.content in ("", item.content)]
        done.other += len(pairs) - len(same)
        done.present += sum(state.id is not None for _, state in same)
        added: set[int] = set()
        for model in other.models():
            name = here.get(model.fingerprint, model.name)
            vectors = other.vectors(model.name, [item.id for item, _ in same])
            wanted = np.isfinite(vectors).all(1) & np.array([name not in state.models for _, state in same], bool)
            chosen = [pair for pair, is_wanted in zip(same, wanted, strict=True) if is_wanted]
            held = {item.id: item for item in store.items([state.id or 0 for _, state in chosen])}
            store.write([held.get(state.id or 0, replace(item, id=0)) for item, state in chosen], name, vectors[wanted])
            done.vectors += len(chosen)
            added |= {item.id for item, state in chosen if state.id is None}
        done.added += len(added)
    store.optimise()
    return done

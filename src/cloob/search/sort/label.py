"""Labels for the pictures of an index: by names, or by a head that was fitted to examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cloob.errors import InputError
from cloob.search.ask.find import read_filter, rows_in_blocks, text_rows, why_none
from cloob.search.records import IndexedModel
from cloob.search.sort import classify
from cloob.search.sort.classify import LabelOptions, Labels
from cloob.search.sort.fewshot import Head, fit_head
from cloob.search.store import Ids, Vectors
from cloob.search.where import Filter

if TYPE_CHECKING:
    from cloob.search.index import Index

MAX_NUMBERS = 200_000_000
"""Pictures times labels. The work on them takes up to 8.5 times the 0.8 GB of so many probabilities."""


def label_index(
    index: Index,
    labels: Sequence[str],
    options: LabelOptions | None = None,
    *,
    where: str | Filter | None = None,
    model: str | None = None,
) -> Labels:
    """Zero-shot labels of all pictures that match.

    Raises:
        InputError: Labels, templates, filter or model are wrong, or no picture matches.
    """
    options = options or LabelOptions()
    names = classify.check_labels(labels, options)
    asked = index.model(model)
    ids, rows = _all_rows(index, where, asked, len(names))
    encoder = index.encoder(asked)
    tau = classify.temperature(encoder, options.inv_tau)
    others = text_rows(index, asked) if options.multi or options.none else None
    of_labels = classify.label_rows(encoder, names, options.templates)
    return classify.label_pictures(ids, rows, names, of_labels, others, options, tau)


def label_by_head(index: Index, head: Head, *, where: str | Filter | None = None, model: str | None = None) -> Labels:
    """The labels of a head for all pictures that match; one of them for each picture."""
    ids, rows = _all_rows(index, where, index.model(model), len(head.names))
    labels = Labels(head.names, ids, head.probabilities(rows), None, ())
    return classify.chosen_labels(labels, LabelOptions())


def head_of(index: Index, folder: Path, seed: int = 0) -> tuple[Head, float]:
    """A head from an index of a folder with a sub-folder for each label, and zero-shot's accuracy on the examples.

    Args:
        index: Of the folder.
        folder: With the examples; a label is the name of the folder right below it.
        seed: Of cross-validation.

    Raises:
        InputError: A picture that lies in no sub-folder, or too few labels or examples.
    """
    asked = index.model()
    ids, rows = _all_rows(index, None, asked, 1)
    root = Path(os.path.abspath(folder))  # noqa: PTH100 - as the index has it: links stay
    names: list[str] = []
    for item in index.store.items(ids.tolist()):
        path = Path(item.path)
        path = path if path.is_absolute() else root / path
        parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if len(parts) < 2:
            raise InputError(f"{item.path}: lies in no folder of a label; {folder} has to hold a folder for each label")
        names.append(parts[0])
    labels = sorted(set(names))
    numbers = np.array([labels.index(name) for name in names], np.int64)
    head = fit_head(rows, numbers, labels, asked.fingerprint, seed)
    encoder = index.encoder(asked)
    spoken = [label.replace("_", " ").replace("-", " ") for label in labels]
    of_labels = classify.label_rows(encoder, spoken, classify.TEMPLATES)
    zero_shot = float(((rows @ of_labels.T).argmax(1) == numbers).mean())
    return head, zero_shot


def _all_rows(index: Index, where: str | Filter | None, asked: IndexedModel, labels: int) -> tuple[Ids, Vectors]:
    """Ids and vectors of all pictures that match."""
    filter_ = read_filter(index, where)
    count = index.store.count(filter_)
    if count * labels > MAX_NUMBERS:
        raise InputError(f"{count:,} pictures by {labels:,} labels are too many at once; --where takes a part")
    parts = list(rows_in_blocks(index, asked, filter_))
    if not parts:
        raise InputError(f"no picture to label: {why_none(index.store, asked.name, filter_)}")
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([rows for _, rows in parts])

"""Which files are copies, which pictures look alike, and which files are one shot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cloob.data.source import PICTURE_SUFFIXES, RAW_SUFFIXES
from cloob.pictures import Unreadable, is_one_colour, read_file
from cloob.search.find import View
from cloob.search.records import FileState, Hit, Item, file_of
from cloob.search.store import Vectors

DUPLICATE = 0.97  # cosine from which two pictures look alike
_BLOCK = 256  # pictures that are compared at once
_ONE_COLOUR_BYTES = (
    64 * 1024
)  # with metadata; of more, and _BYTES_PER_PIXEL, no file of one colour has
_BYTES_PER_PIXEL = 0.03

Group = tuple[Hit, ...]


@dataclass(frozen=True)
class Duplicates:
    groups: list[Group]  # the largest first; of every the best first
    # files left out because they are gone, or have changed since they were indexed
    stale: int
    twice: int  # second names of a file, left out: links, or one disk mounted twice


def shot_of(path: str) -> str:
    """What the files of one shot share (RAW, JPEG, HEIC): folder and stem; the path
    itself of anything else.
    """
    stem, suffix = os.path.splitext(path)  # noqa: PTH122
    return stem if suffix.lower() in PICTURE_SUFFIXES else path


def is_raw(path: str) -> bool:
    return path.lower().endswith(RAW_SUFFIXES)


def first_alike(items: Iterable[Item | FileState]) -> list[int]:
    """For every item the id of the first one with equal bytes or of the same shot; its
    id where there is none.
    """
    firsts: dict[str, int] = {}
    ids = []
    for item in items:
        keys = (item.content, shot_of(item.path))
        first = next((firsts[key] for key in keys if key in firsts), item.id or 0)
        firsts.update(dict.fromkeys(keys, first))
        ids.append(first)
    return ids


def look_alikes(view: View, threshold: float, *, exact: bool) -> list[Group]:
    """Groups of pictures as they were indexed; files that are gone by now are among
    them.
    """
    # the best is the least: most pixels, with what the camera wrote, most bytes, oldest
    facts = []
    for item in (
        item for ids in view.store.pages(view.where) for item in view.store.items(ids)
    ):
        rank = (
            -item.width * item.height,
            item.date_from != "exif",
            -item.bytes,
            item.date or "~",
        )
        facts.append((*rank, item.id, item.path, item.content))
    with_raw = {shot_of(path) for *_, path, _ in facts if is_raw(path)}
    facts.sort(
        key=lambda fact: (not is_raw(fact[-2]), shot_of(fact[-2]) not in with_raw, fact)
    )
    copies: dict[str, list[int]] = {}  # by content, best first; so are the copies
    for *_, id_, _, content in facts:
        copies.setdefault(content, []).append(id_)
    classes = list(copies.values())
    alike = [[(place, 1.0)] for place in range(len(classes))]
    if not exact:
        alike = partition(view.vectors([ids[0] for ids in classes]), threshold)
        view.models.model(
            view.model
        )  # refused where its name stands for other weights by now
        some = view.items(
            [
                classes[place][0]
                for group in alike
                if len(group) > 1
                for place, _ in group
            ]
        )
        plain: dict[int, None] = {}  # places of those of one colour
        for place, item in (
            (place, some[ids[0]]) for place, ids in enumerate(classes) if ids[0] in some
        ):
            with contextlib.suppress(
                OSError, ValueError, Unreadable
            ):  # gone, or in a container
                small = (
                    item.bytes
                    <= _ONE_COLOUR_BYTES + _BYTES_PER_PIXEL * item.width * item.height
                )
                plain |= (
                    {place: None}
                    if small and is_one_colour(read_file(item.path))
                    else {}
                )
        alike = [[pair for pair in group if pair[0] not in plain] for group in alike]
        alike += [[(place, 1.0)] for place in plain]
    scores = [
        {id_: score for place, score in group for id_ in classes[place]}
        for group in alike
    ]
    known = view.items([id_ for group in scores if len(group) > 1 for id_ in group])
    groups = [
        tuple(Hit(known[id_], score) for id_, score in group.items() if id_ in known)
        for group in scores
    ]
    return sorted(filter(None, groups), key=lambda group: -len(group))


def present(view: View, groups: Sequence[Group]) -> Duplicates:
    """The groups as far as their files are there unchanged, every file once, and more
    than one shot in a group.
    """
    kept, stale, twice = [], 0, 0
    for group in groups:
        files: dict[Hashable, Hit] = {}
        for hit in group:
            if (file := file_of(hit.item)) is None:
                stale += 1
                continue
            twice += file in files
            if (
                file not in files or os.path.realpath(hit.item.path) == hit.item.path
            ):  # by the name that is no link
                files[file] = hit
        there = list(files.values())
        if len({shot_of(hit.item.path) for hit in there}) > 1:
            if there[0].score != 1:  # the first of its group has gone
                rows = view.vectors([hit.item.id for hit in there])
                there = [
                    Hit(hit.item, float(score))
                    for hit, score in zip(there, rows @ rows[0], strict=True)
                ]
            kept.append(tuple(there))
    return Duplicates(sorted(kept, key=lambda group: -len(group)), stale, twice)


def rest(group: Group) -> list[Item]:
    """What may go: all but the files of the best shot."""
    best = shot_of(group[0].item.path)
    return [hit.item for hit in group if shot_of(hit.item.path) != best]


def partition(
    rows: Vectors, threshold: float = DUPLICATE
) -> list[list[tuple[int, float]]]:
    """Groups of unit rows without a pair below the threshold, greedily: places, and
    cosines with the first.
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

"""Writes vectors of pictures as ``cloob embed`` was asked to."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np

from cloob.commands.finding import EmbedArguments
from cloob.commands.work.collection import opened
from cloob.commands.work.showing import hint
from cloob.errors import InputError, require
from cloob.files import write_whole
from cloob.search.find import rows_in_blocks
from cloob.search.index import Index
from cloob.search.open import is_there
from cloob.search.records import Item, valid
from cloob.search.store import Vectors


def run(arguments: EmbedArguments) -> int:
    """Embeds; returns the exit code."""
    arguments.cache.use()
    with opened(arguments.source, arguments.model, arguments.device, arguments.workers) as (index, unread):
        count = write_vectors(index, arguments.out)
    left = f", {unread:,} could not be read" if unread else ""
    print(f"cloob: {arguments.out}: {count:,} pictures{left}", file=sys.stderr)
    if is_there(arguments.source):
        hint(["serve", arguments.source, "--open"])
    elif arguments.model is not None:
        hint(["index", arguments.source, "--model", arguments.model, "--out", arguments.out.with_suffix(".idx")])
    return 1 if unread else 0


def write_vectors(index: Index, out: Path) -> int:
    """Writes the vectors of an index's default model, in the order of ids, with path and caption of each.

    Returns:
        How many.

    Raises:
        InputError: There are none, or the file cannot be written.
    """
    if out.suffix == ".parquet":
        return index.export(out)
    asked = index.model()
    items: list[Item] = []
    parts: list[Vectors] = []
    for ids, rows in rows_in_blocks(index, asked, None):
        there = index.items(ids.tolist())
        items += there
        parts.append(rows[np.isin(ids, [item.id for item in there])])  # others were removed meanwhile
    if not items:
        raise InputError("no picture has a vector; there is nothing to write")
    vectors = np.concatenate(parts)
    paths = [valid(item.path) for item in items]
    captions = json.dumps([valid(item.caption or "") for item in items])
    if out.suffix == ".npz":
        stream = io.BytesIO()  # captions as one array of texts: numpy pads each text to the longest
        np.savez(stream, vectors=vectors, paths=paths, captions=np.array(captions.encode()), model=asked.name)
        content = stream.getvalue()
    else:
        facts = {"paths": json.dumps(paths), "captions": captions, "model": asked.name}
        content = require("safetensors.numpy", "train").save({"vectors": vectors}, facts)
    write_whole(out, content)
    return len(items)

"""``cloob embed``: vectors of pictures in one file."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cloob.commands.collection import check_source, opened
from cloob.commands.options import CacheOptions, check_out, tyro
from cloob.commands.terminal import hint
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.search.index import Index


@dataclass(frozen=True)
class Options:
    """Write the vectors of pictures into one file."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Whatever `cloob index` takes: a folder, a table, shards; or an index."""
    out: Path
    """FILE.npz, FILE.safetensors or FILE.parquet."""
    model: str | None = None
    """What `cloob eval` takes; for an index the name of one of its models."""
    overwrite: bool = False
    """Replace the file where it is there."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int | None = None
    """Threads that read and decode; left out, one per processor."""
    cache: CacheOptions = field(default_factory=CacheOptions)


def check(options: Options) -> None:
    check_out("--out", options.out, (".npz", ".safetensors", ".parquet"), [options.source])
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out}: exists; --overwrite replaces it")
    check_source(options.source, options.model)


def run(options: Options) -> int:
    """Embeds; 1 where a picture could not be read."""
    from cloob.search.open import is_there

    with opened(options.source, options.model, options.device, options.workers) as (index, unread):
        count = _write_vectors(index, options.out)
    left = f", {unread:,} could not be read" if unread else ""
    print(f"cloob: {options.out}: {count:,} pictures{left}", file=sys.stderr)
    if is_there(options.source):
        hint(["serve", options.source, "--open"])
    elif options.model is not None:
        hint(["index", options.source, "--model", options.model, "--out", options.out.with_suffix(".idx")])
    return 1 if unread else 0


def _write_vectors(index: Index, out: Path) -> int:
    """Writes the vectors of an index's default model in the order of ids, with paths and captions; returns how many."""
    import io
    import json

    import numpy as np
    from safetensors.numpy import save

    from cloob.files import write_whole
    from cloob.search.find import rows_in_blocks
    from cloob.search.records import Item, valid

    if out.suffix == ".parquet":
        return index.export(out)
    asked = index.model()
    items: list[Item] = []
    parts = []
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
        content = save({"vectors": vectors}, {"paths": json.dumps(paths), "captions": captions, "model": asked.name})
    write_whole(out, content)
    return len(items)

"""``cloob embed``: vectors of pictures in one file."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cloob.commands.collection import check_source, opened
from cloob.commands.options import CacheOptions, check_out, exclusive, tyro
from cloob.commands.terminal import hint
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.search.index import Index


@dataclass(frozen=True)
class Options:
    """Write the vectors of pictures into one file; for a run of `cloob train vectors`, those of its rows."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Whatever `cloob index` takes: a folder, a table, shards; or an index. With --a or --b a run."""
    out: Path
    """FILE.npz, FILE.safetensors or FILE.parquet; with --a or --b FILE.npy, FILE.npz or FILE.safetensors."""
    a: str | None = None
    """Rows for the run's head a, as --a of `cloob train vectors`."""
    b: str | None = None
    """Rows for the run's head b."""
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
    rows = [spec for spec in (options.a, options.b) if spec is not None]
    kinds = (".npy", ".npz", ".safetensors") if rows else (".npz", ".safetensors", ".parquet")
    check_out("--out", options.out, kinds, [*rows, options.source])
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out}: exists; --overwrite replaces it")
    exclusive(options, ("a", "b"), ("a", "model"), ("b", "model"))
    if not rows:
        check_source(options.source, options.model)


def run(options: Options) -> int:
    """Embeds; 1 where a picture could not be read."""
    from cloob.search.index import is_there

    if options.a is not None or options.b is not None:
        return _embed_rows(options)
    with opened(options.source, options.model, options.device, options.workers) as (index, unread):
        count = _write_vectors(index, options.out)
    left = f", {unread:,} could not be read" if unread else ""
    print(f"cloob: {options.out}: {count:,} pictures{left}", file=sys.stderr)
    if is_there(options.source):
        hint(["serve", options.source, "--open"])
    elif options.model is not None:
        hint(["index", options.source, "--model", options.model, "--out", options.out.with_suffix(".idx")])
    return 1 if unread else 0


def _embed_rows(options: Options) -> int:
    """Writes a unit row for each row of --a or --b; one that is not finite gives NaN, and then the code is 1."""
    import io

    import numpy as np
    from safetensors.numpy import save

    from cloob.data.vectors import read_matrix
    from cloob.files import write_whole
    from cloob.models.aligned import VectorEncoder
    from cloob.models.load import load_model

    encoder = load_model(options.source, options.device)
    if not isinstance(encoder, VectorEncoder):
        raise InputError(f"{options.source}: is no model of vectors; --a and --b are for runs of `cloob train vectors`")
    spec, encode = (options.a, encoder.encode_a) if options.a is not None else (options.b, encoder.encode_b)
    vectors = encode(read_matrix(str(spec))).cpu().numpy()
    stream = io.BytesIO()
    if options.out.suffix == ".npy":
        np.save(stream, vectors)
    elif options.out.suffix == ".npz":
        np.savez(stream, vectors=vectors)
    else:
        stream.write(save({"vectors": vectors}))
    write_whole(options.out, stream.getvalue())
    bad = int((~np.isfinite(vectors).all(1)).sum())
    left = f", {bad:,} of them NaN, as their numbers are not finite" if bad else ""
    print(f"cloob: {options.out}: {len(vectors):,} rows{left}", file=sys.stderr)
    return 1 if bad else 0


def _write_vectors(index: Index, out: Path) -> int:
    """Writes the vectors of an index's default model in the order of ids, with paths and captions; returns how many."""
    import io
    import json

    import numpy as np
    from safetensors.numpy import save

    from cloob.files import write_whole
    from cloob.search.records import Item, valid

    if out.suffix == ".parquet":
        return index.export(out)
    asked = index.model()
    items: list[Item] = []
    parts = []
    for ids, rows in index.view(model=asked).blocks():
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

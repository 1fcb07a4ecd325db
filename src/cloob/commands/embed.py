"""``cloob embed``: vectors of pictures in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cloob
from cloob.commands.collection import check_source, opened
from cloob.commands.options import DecodeOptions, check_out, exclusive, refuse, tyro
from cloob.commands.terminal import say
from cloob.errors import InputError


@dataclass(frozen=True)
class Options:
    """Write the vectors of pictures into one file; for a run of `cloob train vectors`, those of its rows."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Whatever `cloob index` takes: a folder, one picture, a table, shards; or an index. With --a or --b a run."""
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
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def check(options: Options) -> None:
    rows = [spec for spec in (options.a, options.b) if spec is not None]
    kinds = (".npy", ".npz", ".safetensors") if rows else (".npz", ".safetensors", ".parquet")
    check_out("--out", options.out, kinds, [*rows, options.source])
    refuse({f"{options.out}: exists; --overwrite replaces it": options.out.exists() and not options.overwrite})
    exclusive(options, "a b model")
    if not rows:
        check_source(options.source, options.model)


def run(options: Options) -> int:
    """Embeds; 1 where a picture could not be read."""
    if options.a is not None or options.b is not None:
        return _embed_rows(options)
    with opened(options.source, options.model, options.machine) as (index, unread):
        count = index.export(options.out) if options.out.suffix == ".parquet" else _write_vectors(index, options.out)
    left = f", {unread:,} could not be read" if unread else ""
    say(f"{options.out}: {count:,} pictures{left}")
    return 1 if unread else 0


def _embed_rows(options: Options) -> int:
    """Writes a unit row for each row of --a or --b; one that is not finite gives NaN, and then the code is 1."""
    import numpy as np

    from cloob.data.vectors import read_matrix
    from cloob.models.aligned.vectors import VectorEncoder
    from cloob.models.load import load_model

    encoder = load_model(options.source, options.machine.device)
    if not isinstance(encoder, VectorEncoder):
        raise InputError(f"{options.source}: is no model of vectors; --a and --b are for runs of `cloob train vectors`")
    spec, encode = (options.a, encoder.encode_a) if options.a is not None else (options.b, encoder.encode_b)
    vectors = encode(read_matrix(str(spec))).cpu().numpy()
    _write(options.out, vectors, {}, {})
    bad = int((~np.isfinite(vectors).all(1)).sum())
    left = f", {bad:,} of them NaN, as their numbers are not finite" if bad else ""
    say(f"{options.out}: {len(vectors):,} rows{left}")
    return 1 if bad else 0


def _write_vectors(index: cloob.Index, out: Path) -> int:
    """Writes the vectors of an index's default model in the order of ids, with paths and captions; returns how many."""
    import json

    import numpy as np

    from cloob.search.records import valid

    asked = index.model()
    blocks = list(index.view(model=asked).blocks())
    items = [item for some, _ in blocks for item in some]
    if not items:
        raise InputError("no picture has a vector; there is nothing to write")
    paths = [valid(item.path) for item in items]
    captions = json.dumps([valid(item.caption or "") for item in items])
    # Captions are one array of texts: numpy pads each text to the longest.
    more = {"paths": paths, "captions": np.array(captions.encode()), "model": asked.name}
    facts = {"paths": json.dumps(paths), "captions": captions, "model": asked.name}
    _write(out, np.concatenate([rows for _, rows in blocks]), more, facts)
    return len(items)


def _write(out: Path, vectors: Any, more: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """Writes a matrix, with ``more`` arrays into an .npz file, with ``facts`` into a .safetensors file."""
    import io

    import numpy as np
    from safetensors.numpy import save

    from cloob.files import write_whole

    stream = io.BytesIO()
    if out.suffix == ".npy":
        np.save(stream, vectors)
    elif out.suffix == ".npz":
        np.savez(stream, vectors=vectors, **more)
    else:
        stream.write(save({"vectors": vectors}, dict(facts) or None))
    write_whole(out, stream.getvalue())

"""``cloob embed``: vectors of pictures or texts in one file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cloob.commands.console import DecodeOptions, RowOptions, check, check_out, refuse, say, tyro
from cloob.commands.index import opened


@dataclass(frozen=True)
class Options:
    """Write the vectors of pictures or texts into one file; for a run of `cloob train vectors`, those of its rows."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Whatever `cloob index` takes: a folder, one picture, a table, shards; or an index. With --a or --b a run, or
    what ContrastiveHeads.save wrote; with --texts a model."""
    out: Path  # FILE.npz, .safetensors or .parquet; with --a, --b or --texts FILE.npy, .npz or .safetensors.
    texts: str | None = None  # Texts for the model: a file of lines, or TABLE.parquet:COLUMN.
    model: str | None = None  # What `cloob eval` takes; for an index the name of one of its models.
    overwrite: bool = False  # Replace the file where it is there.
    rows: RowOptions = field(default_factory=RowOptions)
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def run(options: Options) -> int:
    """Embeds; 1 where a picture could not be read, or a row is not finite."""
    from cloob.models.runs import RUN_CONFIG_FILE

    rows, out = [spec for spec in (options.rows.a, options.rows.b, options.texts) if spec is not None], options.out
    kinds = (".npy", ".npz", ".safetensors") if rows else (".npz", ".safetensors", ".parquet")
    check_out("--out", out, kinds, [*rows, options.source])
    refuse({f"{out}: exists; --overwrite replaces it": out.exists() and not options.overwrite})
    check(options, "a excludes b texts model", "b excludes texts model", "texts excludes model")
    if rows:  # unit rows; of one that is not finite NaN
        import numpy as np

        from cloob.data.vectors import read_ids, read_matrix
        from cloob.models.aligned.model import embed_rows
        from cloob.models.load import load_model

        encoder, given = load_model(options.source, options.machine.device), options.rows.given
        embedded = embed_rows(encoder, given[0], read_matrix(given[1])) if given else None
        vectors = (encoder.encode_text(read_ids(str(options.texts))) if embedded is None else embedded).cpu().numpy()
        bad = int((~np.isfinite(vectors).all(1)).sum())
        left = f", {bad:,} of them NaN, as their numbers are not finite" if bad else ""
        say(f"{out}: {_write(out, [vectors]):,} rows{left}")
        return 1 if bad else 0
    run = f"{options.source}: is a run; --texts names texts for it, --a or --b rows for its heads"
    refuse({run: options.model is None and (Path(options.source) / RUN_CONFIG_FILE).is_file()})
    with opened(options.source, options.model, options.machine) as (index, unread):
        if out.suffix == ".parquet":
            count = index.export(out)
        else:
            blocks = list(index.view().blocks())
            items = [item for some, _ in blocks for item in some]
            refuse({"no picture has a vector; there is nothing to write": not items})
            more = {"paths": [item.path for item in items], "captions": [item.caption or "" for item in items]}
            count = _write(out, [rows for _, rows in blocks], more, index.model().name)
    left = f", {unread:,} could not be read" if unread else ""
    say(f"{out}: {count:,} pictures{left}")
    return 1 if unread else 0


def _write(out: Path, blocks: Sequence[Any], texts: Mapping[str, list[str]] = {}, model: str = "") -> int:
    """Writes rows with lists of texts and the model's name, if any; returns how many rows."""
    import numpy as np
    from safetensors.numpy import save

    from cloob.files import write_whole

    vectors, stream = np.concatenate(blocks), io.BytesIO()
    lists = {name: json.dumps(item) for name, item in texts.items()} | ({"model": model} if model else {})
    if out.suffix == ".npy":
        np.save(stream, vectors)
    elif out.suffix == ".npz":
        more: dict[str, Any] = {**lists, **texts}
        if "captions" in more:  # one array of bytes: numpy pads each of several texts to the longest
            more["captions"] = np.array(lists["captions"].encode())
        np.savez(stream, vectors=vectors, **more)
    else:
        stream.write(save({"vectors": vectors}, lists or None))
    write_whole(out, stream.getvalue())
    return len(vectors)

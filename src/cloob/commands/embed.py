"""``cloob embed``: write the vectors of pictures into one file."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cloob.commands.console import (
    DecodeOptions,
    Positional,
    RowOptions,
    arg,
    check,
    check_out,
    refuse,
    say,
)
from cloob.commands.index import opened
from cloob.files import write_whole
from cloob.models.runs import RUN_CONFIG_FILE


@dataclass(frozen=True)
class Options:
    """Write the vectors of pictures or texts into one file; for a run of `cloob train
    vectors`, those of its rows.
    """

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """What `cloob index` takes, or an index; with --a or --b a run, or saved
    ContrastiveHeads; with --texts a model.
    """
    out: Path
    """FILE.npz, .safetensors or .parquet; with --a, --b or --texts FILE.npy, .npz or
    .safetensors.
    """
    texts: str | None = None
    """Texts for the model: a file of lines, or TABLE.parquet:COLUMN."""
    model: str | None = None
    """What `cloob eval` takes; for an index the name of one of its models."""
    overwrite: bool = False
    """Replace the file where it is there."""
    rows: RowOptions = field(default_factory=RowOptions)
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def run(options: Options) -> int:
    """Embeds; 1 where a picture could not be read, or a row is not finite."""
    rows, out = (
        [
            spec
            for spec in (options.rows.a, options.rows.b, options.texts)
            if spec is not None
        ],
        options.out,
    )
    kinds = (
        (".npy", ".npz", ".safetensors")
        if rows
        else (".npz", ".safetensors", ".parquet")
    )
    check_out("--out", out, kinds, [*rows, options.source])
    check(
        options,
        "a excludes b texts model",
        "b excludes texts model",
        "texts excludes model",
    )
    is_run = (
        not rows
        and options.model is None
        and (Path(options.source) / RUN_CONFIG_FILE).is_file()
    )
    refuse(
        {
            f"{out}: exists; --overwrite replaces it": out.exists()
            and not options.overwrite,
            f"{options.source}: is a run; --texts names texts for it, --a or --b rows for its heads": is_run,
        }
    )
    import numpy as np

    texts: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if rows:
        from cloob.data.vectors import read_ids, read_matrix
        from cloob.models.aligned.model import embed_rows
        from cloob.models.load import load_model

        encoder, given = (
            load_model(options.source, options.machine.device),
            options.rows.given,
        )
        embedded = (
            embed_rows(encoder, given[0], read_matrix(given[1])) if given else None
        )
        vectors = (
            (
                encoder.encode_text(read_ids(str(options.texts)))
                if embedded is None
                else embedded
            )
            .cpu()
            .numpy()
        )
        bad = int((~np.isfinite(vectors).all(1)).sum())
        lost = (
            f" rows, {bad:,} of them NaN, as their numbers are not finite"
            if bad
            else " rows"
        )
    else:
        with opened(options.source, options.model, options.machine) as (index, bad):
            lost = f" pictures, {bad:,} could not be read" if bad else " pictures"
            if out.suffix == ".parquet":
                say(f"{out}: {index.export(out):,}{lost}")
                return 1 if bad else 0
            blocks = list(index.view().blocks())
            items = [item for some, _ in blocks for item in some]
            refuse({"no picture has a vector; there is nothing to write": not items})
            vectors, more = (
                np.concatenate([part for _, part in blocks]),
                {"model": index.model().name},
            )
            texts = {
                "paths": [item.path for item in items],
                "captions": [item.caption or "" for item in items],
            }
    stream, lists = (
        io.BytesIO(),
        {name: json.dumps(item) for name, item in texts.items()},
    )
    if out.suffix == ".npy":
        np.save(stream, vectors)
    elif out.suffix == ".npz":
        if texts:  # one array of bytes: numpy pads every text to the longest
            texts["captions"] = np.array(lists["captions"].encode())
        np.savez(stream, vectors=vectors, **texts, **more)
    else:
        from safetensors.numpy import save

        stream.write(save({"vectors": vectors}, {**lists, **more} or None))
    write_whole(out, stream.getvalue())
    say(f"{out}: {len(vectors):,}{lost}")
    return 1 if bad else 0

"""``cloob embed``: write the vectors of pictures into one file."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cloob
from cloob.commands.console import (
    DecodeOptions,
    Positional,
    RowOptions,
    arg,
    check_out,
    say,
)
from cloob.commands.index import opened
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.runs import RUN_CONFIG_FILE

if TYPE_CHECKING:
    import numpy as np

PICTURE_ENDINGS = (".npz", ".parquet")


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
    """FILE.npz or .parquet; with --a, --b or --texts FILE.npy."""
    texts: str | None = None
    """Texts for the model: a file of lines, or TABLE.parquet:COLUMN."""
    model: str | None = None
    """What `cloob eval` takes, for pictures."""
    overwrite: bool = False
    """Replace the file where it is there."""
    rows: RowOptions = field(default_factory=RowOptions)
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def run(options: Options) -> int:
    """Embeds; 1 where a picture could not be read, or a row is not finite."""
    check(options)
    if options.texts is not None or options.rows.side_and_file:
        return embed_rows_or_texts(options)
    with opened(options.source, options.model, options.machine) as (index, n_unread):
        if options.out.suffix == ".parquet":
            count = index.export(options.out)
        else:
            count = write_pictures(index, options.out)
    lost = f", {n_unread:,} could not be read" if n_unread else ""
    say(f"{options.out}: {count:,} pictures{lost}")
    return 1 if n_unread else 0


def write_pictures(index: cloob.Index, out: Path) -> int:
    """Writes the vectors of all pictures, with their paths and captions; returns how
    many.
    """
    import numpy as np

    items, vectors = index.pictures()
    stream = io.BytesIO()
    np.savez(
        stream,
        vectors=vectors,
        paths=json_array([item.path for item in items]),
        captions=json_array([item.caption or "" for item in items]),
        model=np.array(index.model().name.encode()),
    )
    write_whole(out, stream.getvalue())
    return len(vectors)


def json_array(texts: list[str]) -> np.ndarray:
    """Texts as JSON: numpy would pad every one to the longest."""
    import numpy as np

    return np.array(json.dumps(texts).encode())


def check(options: Options) -> None:
    """Refuses options that exclude each other, and a file to write that does not fit
    what is embedded.
    """
    value_of_option = {
        "--a": options.rows.a,
        "--b": options.rows.b,
        "--texts": options.texts,
        "--model": options.model,
    }
    names = [name for name, value in value_of_option.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names[:2])} exclude each other; give one")
    inputs = [value for value in value_of_option.values() if value is not None]
    of_pictures = not names or names == ["--model"]
    endings = PICTURE_ENDINGS if of_pictures else (".npy",)
    check_out("--out", options.out, endings, [*inputs, options.source])
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out}: exists; --overwrite replaces it")
    if not names and (Path(options.source) / RUN_CONFIG_FILE).is_file():
        raise InputError(
            f"{options.source}: is a run; --texts names texts for it, --a or --b rows"
            " for its heads"
        )


def embed_rows_or_texts(options: Options) -> int:
    """Embeds texts, or rows by one of a model's heads, and writes the vectors; 1 where
    a row is not finite.
    """
    texts = [] if options.texts is None else read_texts(options.texts)
    import numpy as np

    from cloob.data.matrices import read_rows
    from cloob.models.aligned.model import embed_rows
    from cloob.models.load import load_model

    encoder = load_model(options.source, options.machine.device)
    if options.texts is not None:
        rows = encoder.encode_text(texts)
    else:
        assert options.rows.side_and_file is not None
        side, file = options.rows.side_and_file
        rows = embed_rows(encoder, side, read_rows(file))
    vectors = rows.cpu().numpy()
    n_bad = int((~np.isfinite(vectors).all(1)).sum())
    lost = f", {n_bad:,} of them NaN, as their numbers are not finite" if n_bad else ""
    stream = io.BytesIO()
    np.save(stream, vectors)
    write_whole(options.out, stream.getvalue())
    say(f"{options.out}: {len(vectors):,} rows{lost}")
    return 1 if n_bad else 0


def read_texts(file: str) -> list[str]:
    """The texts of a file, one a line, or of a column."""
    from cloob.data.matrices import read_ids
    from cloob.data.sources.files import reading

    if ":" in file or Path(file).suffix in (".parquet", ".npy"):
        return read_ids(file)
    with reading(Path(file)):
        lines = (
            Path(file).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        )
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"--texts {file}: line {number} is empty")
    return lines

"""``cloob embed``: write the vectors of pictures into one file."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cloob
from cloob.commands.console import check_out, say
from cloob.commands.index import opened
from cloob.commands.options import Device, Threads
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

    source: Annotated[str, "SRC"]
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
    a: str | None = None
    """Rows for head a, as --a of `cloob train vectors`."""
    b: str | None = None
    """Rows for head b."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: Threads = None
    """Decoding threads; left out, one per processor."""


def run(options: Options) -> int:
    """Embeds; 1 where a picture could not be read, or a row is not finite."""
    check(options)
    if options.a is not None or options.b is not None or options.texts is not None:
        return embed_rows_or_texts(options)
    source = opened(options.source, options.model, options.device, options.workers)
    with source as (index, n_unread):
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
    files = {"--a": options.a, "--b": options.b, "--texts": options.texts}
    inputs = [
        option
        for option, value in {**files, "--model": options.model}.items()
        if value is not None
    ]
    if len(inputs) > 1:
        raise InputError(f"{inputs[0]} and {inputs[1]} exclude each other; give one")
    is_of_pictures = inputs in ([], ["--model"])
    check_out(
        "--out",
        options.out,
        PICTURE_ENDINGS if is_of_pictures else (".npy",),
        [*files.values(), options.source],
        overwrite=options.overwrite,
    )
    if not inputs and (Path(options.source) / RUN_CONFIG_FILE).is_file():
        raise InputError(
            f"{options.source}: is a run; --texts names texts for it, --a or --b rows"
            " for its heads"
        )


def embed_rows_or_texts(options: Options) -> int:
    """Embeds texts, or rows by one of a model's heads, and writes the vectors; 1 where
    a row is not finite.
    """
    texts = None if options.texts is None else read_texts(options.texts)
    import numpy as np

    from cloob.data.matrices import read_rows
    from cloob.models.load import load_model
    from cloob.models.vectors import embed_rows

    encoder = load_model(options.source, options.device)
    if texts is not None:
        rows = encoder.encode_text(texts)
    elif options.a is not None:
        rows = embed_rows(encoder, "a", read_rows(options.a))
    else:
        rows = embed_rows(encoder, "b", read_rows(str(options.b)))
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

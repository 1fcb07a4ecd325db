"""``open_source``: turns what a user writes into a source of pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

from cloob.data.bad import by_reason
from cloob.data.batch import BadSample, decoding
from cloob.data.shards.remote import open_remote
from cloob.data.shards.spec import (
    TAR_SUFFIXES,
    is_pattern,
    is_remote,
    is_tar,
    local_path,
    matching_files,
    tars_in,
)
from cloob.data.shards.tar import ShardSource
from cloob.data.source import Source, spread
from cloob.data.sources.arrow import (
    ARROW_SUFFIXES,
    CAPTION_COLUMN,
    IMAGE_COLUMN,
    TableSource,
    arrow_files,
    holds_images,
)
from cloob.data.sources.folder import FolderSource
from cloob.data.sources.tables import (
    FILE_COLUMN,
    TABLE_SUFFIXES,
    column_names,
    metadata_of,
)
from cloob.errors import InputError, counted, nearest
from cloob.pictures import decode

# the demo set that comes with the package; see NOTICE there
DEMO = Path(__file__).parent / "demo"

DEMO_SPLITS = {"demo": "train", "demo:train": "train", "demo:val": "val"}
_CAPTION_NAMES = (CAPTION_COLUMN, "text", "caption")
_MAX_PROBES = 1000
_MAX_PROBED_FILES = 4  # of a streamed source: they are fetched for it

# Shards to be fetched, tars, Arrow or Parquet files with the images inside, a table, a
# folder.
Form = Literal["elsewhere", "tars", "rows", "table", "folder"]

logger = logging.getLogger(__name__)


def open_source(
    spec: str | Path,
    *,
    image_column: str = IMAGE_COLUMN,
    caption_column: str = CAPTION_COLUMN,
) -> Source:
    """Opens image-caption pairs.

    Args:
        spec: One of

            - ``"demo"`` or ``"demo:val"``: the set inside the package;
            - a table: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl``;
            - WebDataset shards: a ``.tar`` (also compressed), a brace pattern
              (``"cc3m/{00000..00331}.tar"``), a glob (``"cc3m/*.tar"``), or a folder
              that holds tars;
            - streamed shards: a brace pattern after ``s3://``, ``gs://`` or
              ``http(s)://``, with ``sizes.json`` next to the shards;
            - a Hugging Face ``datasets`` folder (``save_to_disk``), Arrow or Parquet
              files with the images inside, a folder or a glob of them;
            - a folder of images with a .txt next to every one, or with a
              ``metadata.csv`` or ``.jsonl`` (imagefolder).
        image_column: Column of a table with the image or its path.
        caption_column: Column of a table with the caption.

    Returns:
        The source, of which at least two pairs could be read.

    Raises:
        InputError: Nothing there, not readable as what it is, or fewer than two usable
            pairs; one line.

    Example:
        >>> from cloob import open_source
        >>> source = open_source("demo")
        >>> len(source), source.read(0).caption
        (6110, 'seek step')
    """
    source = open_unprobed(str(spec), image_column, caption_column)
    rows = counted(len(source), "rows")
    if source.remark:
        logger.warning("%s: %s; %s", source.name, rows, source.remark)
    else:
        logger.info("%s: %s", source.name, rows)
    check_usable(source)
    return source


def open_unprobed(spec: str, image_column: str, caption_column: str) -> Source:
    """A source of which nothing has been read yet."""
    kind, files = look_up(spec, image_column)
    if kind == "elsewhere":
        return open_remote(spec)
    name = spec if spec in DEMO_SPLITS else local_path(spec)
    if kind == "tars":
        return ShardSource(name, files)
    if kind in ("rows", "table"):
        return TableSource(name, files, image_column, caption_column)
    return _open_folder(files[0], caption_column)


def _open_folder(folder: Path, caption_column: str) -> Source:
    """Images with captions next to them, or a Hugging Face imagefolder with a table."""
    source = FolderSource(folder)
    table = None if source.pairs else metadata_of(folder)
    if table is None:
        return source
    columns = column_names(table, (FILE_COLUMN,))
    columns.remove(FILE_COLUMN)
    if caption_column == CAPTION_COLUMN:
        usual = [name for name in _CAPTION_NAMES if name in columns]
        if usual or len(columns) == 1:
            caption_column = (usual or columns)[0]
    return TableSource(str(table), [table], FILE_COLUMN, caption_column)


def look_up(spec: str, image_column: str) -> tuple[Form, list[Path]]:
    """What a source is that a user named, and its files."""
    if spec in DEMO_SPLITS:
        return "tars", tars_in(DEMO / DEMO_SPLITS[spec])
    if is_remote(spec):
        return "elsewhere", []
    path = Path(local_path(spec))
    if path.is_dir():
        return _look_into(path)
    if path.exists():
        return _form_of(path, image_column), [path]
    if is_pattern(str(path)):
        files = matching_files(str(path))
        is_arrow = all(file.suffix.lower() in ARROW_SUFFIXES for file in files)
        return "rows" if is_arrow else "tars", files
    raise _not_found(spec, path)


def _look_into(folder: Path) -> tuple[Form, list[Path]]:
    tars = tars_in(folder)
    if tars:
        return "tars", tars
    rows = arrow_files(folder)
    return ("rows", rows) if rows else ("folder", [folder])


def _form_of(path: Path, image_column: str) -> Form:
    """Which form of a set a single file is, by its ending and columns."""
    suffix = path.suffix.lower()
    if suffix == ".arrow":
        return "rows"
    if suffix == ".parquet" and holds_images(path, image_column):
        return "rows"
    if suffix in TABLE_SUFFIXES:
        return "table"
    if is_tar(path):
        return "tars"
    tables, shards = ", ".join(TABLE_SUFFIXES), ", ".join(TAR_SUFFIXES)
    raise InputError(
        f"{path}: expected a folder, a table ({tables}) or a tar ({shards})"
    )


def _not_found(spec: str, path: Path) -> InputError:
    if spec.startswith("demo:"):
        return InputError(f"no demo set {spec!r}: {nearest(spec, DEMO_SPLITS)}")
    # An empty folder is nothing to open, and may be the run folder, which its lock has
    # just made.
    names = [
        other.name
        for other in path.parent.glob("*")
        if other.is_file() or any(other.glob("[!.]*"))
    ]
    near = f" ({nearest(path.name, names)})" if names else ""
    return InputError(f"{path}: no such file or folder{near}")


def check_usable(source: Source) -> None:
    """Reads until two pairs are good, so that a wrong folder or an empty table fails
    here and not an hour later.
    """
    rows = spread_rows(source, _MAX_PROBES)
    bad: list[BadSample] = []
    for looked_at, index in enumerate(rows, 1):
        try:
            sample = source.read(index)
            with decoding(sample.key):
                decode(sample.image)
        except BadSample as error:
            bad.append(error)
        if looked_at - len(bad) == 2:
            return
    pairs = f"{len(rows):,} pairs"
    if len(rows) < len(source):
        pairs += f" looked at, spread over all {len(source):,},"
    why = f"; {_reasons(bad)}" if bad else ""
    raise InputError(
        f"{source.name}: {len(rows) - len(bad)} of {pairs} usable, at least 2 are"
        f" needed{why}"
    )


def _reasons(bad: Sequence[BadSample]) -> str:
    """How many samples are bad for which reason, and the first one, in a sentence."""
    counts = by_reason(bad)
    numbers = ", ".join(f"{count:,} × {reason}" for reason, count in counts.items())
    return f"{numbers}; first: {bad[0]}"


def spread_rows(source: Source, most: int) -> list[int]:
    """Rows to look at: at most so many, spread evenly over the source; of a streamed
    one in a few of its files only.
    """
    if not source.streamed:
        return spread(len(source), most)
    sizes = source.shard_sizes
    starts = [0, *accumulate(sizes)]
    shards = spread(len(sizes), _MAX_PROBED_FILES)
    rows: list[int] = []
    for shard in shards:
        of_shard = spread(sizes[shard], -(-most // len(shards)))
        rows += (starts[shard] + row for row in of_shard)
    return rows

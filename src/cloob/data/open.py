"""``open_source``: turns what a user writes into a source of pairs."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Literal

from cloob.cache import Cache
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
    ArrowSource,
    arrow_files,
    holds_images,
)
from cloob.data.sources.paths import (
    FILE_COLUMN,
    TABLE_SUFFIXES,
    FolderSource,
    TableSource,
    column_names,
    metadata_of,
)
from cloob.errors import InputError, counted, nearest
from cloob.pictures import decode

DEMO = (
    Path(__file__).parent / "demo"
)  # the demo set that comes with the package; see NOTICE there

DEMO_SPLITS = {"demo": "train", "demo:train": "train", "demo:val": "val"}
_MAX_PROBES = 1000
_MAX_PROBED_FILES = 4  # of a streamed source: they are fetched for it

# Shards to be fetched, tars, Arrow or Parquet files with the images inside, a table, a
# folder.
Form = Literal["elsewhere", "tars", "rows", "table", "folder"]

_log = logging.getLogger(__name__)


def open_source(
    spec: str | Path,
    *,
    image_column: str = "filepath",
    caption_column: str = "title",
    cache: Cache | None = None,
) -> Source:
    """Opens image-caption pairs.

    Args:
        spec: One of

            - ``"demo"`` or ``"demo:val"``: the set inside the package;
            - a table: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl``;
            - WebDataset shards: a ``.tar`` (also compressed), a brace pattern
              (``"cc3m/{00000..00331}.tar"``), a glob (``"cc3m/*.tar"``), or a folder
              that holds tars;
            - streamed shards: a brace pattern after ``pipe:COMMAND``, ``s3://``,
              ``gs://``, ``http(s)://``, with ``sizes.json`` next to the shards;
            - a Hugging Face ``datasets`` folder (``save_to_disk``), Arrow or Parquet
              files with the images inside, a folder or a glob of them;
            - a folder of images with a .txt next to every one, or with a
              ``metadata.csv`` or ``.jsonl`` (imagefolder).
        image_column: Column of a table with the image or its path.
        caption_column: Column of a table with the caption; of tars ``"json:KEY"`` takes
            it from every sample's .json.
        cache: Where streamed shards, unpacked Parquet and the places of samples are
            kept; None: ``Cache()``.

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
    source = open_unprobed(str(spec), image_column, caption_column, cache or Cache())
    wrong = getattr(source, "remark", "")
    message = (
        f"{source.name}: {counted(len(source), 'rows')}{'; ' if wrong else ''}{wrong}"
    )
    _log.log(logging.WARNING if wrong else logging.INFO, "%s", message)
    check_usable(source)
    return source


def open_unprobed(
    spec: str, image_column: str, caption_column: str, cache: Cache
) -> Source:
    """A source of which nothing has been read yet."""
    kind, files = look_up(spec, image_column)
    name = spec if kind == "elsewhere" or spec in DEMO_SPLITS else local_path(spec)
    member = (
        caption_column.removeprefix("json:")
        if caption_column.startswith("json:")
        else None
    )
    match kind:
        case "elsewhere":
            return open_remote(spec, cache, member)
        case "tars":
            return ShardSource(name, files, cache, member=member)
        case "rows":
            return ArrowSource(name, files, image_column, caption_column, cache)
        case "table":
            return TableSource(files[0], image_column, caption_column)
        # of images with captions next to them, or a Hugging Face imagefolder with a
        # table
        case "folder":
            source = FolderSource(files[0], by_name=caption_column == FILE_COLUMN)
            if source.pairs or (path := metadata_of(files[0])) is None:
                return source
            if caption_column == "title":
                others = [
                    column
                    for column in column_names(path, (FILE_COLUMN,))
                    if column != FILE_COLUMN
                ]
                usual = [
                    column
                    for column in ("title", "text", "caption")
                    if column in others
                ]
                caption_column = next(
                    iter([*usual, *others[: len(others) == 1]]), caption_column
                )
            return TableSource(path, FILE_COLUMN, caption_column)


def look_up(spec: str, image_column: str) -> tuple[Form, list[Path]]:
    """What a source is that a user named, and its files."""
    if spec in DEMO_SPLITS:
        return "tars", tars_in(DEMO / DEMO_SPLITS[spec])
    if is_remote(spec):
        return "elsewhere", []
    path = Path(local_path(spec))
    suffix = path.suffix.lower()
    if path.is_dir():
        if tars := tars_in(path):
            return "tars", tars
        rows = arrow_files(path)
        return ("rows", rows) if rows else ("folder", [path])
    if path.exists():
        if suffix == ".arrow" or (
            suffix == ".parquet" and holds_images(path, image_column)
        ):
            return "rows", [path]
        if suffix in TABLE_SUFFIXES or is_tar(path):
            return ("table" if suffix in TABLE_SUFFIXES else "tars"), [path]
    elif is_pattern(str(path)):
        files = matching_files(str(path))
        return (
            "rows"
            if all(file.suffix.lower() in ARROW_SUFFIXES for file in files)
            else "tars"
        ), files
    # An empty folder is nothing to open, and may be the run folder, which its lock has
    # just made.
    others = [
        other.name
        for other in path.parent.glob("*")
        if other.is_file() or any(other.glob("[!.]*"))
    ]
    wrong = (
        f"{path}: no such file or"
        f" folder{f' ({nearest(path.name, others)})' if others else ''}"
    )
    if path.exists():
        tables, shards = ", ".join(TABLE_SUFFIXES), ", ".join(TAR_SUFFIXES)
        wrong = f"{path}: expected a folder, a table ({tables}) or a tar ({shards})"
    raise InputError(
        f"no demo set {spec!r}: {nearest(spec, DEMO_SPLITS)}"
        if spec.startswith("demo:")
        else wrong
    )


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
    over = (
        f" looked at, spread over all {len(source):,},"
        if len(rows) < len(source)
        else ""
    )
    reasons = Counter(error.reason for error in bad)
    by_reason = ", ".join(
        f"{count:,} × {reason}" for reason, count in reasons.most_common()
    )
    hint = (
        "; `cloob index` makes pictures without captions searchable"
        if {*reasons} == {"missing caption"}
        else ""
    )
    why = f"; {by_reason}; first: {bad[0]}{hint}" if bad else ""
    usable = f"{len(rows) - len(bad)} of {len(rows):,} pairs{over} usable"
    raise InputError(f"{source.name}: {usable}, at least 2 are needed{why}")


def spread_rows(source: Source, most: int) -> list[int]:
    """Rows to look at: at most so many, spread evenly over the source; of a streamed
    one in a few of its files only.
    """
    if not source.streamed:
        return spread(len(source), most)
    sizes, starts = source.shard_sizes, [0, *accumulate(source.shard_sizes)]
    shards = spread(len(sizes), _MAX_PROBED_FILES)
    return [
        starts[shard] + row
        for shard in shards
        for row in spread(sizes[shard], -(-most // len(shards)))
    ]

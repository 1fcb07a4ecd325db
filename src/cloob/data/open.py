"""``open_source``: turns what a user writes into a source of pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cloob.data.bad import by_reason
from cloob.data.batch import BadSample, decoding
from cloob.data.shards.remote import open_remote
from cloob.data.shards.spec import (
    is_pattern,
    is_remote,
    is_tar,
    matching_files,
    tars_in,
)
from cloob.data.shards.tar import ShardSource
from cloob.data.source import Source, spread
from cloob.data.sources.arrow import (
    CAPTION_COLUMN,
    IMAGE_COLUMN,
    SUFFIXES,
    TableSource,
    arrow_files,
)
from cloob.data.sources.folder import FolderSource
from cloob.errors import InputError, counted, nearest
from cloob.pictures import decode

# the demo set that comes with the package; see NOTICE there
DEMO = Path(__file__).parent / "demo"

DEMO_SPLITS = {"demo": "train", "demo:train": "train", "demo:val": "val"}
_MAX_PROBES = 1000
_MAX_PROBED_FILES = 4  # of a streamed source: they are fetched for it

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
            - a table: ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet`` or ``.arrow``, of
              the last two also with the images inside; a glob of them;
            - a Hugging Face ``datasets`` folder (``save_to_disk``), or a folder of
              Arrow or Parquet files;
            - WebDataset shards: a ``.tar`` (also compressed), a brace pattern
              (``"cc3m/{00000..00331}.tar"``), a glob (``"cc3m/*.tar"``), or a folder
              that holds tars;
            - streamed shards: a brace pattern after ``s3://``, ``gs://`` or
              ``http(s)://``, with ``sizes.json`` next to the shards;
            - a folder of images with a .txt next to every one.
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
    if spec in DEMO_SPLITS:
        return ShardSource(spec, tars_in(DEMO / DEMO_SPLITS[spec]))
    if is_remote(spec):
        return open_remote(spec)
    path = Path(spec).expanduser()
    files = _files_of(path, spec)
    if not files:
        return FolderSource(path)
    if all(file.suffix.lower() in SUFFIXES for file in files):
        return TableSource(spec, files, image_column, caption_column)
    if not all(map(is_tar, files)):
        tables = ", ".join(SUFFIXES)
        raise InputError(f"{path}: expected a folder, a table ({tables}) or a .tar")
    return ShardSource(spec, files)


def _files_of(path: Path, spec: str) -> list[Path]:
    """The tars or tables that are meant; [] of a folder of pictures."""
    if path.is_dir():
        return tars_in(path) or arrow_files(path)
    if path.exists():
        return [path]
    if is_pattern(spec):
        return matching_files(str(path))
    if spec.startswith("demo:"):
        raise InputError(f"no demo set {spec!r}: {nearest(spec, DEMO_SPLITS)}")
    # An empty folder is nothing to open, and may be the run folder, which its lock has
    # just made.
    names = [
        other.name
        for other in path.parent.glob("*")
        if other.is_file() or any(other.glob("[!.]*"))
    ]
    near = f" ({nearest(path.name, names)})" if names else ""
    raise InputError(f"{path}: no such file or folder{near}")


def check_usable(source: Source) -> None:
    """Reads until two pairs are good, so that a wrong folder or an empty table fails
    here and not an hour later.
    """
    rows = spread_rows(source, _MAX_PROBES)
    n_good = 0
    bad: list[BadSample] = []
    for index in rows:
        try:
            sample = source.read(index)
            with decoding(sample.key):
                decode(sample.image)
        except BadSample as error:
            bad.append(error)
            continue
        n_good += 1
        if n_good == 2:
            return
    pairs = f"{len(rows):,} pairs"
    if len(rows) < len(source):
        pairs += f" looked at, spread over all {len(source):,},"
    raise InputError(
        f"{source.name}: {n_good} of {pairs} usable, at least 2 are needed"
        f"{_reasons(bad)}"
    )


def _reasons(bad: Sequence[BadSample]) -> str:
    """How many samples are bad for which reason, and the first one."""
    if not bad:
        return ""
    counts = by_reason(bad)
    numbers = ", ".join(f"{count:,} × {reason}" for reason, count in counts.items())
    return f"; {numbers}; first: {bad[0]}"


def spread_rows(source: Source, most: int) -> list[int]:
    """Rows to look at: at most so many, spread evenly over the source; of a streamed
    one over its first files.
    """
    n = len(source)
    if source.streamed:
        n = sum(source.shard_sizes[:_MAX_PROBED_FILES])
    return spread(n, most)

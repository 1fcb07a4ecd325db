"""Where pairs come from, behind one interface, and ``open_source``, which turns what a user writes into one."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cloob.data.batch import BadSample, RawSample
from cloob.errors import InputError, nearest, require

if TYPE_CHECKING:
    from cloob.data.spool import ShardCache

DEMO = Path(__file__).parent / "demo"
"""The demo set that comes with the package; see NOTICE there."""

_DEMO_SPLITS = {"demo": "train", "demo:train": "train", "demo:val": "val"}
_PROBES = 1000


class Source(Protocol):
    """Pairs by number. Picklable, cheap to copy into a worker, and safe to read from several processes.

    ``shard_sizes`` are the numbers of consecutive rows that lie in one file; they add up to ``len``. A source may also
    have ``prefetch(indices)``: the loader calls it with the numbers of pairs that will be read soon.
    """

    @property
    def name(self) -> str:
        """What reports call this source."""

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Rows per file, in order."""

    @property
    def streamed(self) -> bool:
        """Whether reading in random order is costly: the loader then reads file by file."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> dict[str, str]:
        """What the source holds, in a few named digests and counts: equal for equal data, wherever they lie."""

    def read(self, index: int) -> RawSample:
        """The pair at ``index`` in [0, len); raises ``BadSample`` when it cannot be used."""


def open_source(
    spec: str | Path,
    *,
    image_column: str = "filepath",
    caption_column: str = "title",
    cache: ShardCache | None = None,
) -> Source:
    """Opens image-caption pairs.

    Args:
        spec: One of

            - ``"demo"`` or ``"demo:val"``: the set inside the package;
            - a table: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl``;
            - WebDataset shards: a ``.tar`` (also compressed), a brace pattern (``"cc3m/{00000..00331}.tar"``), a glob
              (``"cc3m/*.tar"``), a folder that holds tars, or its ``sizes.json``;
            - streamed shards: a brace pattern behind ``pipe:COMMAND``, ``s3://``, ``gs://``, ``http(s)://``, with
              ``sizes.json`` beside the shards, or that ``sizes.json`` itself;
            - a Hugging Face ``datasets`` folder (``save_to_disk``), Arrow or Parquet files with the images inside, a
              folder or a glob of them;
            - a folder of images with a .txt beside each.
        image_column: Column of a table with the image or its path.
        caption_column: Column of a table with the caption.
        cache: Where streamed shards are kept; None: 50 GiB in the user's cache folder.

    Returns:
        The source, of which at least two pairs could be read.

    Raises:
        InputError: Nothing there, not readable as what it is, or fewer than two usable pairs; one line.
    """
    source = _open(str(spec), image_column, caption_column, cache)
    _check_usable(source)
    return source


def check_there(spec: str, *, image_column: str = "filepath", caption_column: str = "title") -> None:
    """Looks whether local data are there, and a table's columns: what opening them would refuse, in no time.

    Streamed shards are not asked for, and no more than the headers of tables are read.

    Raises:
        InputError: As ``open_source``.
    """
    from cloob.data.opener import is_remote, local_path

    if spec in _DEMO_SPLITS or is_remote(spec):
        return
    if spec.startswith("demo:"):
        raise _no_demo(spec)
    path = Path(local_path(spec))
    if _is_pattern(str(path)) and not path.exists():
        _expand(str(path))
        return
    if not path.exists():
        raise InputError(f"{spec}: no such file or folder{_hint(path)}")
    if path.is_dir():
        return
    require("pyarrow", "train")
    from cloob.data.arrow import holds_images
    from cloob.data.table import TABLE_SUFFIXES, check_columns

    inside = path.suffix.lower() == ".parquet" and holds_images(path, image_column)
    if path.suffix.lower() in TABLE_SUFFIXES and not inside:
        check_columns(path, image_column, caption_column)


def _open(spec: str, image_column: str, caption_column: str, cache: ShardCache | None) -> Source:
    require("PIL", "train")
    require("pyarrow", "train")
    from cloob.data.arrow import ARROW_SUFFIXES, ArrowSource, arrow_files, holds_images
    from cloob.data.folder import FolderSource
    from cloob.data.opener import is_remote, local_path
    from cloob.data.remote import from_sizes, open_remote
    from cloob.data.shards import ShardSource
    from cloob.data.sizes import read_sizes
    from cloob.data.spool import ShardCache
    from cloob.data.table import TABLE_SUFFIXES, TableSource
    from cloob.data.tarindex import TAR_SUFFIXES, is_tar

    cache = cache or ShardCache()
    if spec in _DEMO_SPLITS:
        return ShardSource(spec, _tars_in(DEMO / _DEMO_SPLITS[spec]))
    if spec.startswith("demo:"):
        raise _no_demo(spec)
    if is_remote(spec):
        return open_remote(spec, cache)
    spec = local_path(spec)
    path = Path(spec)
    inside = (image_column, caption_column, cache)
    if path.suffix.lower() == ".json" and path.is_file():
        sizes = read_sizes(path)
        if any(is_remote(name) for name in sizes):
            return from_sizes(spec, sizes, None, cache)
        return ShardSource(spec, _all_there(spec, [path.parent / name for name in sizes]))
    pattern = _is_pattern(spec) and not path.exists()
    if (path.suffix.lower() == ".arrow" and path.is_file()) or (
        path.suffix.lower() == ".parquet" and holds_images(path, image_column)
    ):
        return ArrowSource(spec, [path], *inside)
    if path.suffix.lower() in TABLE_SUFFIXES and not pattern:
        return TableSource(path, image_column, caption_column)
    if path.is_dir():
        if tars := _tars_in(path):
            return ShardSource(spec, tars)
        files = arrow_files(path)
        return ArrowSource(spec, files, *inside) if files else FolderSource(path)
    if path.is_file() and is_tar(path):
        return ShardSource(spec, [path])
    if pattern:
        paths = _expand(spec)
        if all(each.suffix.lower() in ARROW_SUFFIXES for each in paths):
            return ArrowSource(spec, paths, *inside)
        return ShardSource(spec, paths)
    if path.exists():
        raise InputError(
            f"{spec}: expected a folder, a table ({', '.join(TABLE_SUFFIXES)}) or a tar ({', '.join(TAR_SUFFIXES)})"
        )
    raise InputError(f"{spec}: no such file or folder{_hint(path)}")


def _no_demo(spec: str) -> InputError:
    return InputError(f"no demo set {spec!r}: {nearest(spec, _DEMO_SPLITS)}")


def local_shards(spec: str) -> list[Path]:
    """The tars that a local path, folder or pattern names.

    Raises:
        InputError: There are none.
    """
    path = Path(spec)
    tars = _tars_in(path) if path.is_dir() else _expand(spec)
    if not tars:
        raise InputError(f"{spec}: no tar shard found")
    return tars


def local_files(spec: str) -> list[Path]:
    """What a local source reads, as far as that is quick to see: the file, a pattern's files, a folder's entries.

    Returns:
        The paths, sorted; none for the demo set, streamed shards and what is not there.

    Raises:
        InputError: A pattern names a file that is missing.
    """
    from cloob.data.opener import is_remote, local_path

    if (spec.startswith("demo") and not Path(spec).exists()) or is_remote(spec):
        return []
    path = Path(local_path(spec))
    if _is_pattern(str(path)) and not path.exists():
        return sorted(_expand(str(path)))
    return sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []


def _tars_in(folder: Path) -> list[Path]:
    from cloob.data.tarindex import is_tar

    return sorted(path for path in folder.iterdir() if is_tar(path) and path.is_file())


def _is_pattern(spec: str) -> bool:
    return any(c in spec for c in "{*?[")


def _expand(pattern: str) -> list[Path]:
    """The files of a brace pattern or glob; every file that the braces name must exist."""
    from cloob.data.opener import expand

    paths: list[Path] = []
    for item in expand(pattern):
        matches = sorted(glob.glob(item)) if any(c in item for c in "*?[") else [item]  # noqa: PTH207
        if not matches:
            raise InputError(f"{item}: no file matches")
        paths += [Path(match) for match in matches]
    return _all_there(pattern, paths)


def _all_there(spec: str, paths: list[Path]) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file ({len(missing)} of the {len(paths)} files in {spec})")
    return paths


def _hint(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    beside = [other.name for other in path.parent.iterdir()]
    return f" ({nearest(path.name, beside)})" if beside else ""


def _check_usable(source: Source) -> None:
    """Reads until two pairs are good, so that a wrong folder or an empty table fails here and not an hour later."""
    good, seen = 0, 0
    reasons: Counter[str] = Counter()
    first = ""
    for index in range(min(len(source), _PROBES)):
        seen += 1
        try:
            source.read(index)
            good += 1
        except BadSample as bad:
            first = first or str(bad)
            reasons[bad.reason] += 1
        if good == 2:
            return
    if seen < len(source):
        return  # the run counts bad samples as it meets them
    if not reasons:
        raise InputError(f"{source.name}: {good} usable pair{'s' * (good != 1)}, at least 2 are needed")
    told = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())
    raise InputError(f"{source.name}: {good} of {seen:,} pairs usable, at least 2 are needed; {told}; first: {first}")

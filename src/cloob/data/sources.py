"""Where pairs come from, behind one interface, and ``open_source``, which turns what a user writes into one."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path
from typing import Protocol

from cloob.data.batch import BadSample, RawSample
from cloob.errors import InputError, nearest, require

DEMO = Path(__file__).parent / "demo"
"""The demo set that comes with the package; see NOTICE there."""

_DEMO_SPLITS = {"demo": "train", "demo:train": "train", "demo:val": "val"}
_PROBES = 1000


class Source(Protocol):
    """Pairs by number. Picklable, cheap to copy into a worker, and safe to read from several processes.

    ``shard_sizes`` are the numbers of consecutive rows that lie in one file; they add up to ``len``.
    """

    @property
    def name(self) -> str:
        """What reports call this source."""

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Rows per file, in order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawSample:
        """The pair at ``index`` in [0, len); raises ``BadSample`` when it cannot be used."""


def open_source(spec: str | Path, *, image_column: str = "filepath", caption_column: str = "title") -> Source:
    """Opens image-caption pairs.

    Args:
        spec: One of

            - ``"demo"`` or ``"demo:val"``: the set inside the package;
            - a table: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl``;
            - WebDataset shards: a ``.tar`` (also compressed), a brace pattern (``"cc3m/{00000..00331}.tar"``), a glob
              (``"cc3m/*.tar"``), or a folder that holds tars;
            - a folder of images with a .txt beside each.
        image_column: Column of a table with the path of the image.
        caption_column: Column of a table with the caption.

    Returns:
        The source, of which at least two pairs could be read.

    Raises:
        InputError: Nothing there, not readable as what it is, or fewer than two usable pairs; one line.
    """
    source = _open(str(spec), image_column, caption_column)
    _check_usable(source)
    return source


def _open(spec: str, image_column: str, caption_column: str) -> Source:
    require("PIL", "train")
    require("pyarrow", "train")
    from cloob.data.folder import FolderSource
    from cloob.data.shards import ShardSource
    from cloob.data.table import TABLE_SUFFIXES, TableSource
    from cloob.data.tarindex import TAR_SUFFIXES, is_tar

    if spec in _DEMO_SPLITS:
        return ShardSource(spec, _tars_in(DEMO / _DEMO_SPLITS[spec]))
    if spec.startswith("demo:"):
        raise InputError(f"no demo set {spec!r}: {nearest(spec, _DEMO_SPLITS)}")
    path = Path(spec)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return TableSource(path, image_column, caption_column)
    if path.is_dir():
        tars = _tars_in(path)
        return ShardSource(spec, tars) if tars else FolderSource(path)
    if path.is_file() and is_tar(path):
        return ShardSource(spec, [path])
    if any(c in spec for c in "{*?["):
        return ShardSource(spec, _expand(spec))
    if path.exists():
        raise InputError(
            f"{spec}: expected a folder, a table ({', '.join(TABLE_SUFFIXES)}) or a tar ({', '.join(TAR_SUFFIXES)})"
        )
    raise InputError(f"{spec}: no such file or folder{_hint(path)}")


def _tars_in(folder: Path) -> list[Path]:
    from cloob.data.tarindex import is_tar

    return sorted(path for path in folder.iterdir() if is_tar(path) and path.is_file())


def _expand(pattern: str) -> list[Path]:
    """The shards of a brace pattern or glob; every file that the braces name must exist."""
    try:
        expanded = list(require("braceexpand", "train").braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern}: not a brace pattern: {error}") from None
    paths: list[Path] = []
    for item in expanded:
        matches = sorted(glob.glob(item)) if any(c in item for c in "*?[") else [item]  # noqa: PTH207
        if not matches:
            raise InputError(f"{item}: no file matches")
        paths += [Path(match) for match in matches]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file ({len(missing)} of the {len(paths)} files in {pattern})")
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

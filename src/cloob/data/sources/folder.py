"""Pairs in a folder: images with a .txt of the same name beside each, or an imagefolder with its table of captions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, RawSample, clean_caption, printable
from cloob.data.decode import read_image_file
from cloob.data.fingerprint import Fingerprint, digest, of_column, spread
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.data.sources.table import TableSource, column_names
from cloob.errors import InputError
from cloob.files import TooLarge, read_at_most

_IMAGE_SUFFIXES = tuple(f".{ext}" for ext in IMAGE_EXTENSIONS)
_CAPTION_SUFFIXES = tuple(f".{ext}" for ext in CAPTION_EXTENSIONS)

_METADATA = ("metadata.csv", "metadata.jsonl")  # of a Hugging Face imagefolder
_FILE_COLUMN = "file_name"
_CAPTION_COLUMNS = ("text", "caption")
_DEFAULT_CAPTION_COLUMN = "title"  # of open_source: what nobody has asked for by name


class _Row(NamedTuple):
    """A picture or, where there is none, the caption without one; paths below the folder."""

    path: str
    beside: str = ""
    """The other half, or what is there in place of a picture; only where it is not ``path`` with ``.txt``."""


class FolderSource:
    """A random-access source over ``a/b.jpg`` with ``a/b.txt`` beside it, in sub-folders too, sorted by path.

    Endings may be in capitals. An image without a caption and a caption without an image are counted as bad. Hidden
    files and folders are left out, and so are linked folders.

    Args:
        folder: The folder; it is listed once, paths are kept as one arrow array.

    Attributes:
        pairs: Images with a caption file beside them.
        linked: The linked folders.

    Raises:
        InputError: The folder or one below it cannot be listed.
    """

    streamed = False

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        rows, self.pairs, self.linked = _list(folder)
        self._paths = pa.array([os.fsencode(row.path) for row in rows], pa.large_binary())
        self._beside = {index: row.beside for index, row in enumerate(rows) if row.beside}
        self.shard_sizes = (len(self._paths),)

    def __len__(self) -> int:
        return len(self._paths)

    def fingerprint(self) -> Fingerprint:
        """The paths, the captions, and the sizes of the pictures; of large folders a hundred thousand of the latter."""
        captions, sizes = [], []
        for index in spread(len(self)):
            path = self._folder / os.fsdecode(self._paths[index].as_py())
            with contextlib.suppress(OSError, TooLarge):
                captions.append(read_at_most(self._caption(index), MAX_CAPTION_BYTES))
            with contextlib.suppress(OSError):
                sizes.append(str(path.stat().st_size))
        return {
            "pairs": len(self),
            "file names": of_column(pa.chunked_array([self._paths])),
            "captions": digest(captions),
            "sizes of pictures": digest(sizes),
        }

    def read(self, index: int) -> RawSample:
        """The pair at ``index``, or a ``BadSample``; its key is the image's path below the folder."""
        below = os.fsdecode(self._paths[index].as_py())
        key, path = printable(below), self._folder / below
        other = self._beside.get(index)
        if path.suffix.lower() in _CAPTION_SUFFIXES:
            but = f" but {printable(other)}, which is of no kind that is read here" if other else ""
            raise BadSample("missing image", key, f"no image beside {path}{but}")
        return RawSample(key, read_image_file(path, key), _read_caption(self._caption(index), key))

    def _caption(self, index: int) -> Path:
        """The caption file of the picture at ``index``."""
        path, other = self._folder / os.fsdecode(self._paths[index].as_py()), self._beside.get(index)
        return path.with_name(other) if other else path.with_suffix(".txt")


def open_folder(folder: Path, caption_column: str) -> FolderSource | TableSource:
    """Opens a folder of images with captions beside them, or a Hugging Face imagefolder with a table of captions.

    Args:
        folder: The folder.
        caption_column: The table's column; where it has no ``title``, which is the default, ``text``, ``caption`` or
            the only one beside ``file_name``.

    Raises:
        InputError: No column of captions, a folder of several splits, or one that cannot be listed.
    """
    source = FolderSource(folder)
    if source.pairs:
        return source
    for path in (folder / name for name in _METADATA):
        columns = column_names(path, (_FILE_COLUMN, caption_column)) if path.is_file() else []
        if _FILE_COLUMN in columns:
            others = [column for column in columns if column != _FILE_COLUMN]
            if caption_column == _DEFAULT_CAPTION_COLUMN and caption_column not in others:
                known = [column for column in _CAPTION_COLUMNS if column in others]
                caption_column = known[0] if known else others[0] if len(others) == 1 else caption_column
            return TableSource(path, _FILE_COLUMN, caption_column)
    splits = sorted(path.parent for name in _METADATA for path in folder.glob(f"*/{name}"))
    if splits:
        names = ", ".join(path.name for path in splits)
        raise InputError(f"{folder} holds imagefolders with their tables of captions: {names}; name one: {splits[0]}")
    return source


def _list(folder: Path) -> tuple[list[_Row], int, tuple[str, ...]]:
    """The rows of a folder, sorted, how many are pairs, and the folders that are links."""
    rows: list[_Row] = []
    linked: list[str] = []
    pairs = 0
    for root, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked += [path for name in folders if os.path.islink(path := os.path.join(root, name))]  # noqa: PTH114, PTH118
        below = Path(root).relative_to(folder)
        images, captions, others = _kinds(name for name in files if not name.startswith("."))
        for name in images:
            stem = name.rpartition(".")[0]
            caption = captions.get(stem, "")
            pairs += bool(caption)
            rows.append(_Row((below / name).as_posix(), "" if caption == f"{stem}.txt" else caption))
        pictured = {name.rpartition(".")[0] for name in images}
        alone = [stem for stem in captions if stem not in pictured]
        rows.extend(_Row((below / captions[stem]).as_posix(), others.get(stem, "")) for stem in alone)
    return sorted(rows), pairs, tuple(linked)


def _refuse(error: OSError) -> None:
    folder = printable(str(error.filename))
    raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it elsewhere") from None


def _kinds(names: Iterable[str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Images, and by stem caption files (``.txt`` before others) and files of no kind that is known here."""
    images: list[str] = []
    captions: dict[str, str] = {}
    others: dict[str, str] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        if name.lower().endswith(_IMAGE_SUFFIXES):
            images.append(name)
        elif name.lower().endswith(_CAPTION_SUFFIXES):
            if extension == "txt" or stem not in captions:
                captions[stem] = name
        else:
            others[stem] = name
    return images, captions, others


def _read_caption(path: Path, key: str) -> str:
    try:
        raw = read_at_most(path, MAX_CAPTION_BYTES)
    except TooLarge as error:
        limit = f"the limit is {MAX_CAPTION_BYTES:,}"
        raise BadSample("caption too long", key, f"{path}: {error.size:,} bytes, {limit}") from None
    except OSError as error:
        raise BadSample("missing caption", key, f"{path}: {error.strerror}") from None
    return clean_caption(raw, key)

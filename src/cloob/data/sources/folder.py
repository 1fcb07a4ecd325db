"""Pairs in a folder: images with a .txt of the same name beside each, or an imagefolder with its table of captions."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, RawSample, clean_caption, printable, read_image_file
from cloob.data.fingerprint import Fingerprint, digest, of_column, spread
from cloob.data.source import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from cloob.data.sources.table import TableSource, column_names
from cloob.errors import InputError
from cloob.files import TooLarge, read_at_most

FILE_COLUMN = "file_name"
"""The column of pictures in an imagefolder's table; as the caption column of a folder, file names are captions."""

_METADATA = ("metadata.csv", "metadata.jsonl")  # of a Hugging Face imagefolder
_CAPTION_COLUMNS = ("text", "caption")
_DEFAULT_CAPTION_COLUMN = "title"  # of open_source: what nobody has asked for by name


class FolderSource:
    """A random-access source over ``a/b.jpg`` with ``a/b.txt`` beside it, in sub-folders too, sorted by path.

    An image without a caption and a caption without an image are counted as bad. Hidden files and folders are left out,
    and so are ``linked`` folders. ``pairs`` is the number of images with a caption. ``by_name`` takes the words of the
    file names as captions, whatever lies beside them.
    """

    streamed = False

    def __init__(self, folder: Path, *, by_name: bool = False) -> None:
        self.name = str(folder)
        self._by_name = by_name
        self._folder = folder
        self.linked: list[str] = []
        self.pairs = 0
        rows: list[tuple[str, str]] = []  # a picture, or a caption without one; and the name of the picture's caption
        for root, folders, files in os.walk(folder, onerror=_refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self.linked += [path for name in folders if os.path.islink(path := os.path.join(root, name))]  # noqa: PTH114, PTH118
            below = Path(root).relative_to(folder)
            shown = [name for name in files if not name.startswith(".")]
            captions = captions_by_stem(shown)
            pictures = {name: name.rpartition(".")[0] for name in shown if name.lower().endswith(IMAGE_SUFFIXES)}
            alone = captions.keys() - pictures.values()
            rows += [((below / name).as_posix(), captions.get(stem, "")) for name, stem in pictures.items()]
            rows += [((below / captions[stem]).as_posix(), "") for stem in alone]
            self.pairs += sum(by_name or stem in captions for stem in pictures.values())
        rows.sort()
        self._paths = pa.array([os.fsencode(path) for path, _ in rows], pa.large_binary())
        named = ((index, name, Path(path).with_suffix(".txt").name) for index, (path, name) in enumerate(rows))
        self._captions = {index: name for index, name, usual in named if name not in ("", usual)}
        self.shard_sizes = (len(self._paths),)

    def __len__(self) -> int:
        return len(self._paths)

    def fingerprint(self) -> Fingerprint:
        captions, sizes = [], []
        for index in spread(len(self)):
            path, caption = self._files(index)
            with contextlib.suppress(OSError, TooLarge):
                captions.append(read_at_most(caption, MAX_CAPTION_BYTES))
            with contextlib.suppress(OSError):
                sizes.append(str(path.stat().st_size))
        return {
            "pairs": len(self),
            "file names": of_column(pa.chunked_array([self._paths])),
            "captions": digest(captions),
            "sizes of pictures": digest(sizes),
        }

    def read(self, index: int) -> RawSample:
        path, file = self._files(index)
        key = printable(path.relative_to(self._folder).as_posix())
        if path.suffix.lower() in CAPTION_SUFFIXES:
            raise BadSample("missing image", key, f"no image beside {path}")
        image = read_image_file(path, key)
        if self._by_name:
            return RawSample(key, image, clean_caption(os.fsencode(re.sub(r"[-_ ]+", " ", path.stem)), key))
        try:
            return RawSample(key, image, clean_caption(read_at_most(file, MAX_CAPTION_BYTES), key))
        except TooLarge as error:
            raise BadSample("caption too long", key, f"{file}: {error.size:,} bytes") from None
        except OSError as error:
            raise BadSample("missing caption", key, f"{file}: {error.strerror}") from None

    def _files(self, index: int) -> tuple[Path, Path]:
        path, name = self._folder / os.fsdecode(self._paths[index].as_py()), self._captions.get(index)
        return path, path.with_name(name) if name else path.with_suffix(".txt")


def captions_by_stem(names: Iterable[str]) -> dict[str, str]:
    """The caption files among names, by what they share with their picture's name; ``.txt`` before others."""
    captions: dict[str, str] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        if name.lower().endswith(CAPTION_SUFFIXES) and (extension == "txt" or stem not in captions):
            captions[stem] = name
    return captions


def metadata_of(folder: Path, caption_column: str = "") -> tuple[Path, list[str]] | None:
    """The table of an imagefolder, and its columns but for the file names; None if there is none."""
    for path in (folder / name for name in _METADATA):
        columns = column_names(path, (FILE_COLUMN, caption_column)) if path.is_file() else []
        if FILE_COLUMN in columns:
            return path, [column for column in columns if column != FILE_COLUMN]
    return None


def open_folder(folder: Path, caption_column: str) -> FolderSource | TableSource:
    """Opens a folder of images with captions beside them, or a Hugging Face imagefolder with a table of captions.

    Where that table has no ``title``, which is the default, ``text``, ``caption`` or the only column beside
    ``file_name`` holds the captions. ``file_name`` itself takes the names of the files.
    """
    source = FolderSource(folder, by_name=caption_column == FILE_COLUMN)
    if source.pairs:
        return source
    if metadata := metadata_of(folder, caption_column):
        path, others = metadata
        if caption_column == _DEFAULT_CAPTION_COLUMN and caption_column not in others:
            known = [column for column in (*_CAPTION_COLUMNS, *others[: len(others) == 1]) if column in others]
            caption_column = known[0] if known else caption_column
        return TableSource(path, FILE_COLUMN, caption_column)
    if splits := sorted(path.parent for name in _METADATA for path in folder.glob(f"*/{name}")):
        names = ", ".join(path.name for path in splits)
        raise InputError(f"{folder} holds imagefolders with their tables of captions: {names}; name one: {splits[0]}")
    return source


def _refuse(error: OSError) -> None:
    folder = printable(str(error.filename))
    raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it elsewhere") from None

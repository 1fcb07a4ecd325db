"""Pairs in a folder: images with a .txt of the same name beside each, or an imagefolder with its table of captions."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from cloob.data.batch import BadSample, RawSample, clean_caption, printable, read_caption_file, read_image_file
from cloob.data.fingerprint import Fingerprint, digest, of_column, spread
from cloob.data.source import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from cloob.data.sources.table import TableSource, column_names
from cloob.errors import InputError, counted

FILE_COLUMN = "file_name"
"""The column of pictures in an imagefolder's table; as the caption column of a folder, file names are captions."""

_METADATA = ("metadata.csv", "metadata.jsonl")  # of a Hugging Face imagefolder


class FolderSource:
    """``a/b.jpg`` with ``a/b.txt`` beside it, in sub-folders too, sorted by path.

    An image without a caption and a caption without an image are bad samples. Hidden files and folders and linked
    folders are left out. ``pairs`` is the number of images with a caption. ``by_name`` takes the words of the file
    names as captions, whatever lies beside them.
    """

    streamed = False

    def __init__(self, folder: Path, *, by_name: bool = False) -> None:
        self.name = str(folder)
        self._by_name = by_name
        self._folder = folder
        linked: list[str] = []
        self.pairs = 0
        rows: list[tuple[str, str]] = []  # a picture, or a caption without one; and the name of the picture's caption
        for root, folders, names in walk(folder, _refuse):
            linked += [path for name in folders if os.path.islink(path := os.path.join(root, name))]  # noqa: PTH114, PTH118
            below, captions = Path(root).relative_to(folder), captions_by_stem(names)
            pictures = {name: name.rpartition(".")[0] for name in names if name.lower().endswith(IMAGE_SUFFIXES)}
            rows += [((below / name).as_posix(), captions.get(stem, "")) for name, stem in pictures.items()]
            rows += [((below / captions[stem]).as_posix(), "") for stem in captions.keys() - pictures.values()]
            self.pairs += sum(by_name or stem in captions for stem in pictures.values())
        rows.sort()
        first = f"{counted(len(linked), 'linked folders')} not followed, e.g. {printable(linked[0])}" if linked else ""
        self.remark = first and f"{first}: give each to --data by itself to read it too"
        self._paths = pa.array([os.fsencode(path) for path, _ in rows], pa.large_binary())
        self._captions = pa.array([os.fsencode(name) for _, name in rows], pa.large_binary())
        self.shard_sizes = (len(rows),)

    def __len__(self) -> int:
        return len(self._paths)

    def fingerprint(self) -> Fingerprint:
        captions, sizes = [], []
        for path, caption in map(self._files, spread(len(self))):
            with contextlib.suppress(BadSample):
                captions.append(read_caption_file(caption, ""))
            with contextlib.suppress(OSError):
                sizes.append(str(path.stat().st_size))
        names = of_column(pa.chunked_array([self._paths]))
        digests = {"captions": digest(captions), "sizes of pictures": digest(sizes)}
        return {"pairs": len(self), "file names": names, **digests}

    def read(self, index: int) -> RawSample:
        path, file = self._files(index)
        key = printable(path.relative_to(self._folder).as_posix())
        if path.suffix.lower() in CAPTION_SUFFIXES:
            raise BadSample("missing image", key, f"no image beside {path}")
        image = read_image_file(path, key)
        words = os.fsencode(re.sub(r"[-_ ]+", " ", path.stem)) if self._by_name else read_caption_file(file, key)
        return RawSample(key, image, clean_caption(words, key))

    def _files(self, index: int) -> tuple[Path, Path]:
        name, caption = (os.fsdecode(column[index].as_py()) for column in (self._paths, self._captions))
        path = self._folder / name
        return path, path.with_name(caption) if caption else path.with_suffix(".txt")


def walk(
    folder: Path | str, failed: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """A folder and those below it, as ``os.walk``: without hidden files and folders, sorted; links are not followed."""
    for root, folders, names in os.walk(folder, onerror=failed):
        folders[:], names[:] = (sorted(name for name in each if not name.startswith(".")) for each in (folders, names))
        yield root, folders, names


def captions_by_stem(names: Iterable[str]) -> dict[str, str]:
    """The caption files among names, by what they share with their picture's name; ``.txt`` before others."""
    captions: dict[str, str] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        if name.lower().endswith(CAPTION_SUFFIXES) and (extension == "txt" or stem not in captions):
            captions[stem] = name
    return captions


def metadata_of(folder: Path) -> Path | None:
    """The table of an imagefolder; None if there is none."""
    tables = (path for name in _METADATA if (path := folder / name).is_file())
    return next((path for path in tables if FILE_COLUMN in column_names(path, (FILE_COLUMN,))), None)


def open_folder(folder: Path, caption_column: str) -> FolderSource | TableSource:
    """Opens a folder of images with captions beside them, or a Hugging Face imagefolder with a table of captions.

    Where that table has no ``title``, which is the default, ``text``, ``caption`` or the only column beside
    ``file_name`` holds the captions. ``file_name`` itself takes the names of the files.
    """
    source = FolderSource(folder, by_name=caption_column == FILE_COLUMN)
    if source.pairs or (path := metadata_of(folder)) is None:
        return source
    if caption_column == "title":
        others = [column for column in column_names(path, (FILE_COLUMN,)) if column != FILE_COLUMN]
        usual = [column for column in ("title", "text", "caption") if column in others]
        caption_column = next(iter([*usual, *others[: len(others) == 1]]), caption_column)
    return TableSource(path, FILE_COLUMN, caption_column)


def _refuse(error: OSError) -> None:
    folder = printable(str(error.filename))
    raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it elsewhere") from None

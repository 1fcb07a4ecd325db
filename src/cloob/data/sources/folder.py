"""Pairs in a folder of pictures that lie next to their captions."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from cloob.data.batch import (
    BadSample,
    RawSample,
    as_utf8,
    clean_caption,
    read_pair_file,
)
from cloob.data.source import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Fingerprint,
    Source,
    digest,
    of_column,
    spread,
)
from cloob.errors import InputError, counted

_BYTES = pa.large_binary()


class FolderSource(Source):
    """``a/b.jpg`` with ``a/b.txt``, in sub-folders too, sorted by path; ``by_name``
    takes file names as captions.
    """

    def __init__(self, folder: Path, *, by_name: bool = False) -> None:
        self.name = str(folder)
        self._folder = folder
        self._by_name = by_name
        links: list[str] = []
        # a picture, or a caption without one; and the name of the picture's caption
        rows: list[tuple[str, str]] = []
        for root, folders, names in walk(folder, _cannot_list):
            paths = (os.path.join(root, name) for name in folders)  # noqa: PTH118
            links += filter(os.path.islink, paths)
            of_folder = _pairs_in(names)
            place = Path(root).relative_to(folder)
            rows += [((place / name).as_posix(), text) for name, text in of_folder]
        rows.sort()
        pictures = [text for name, text in rows if not _is_caption(name)]
        self.pairs = len(pictures) if by_name else len(list(filter(None, pictures)))
        if links:
            self.remark = (
                f"{counted(len(links), 'linked folders')} not followed, e.g."
                f" {as_utf8(links[0])}: give them to --data to read them too"
            )
        self._paths = pa.array([os.fsencode(name) for name, _ in rows], _BYTES)
        self._captions = pa.array([os.fsencode(text) for _, text in rows], _BYTES)
        self.shard_sizes = (len(rows),)

    def fingerprint(self) -> Fingerprint:
        """What tells another folder from this one: names, and captions and sizes of a
        sample.
        """
        captions, sizes = [], []
        for path, caption in map(self._files, spread(len(self))):
            with contextlib.suppress(BadSample):
                captions.append(read_pair_file(caption, "", "caption"))
            with contextlib.suppress(OSError):
                sizes.append(str(path.stat().st_size))
        return {
            "pairs": len(self),
            "file names": of_column(pa.chunked_array([self._paths])),
            "captions": digest(captions),
            "sizes of pictures": digest(sizes),
        }

    def read(self, index: int) -> RawSample:
        """The pair of a row: a picture, and the text next to it or its own name."""
        path, file = self._files(index)
        key = as_utf8(path.relative_to(self._folder).as_posix())
        if _is_caption(path.name):
            raise BadSample("missing image", key, f"no image next to {path}")
        image = read_pair_file(path, key, "image")
        if self._by_name:
            caption = os.fsencode(re.sub(r"[-_ ]+", " ", path.stem))
        else:
            caption = read_pair_file(file, key, "caption")
        return RawSample(key, image, clean_caption(caption, key))

    def _files(self, index: int) -> tuple[Path, Path]:
        """The picture and its caption; that of a picture without one is missing."""
        path = self._folder / os.fsdecode(self._paths[index].as_py())
        caption = os.fsdecode(self._captions[index].as_py())
        return path, path.with_name(caption) if caption else path.with_suffix(".txt")


def _pairs_in(names: list[str]) -> list[tuple[str, str]]:
    """The pictures of a folder with their captions' names, and captions without a
    picture.
    """
    captions = captions_by_stem(names)
    pictures = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    stems = {name.rpartition(".")[0] for name in pictures}
    pairs = [(name, captions.get(name.rpartition(".")[0], "")) for name in pictures]
    return pairs + [(captions[stem], "") for stem in captions.keys() - stems]


def _is_caption(name: str) -> bool:
    return name.lower().endswith(CAPTION_SUFFIXES)


def walk(
    folder: Path | str, failed: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """A folder and those below it, as ``os.walk``: without hidden files and folders,
    sorted; links are not followed.
    """
    for root, folders, names in os.walk(folder, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield root, folders, sorted(name for name in names if not name.startswith("."))


def captions_by_stem(names: Iterable[str]) -> dict[str, str]:
    """The caption files among names, by what they share with their picture's name;
    ``.txt`` before others.
    """
    captions: dict[str, str] = {}
    for name in filter(_is_caption, names):
        stem, _, extension = name.rpartition(".")
        if extension == "txt" or stem not in captions:
            captions[stem] = name
    return captions


def _cannot_list(error: OSError) -> None:
    folder = as_utf8(str(error.filename))
    raise InputError(
        f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it"
        " elsewhere"
    ) from None

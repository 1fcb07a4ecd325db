"""Pairs in a folder of pictures that lie next to their captions."""

from __future__ import annotations

import contextlib
import os
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
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    Fingerprint,
    Source,
    column_digest,
    digest,
    spread,
)
from cloob.errors import InputError, counted

_BYTES = pa.large_binary()


class FolderSource(Source):
    """``a/b.jpg`` with ``a/b.txt``, in sub-folders too, sorted by path; a text without
    a picture is a bad sample.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        links: list[Path] = []
        # a picture, or a caption without one; and the picture's caption
        rows: list[tuple[str, str]] = []
        for root, folders, names in walk(folder, _cannot_list):
            paths = [Path(root, name) for name in folders]
            links += filter(Path.is_symlink, paths)
            place = Path(root).relative_to(folder)
            rows += [(str(place / name), text) for name, text in _pairs_in(names)]
        rows.sort()
        if links:
            linked = counted(len(links), "linked folders")
            self.remark = (
                f"{linked} not followed, e.g. {as_utf8(str(links[0]))}: give them to"
                " --data to read them too"
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
            "file names": column_digest(pa.chunked_array([self._paths])),
            "captions": digest(captions),
            "sizes of pictures": digest(sizes),
        }

    def read(self, index: int) -> RawSample:
        """A picture and the text next to it."""
        path, text = self._files(index)
        key = as_utf8(path.relative_to(self._folder).as_posix())
        if _is_caption(path.name):
            raise BadSample("missing image", key, f"no image next to {path}")
        image = read_pair_file(path, key, "image")
        caption = read_pair_file(text, key, "caption")
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
    pairs = [(name, captions.get(_stem(name), "")) for name in pictures]
    lonely = captions.keys() - set(map(_stem, pictures))
    return pairs + [(captions[stem], "") for stem in lonely]


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
    """The caption files among names, by what they share with their picture's name."""
    return {_stem(name): name for name in names if _is_caption(name)}


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_caption(name: str) -> bool:
    return name.lower().endswith(CAPTION_SUFFIX)


def _cannot_list(error: OSError) -> None:
    folder = as_utf8(str(error.filename))
    raise InputError(
        f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it"
        " elsewhere"
    ) from None

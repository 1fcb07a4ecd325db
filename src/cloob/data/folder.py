"""Pairs in a folder: images with a .txt of the same name beside them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pyarrow as pa

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, RawSample, clean_caption, printable
from cloob.data.decode import read_image_file
from cloob.data.fingerprint import digest, of_column, spread
from cloob.data.shards import IMAGE_EXTENSIONS

_IMAGE_SUFFIXES = tuple(f".{ext}" for ext in IMAGE_EXTENSIONS)


class FolderSource:
    """A random-access source over ``a/b.jpg`` with ``a/b.txt`` beside it, in sub-folders too, sorted by path.

    An image without a .txt and a .txt without an image are counted as bad. Hidden files and folders are left out.

    Args:
        folder: The folder; it is listed once, paths are kept as one arrow array.
    """

    streamed = False

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        self._paths = pa.array([os.fsencode(path) for path in _list(folder)], pa.large_binary())
        self.shard_sizes = (len(self._paths),)

    def __len__(self) -> int:
        return len(self._paths)

    def fingerprint(self) -> dict[str, str]:
        """The paths, the captions, and the sizes of the pictures; of large folders a hundred thousand of the latter."""
        captions, sizes = [], []
        for index in spread(len(self)):
            path = self._folder / os.fsdecode(self._paths[index].as_py())
            with contextlib.suppress(OSError):
                captions.append(path.with_suffix(".txt").read_bytes()[: MAX_CAPTION_BYTES + 1])
            with contextlib.suppress(OSError):
                sizes.append(str(path.stat().st_size))
        return {
            "pairs": f"{len(self):,}",
            "file names": of_column(pa.chunked_array([self._paths])),
            "captions": digest(captions),
            "sizes of pictures": digest(sizes),
        }

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is the image's path below the folder.

        Raises:
            BadSample: It cannot be used.
        """
        below = os.fsdecode(self._paths[index].as_py())
        key, path = printable(below), self._folder / below
        if path.suffix.lower() == ".txt":
            raise BadSample("missing image", key, f"no image beside {path}")
        return RawSample(key, read_image_file(path, key), _read_caption(path.with_suffix(".txt"), key))


def _list(folder: Path) -> list[str]:
    rows: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [name for name in files if not name.startswith(".")]
        images = [name for name in visible if name.lower().endswith(_IMAGE_SUFFIXES)]
        stems = {name.rpartition(".")[0] for name in images}
        alone = [name for name in visible if name.endswith(".txt") and name[:-4] not in stems]
        below = Path(root).relative_to(folder)
        rows.extend((below / name).as_posix() for name in (*images, *alone))
    return sorted(rows)


def _read_caption(path: Path, key: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise BadSample("missing caption", key, f"{path}: {error.strerror}") from None
    return clean_caption(raw, key)

"""Pairs in WebDataset tar shards: ``key.jpg`` and ``key.txt`` are one sample.

Where each sample lies stands in Arrow columns: scanned once, then mapped from a file in the cache, which is found by
path, size and time of every tar. Later runs and the other ranks of a host use it: reading the headers of millions of
members takes minutes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cloob.cache import Cache, touch
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, RawSample, Reason, clean_caption, printable
from cloob.data.fingerprint import Fingerprint, digest, of_column
from cloob.data.shards.spec import SIZES, read_sizes
from cloob.data.shards.tar import Member, TarReader, group_members, split_name
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.errors import InputError, counted, message
from cloob.pictures import MAX_IMAGE_BYTES

_ABSENT = -1  # offset of a part that a sample does not have
_CUT = -2  # offset of the image in the row that stands for what a truncated shard has lost
_FORMAT = 6
_MIN_SAVED_BYTES = 64 * 1024 * 1024  # smaller tars are scanned faster than it is worth a file
_PARTS = (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS)
_COLUMNS = ("image_offset", "image_size", "caption_offset", "caption_size")
_ODD = "that a tar holds twice, or whose key has a dot: WebDataset's key ends at the first"


class ShardIndex:
    """One row a sample over several tars; a truncated tar has one more, whose image offset is ``_CUT``."""

    def __init__(self, table: pa.Table, file: Path | None = None) -> None:
        about = json.loads(table.schema.metadata[b"cloob"])
        self.keys, *places = (column.combine_chunks() for column in table.columns)
        self.places = tuple(column.to_numpy(zero_copy_only=False) for column in places)  # (N,) int64 each, bytes
        self.sizes: tuple[int, ...] = tuple(about["sizes"])
        self.cuts: dict[int, str] = {int(tar): cut for tar, cut in about["cuts"].items()}  # what truncated tars lack
        self.complete = tuple(size - (tar in self.cuts) for tar, size in enumerate(self.sizes))
        self.left_out: str = about["left_out"]  # what looks like a part of a sample and is none
        self.ends = np.cumsum(self.sizes)
        self._table, self._file = table, file

    @classmethod
    def scan(cls, reader: TarReader, target: Path | None = None) -> ShardIndex:
        """The index of some tars, made anew, and written to a file that can be mapped again."""
        keys: list[pa.Array] = []
        places: list[np.ndarray] = []
        cuts: dict[int, str] = {}
        odd: list[str] = []
        for number, path in enumerate(reader.paths):
            members, cut = reader.listing(number)
            odd += (printable(f"{path.name}/{name}") for name in _left_out(members))
            shard_keys, shard_places = _rows(members, cut)
            if cut is not None:
                cuts[number] = cut
            keys.append(pa.array(shard_keys, pa.large_string()))
            places.append(shard_places)
        about = {
            "sizes": [len(each) for each in keys],
            "cuts": cuts,
            "left_out": f"{counted(len(odd), 'files')} {_ODD}, e.g. {odd[0]}" if odd else "",
        }
        columns = dict(zip(_COLUMNS, map(pa.array, np.ascontiguousarray(np.concatenate(places).T)), strict=True))
        table = pa.table({"key": pa.concat_arrays(keys), **columns})
        table = table.replace_schema_metadata({"cloob": json.dumps(about)})
        if target is not None:
            with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        return cls(table)

    @classmethod
    def map(cls, file: Path) -> ShardIndex:
        with pa.memory_map(str(file)) as source:
            return cls(pa.ipc.open_file(source).read_all(), file)

    @classmethod
    def open(cls, reader: TarReader, cache: Cache, *, always: bool) -> ShardIndex:
        """The cached index if it is of these very tars, else a new one.

        It is kept for tars of 64 MiB or more together, or ``always``; where the cache cannot be written, it is not.
        """
        try:
            stats = [(str(path.resolve()), path.stat()) for path in reader.paths]
        except OSError as error:
            raise InputError(message(error)) from None
        scanned: list[ShardIndex] = []
        if always or sum(stat.st_size for _, stat in stats) >= _MIN_SAVED_BYTES:
            facts = json.dumps([_FORMAT, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]])
            for _ in range(2):  # again where the file is damaged
                with contextlib.suppress(InputError):  # the cache cannot be written; or of a tar, as said below
                    file = cache.get("indices", f"{facts}.arrow", lambda new: scanned.append(cls.scan(reader, new)))
                    with contextlib.suppress(OSError, ValueError, KeyError, pa.ArrowException):
                        return cls.map(file)
                    file.unlink(missing_ok=True)
        return scanned[-1] if scanned else cls.scan(reader)

    def __reduce__(self) -> Any:
        # A spawned worker gets the name of the file, not its content.
        if self._file is not None and touch(self._file):
            return ShardIndex.map, (self._file,)
        return ShardIndex, (self._table,)


class ShardSource:
    """A random-access source over WebDataset tar shards on local disks.

    A sample without an image or a caption stays in the count and raises ``BadSample`` when it is read. A truncated
    shard gives its complete samples and one more row, which raises ``"truncated shard"``: so the loss is reported in
    each epoch. Other files of a sample (.json, …) are ignored.

    ``label`` is what keys and errors call a single tar that lies in the cache; its index is kept too.
    """

    streamed = False

    def __init__(
        self, name: str, paths: Sequence[Path], *, cache: Cache | None = None, label: str | None = None
    ) -> None:
        self.name = name
        self._labels = (label,) if label else tuple(path.name for path in paths)
        self._reader = TarReader(tuple(paths), cache)
        self._index = ShardIndex.open(self._reader, cache or Cache(), always=label is not None)
        self.shard_sizes, self.complete = self._index.sizes, self._index.complete
        self.left_out, self.cuts = self._index.left_out, self._index.cuts
        self._expected = self._counts_beside()

    def __len__(self) -> int:
        return len(self._index.keys)

    def fingerprint(self) -> Fingerprint:
        keys = of_column(pa.chunked_array([self._index.keys]))
        return {
            "samples": len(self),
            "shards": digest(f"{label} {n}" for label, n in zip(self._labels, self.shard_sizes, strict=True)),
            "members": digest([keys, *self._index.places]),
        }

    def hold(self) -> None:
        """Opens the first shard, so that it can be read even when its name is gone."""
        self._reader.read(0, 0, 0)

    def read(self, index: int) -> RawSample:
        """The pair at ``index``, or a ``BadSample``; its key is ``shard file/key in the shard``."""
        shard = int(np.searchsorted(self._index.ends, index, side="right"))
        path, label = self._reader.paths[shard], self._labels[shard]
        image_at, image_size, caption_at, caption_size = (int(column[index]) for column in self._index.places)
        if image_at == _CUT:
            listed = f", sizes.json says {self._expected[shard]:,}" if shard in self._expected else ""
            complete = f"{self.complete[shard]:,} samples are complete"
            raise BadSample("truncated shard", label, f"{path}: {self.cuts[shard]}; {complete}{listed}")
        key = f"{label}/{self._index.keys[index].as_py()}"
        if fault := _fault(image_at, image_size, caption_at, caption_size):
            raise BadSample(fault[0], key, f"{fault[1]} in {path}")
        try:
            caption = clean_caption(self._reader.read(shard, caption_at, caption_size), key)
            return RawSample(key, self._reader.read(shard, image_at, image_size), caption)
        except OSError as error:
            raise BadSample("missing image", key, f"{path}: {error.strerror or error}") from None

    def _counts_beside(self) -> dict[int, int]:
        """By shard, what ``sizes.json`` beside it says; for complete shards it must be what they hold."""
        paths = self._reader.paths
        listed = {folder: read_sizes(folder / SIZES) for folder in {path.parent for path in paths}}
        counts = ((shard, listed[path.parent].get(path.name)) for shard, path in enumerate(paths))
        expected = {shard: count for shard, count in counts if count is not None}
        for shard, count in expected.items():
            if shard not in self.cuts and count != self.complete[shard]:
                path, holds = paths[shard], f"{self.complete[shard]:,}"
                fix = "get the shard again, or delete sizes.json if it is stale"
                raise InputError(
                    f"{path.parent / SIZES} says {count:,} samples in {path.name}, which holds {holds}: {fix}"
                )
        return expected


def _fault(image_at: int, image_size: int, caption_at: int, caption_size: int) -> tuple[Reason, str] | None:
    if image_at == _ABSENT:
        return "missing image", f"no {'/'.join(IMAGE_EXTENSIONS)} member of this name"
    if caption_at == _ABSENT:
        return "missing caption", f"no {'/'.join(CAPTION_EXTENSIONS)} member of this name"
    if caption_size > MAX_CAPTION_BYTES:
        return "caption too long", f"{caption_size:,} bytes, the limit is {MAX_CAPTION_BYTES:,},"
    return ("image too large", f"{image_size:,} bytes") if image_size > MAX_IMAGE_BYTES else None


def _left_out(members: list[Member]) -> list[str]:
    """Names of what looks like a part of a sample and is none: its key has a dot, or the tar holds it before."""
    parts = frozenset((*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS))
    names = [(*(split_name(member.name) or ("", "")), member.name) for member in members]
    seen: set[tuple[str, str]] = set()
    keys = {key for key, extension, _ in names if extension in parts}
    left_out = []
    for key, extension, name in names:
        dotted = extension not in parts and extension.rpartition(".")[2] in parts
        if (dotted and key not in keys) or (key, extension) in seen:  # a.seg.png beside a.jpg is meant so
            left_out.append(name)
        if extension in parts:
            seen.add((key, extension))
    return left_out


def _rows(members: list[Member], cut: str | None) -> tuple[list[str], np.ndarray]:
    samples = group_members(members, _PARTS)
    if cut is not None and samples and None in samples[last := next(reversed(samples))]:
        del samples[last]  # the last sample of a cut shard may have lost its second file: no loss of its own
    keys = [printable(key) for key in samples]
    rows = [
        [number for member in sample for number in ((member.offset, member.size) if member else (_ABSENT, 0))]
        for sample in samples.values()
    ]
    if cut is not None:
        keys.append("")
        rows.append([_CUT, 0, _CUT, 0])
    return keys, np.array(rows, np.int64).reshape(-1, 4)

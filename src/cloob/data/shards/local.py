"""Pairs in WebDataset tar shards: ``key.jpg`` and ``key.txt`` are one sample.

Where each sample lies stands in Arrow columns, mapped from a file in the cache that later runs and the other ranks of a
host use: reading the headers of millions of members takes minutes.
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
from cloob.data.shards.tar import Member, TarReader, group_members, split_name
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.errors import InputError, counted
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
        self._table, self._file = table, file

    @classmethod
    def scan(cls, reader: TarReader, target: Path | None = None) -> ShardIndex:
        """Makes the index, and writes it to a file that can be mapped."""
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
        left_out = f"{counted(len(odd), 'files')} {_ODD}, e.g. {odd[0]}" if odd else ""
        about = {"sizes": [len(each) for each in keys], "cuts": cuts, "left_out": left_out}
        columns = dict(zip(_COLUMNS, map(pa.array, np.ascontiguousarray(np.concatenate(places).T)), strict=True))
        table = pa.table({"key": pa.concat_arrays(keys), **columns}, metadata={"cloob": json.dumps(about)})
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
        """The cached index of these very tars, or a new one, kept for 64 MiB of tars or ``always``."""
        stats = [(str(path.resolve()), path.stat()) for path in reader.paths]
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
    """Samples in tars on local disks.

    A sample without an image or a caption stays in the count and raises ``BadSample``. A truncated shard gives its
    complete samples and one row ``"truncated shard"``. Other files of a sample (.json, …) are ignored.

    ``label`` is what keys and errors call a single tar that lies in the cache; its index is kept too.
    """

    streamed = False

    def __init__(
        self, name: str, paths: Sequence[Path], *, cache: Cache | None = None, label: str | None = None
    ) -> None:
        self.name = name
        self._labels = (label,) if label else tuple(path.name for path in paths)
        self.reader = TarReader(tuple(paths), cache)
        self.index = ShardIndex.open(self.reader, cache or Cache(), always=label is not None)
        self.shard_sizes = self.index.sizes
        self.remark = f"not read: {self.index.left_out}" if self.index.left_out else ""
        self._ends = np.cumsum(self.shard_sizes)

    def __len__(self) -> int:
        return len(self.index.keys)

    def fingerprint(self) -> Fingerprint:
        keys = of_column(pa.chunked_array([self.index.keys]))
        return {
            "samples": len(self),
            "shards": digest(f"{label} {n}" for label, n in zip(self._labels, self.shard_sizes, strict=True)),
            "members": digest([keys, *self.index.places]),
        }

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is ``shard file/key in the shard``."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path, label = self.reader.paths[shard], self._labels[shard]
        image_at, image_size, caption_at, caption_size = (int(column[index]) for column in self.index.places)
        if image_at == _CUT:
            complete = f"{self.index.complete[shard]:,} samples are complete"
            raise BadSample("truncated shard", label, f"{path}: {self.index.cuts[shard]}; {complete}")
        key = f"{label}/{self.index.keys[index].as_py()}"
        faults: list[tuple[bool, Reason, str]] = [
            (image_at == _ABSENT, "missing image", "none of this name"),
            (caption_at == _ABSENT, "missing caption", "none of this name"),
            (caption_size > MAX_CAPTION_BYTES, "caption too long", f"{caption_size:,} bytes"),
            (image_size > MAX_IMAGE_BYTES, "image too large", f"{image_size:,} bytes"),
        ]
        for is_bad, reason, detail in faults:
            if is_bad:
                raise BadSample(reason, key, f"{detail} in {path}")
        try:
            caption = clean_caption(self.reader.read(shard, caption_at, caption_size), key)
            return RawSample(key, self.reader.read(shard, image_at, image_size), caption)
        except OSError as error:
            raise BadSample("missing image", key, f"{path}: {error.strerror or error}") from None


def _left_out(members: list[Member]) -> list[str]:
    """Names of what looks like a part of a sample and is none: its key has a dot, or the tar holds it before."""
    parts = frozenset((*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS))
    names = [split_name(member.name) for member in members]
    seen: set[tuple[str, str]] = set()
    keys = {key for key, extension in names if extension in parts}
    left_out = []
    for member, (key, extension) in zip(members, names, strict=True):
        dotted = extension not in parts and extension.rpartition(".")[2] in parts
        if (dotted and key not in keys) or (key, extension) in seen:  # a.seg.png beside a.jpg is meant so
            left_out.append(member.name)
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

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

import cloob.data.shards.tar as tarindex
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample
from cloob.data.open import open_source
from cloob.data.shards.local import ShardSource
from cloob.data.shards.tar import TarReader, split_name
from cloob.errors import InputError

WriteTar = Callable[..., Path]
MakeImage = Callable[..., bytes]


def outcomes(source: ShardSource) -> list[str]:
    """For each row its caption, or the reason why it has none."""
    found = []
    for i in range(len(source)):
        try:
            found.append(source.read(i).caption)
        except BadSample as bad:
            found.append(bad.reason)
    return found


@pytest.mark.parametrize(
    "spec", ["shards", "shards/*.tar", "shards/{00000..00002}.tar", "shards/0000[0-2].tar", "./shards/0000{0,1,2}.tar"]
)
def test_every_way_to_name_shards(shards: Path, image: MakeImage, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    source = open_source(spec)
    assert source.shard_sizes == (5, 4, 3) and len(source) == 12 and source.name == spec
    for i in (11, 0, 5):
        sample = source.read(i)
        assert sample.caption == f"pair {i}" and sample.image == image(i)
    assert source.read(5).key == "00001.tar/p005"


def test_one_shard(shards: Path) -> None:
    assert len(open_source(shards / "00002.tar")) == 3


def test_reads_what_webdataset_reads(shards: Path) -> None:
    theirs = []
    for path in sorted(shards.glob("*.tar")):
        with path.open("rb") as file:
            expanded = tar_file_expander([{"url": path.name, "stream": file}])
            theirs += [(s["__key__"], s["png"], s["txt"].decode()) for s in group_by_keys(expanded)]
    source = open_source(shards)
    ours = [source.read(i) for i in range(len(source))]
    assert theirs == [(s.key.partition("/")[2], s.image, s.caption) for s in ours]


def test_a_real_shard(shared_data: Path) -> None:
    source = open_source(shared_data / "pictograms" / "val")
    assert len(source) == 1000  # also what its sizes.json says
    samples = [source.read(i) for i in range(1000)]
    assert len({s.key for s in samples}) == 1000 and all(s.image[:4] == b"RIFF" for s in samples)


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2"])
def test_compressed_shards(tmp_path: Path, image: MakeImage, write_tar: WriteTar, suffix: str) -> None:
    files = {f"{i}.{ext}": data for i in range(3) for ext, data in (("jpg", image(i)), ("txt", b"c%d" % i))}
    path = write_tar(tmp_path / f"0.tar.{suffix}", files)
    source = open_source(path)
    assert [source.read(i).image for i in (2, 0)] == [image(2), image(0)]
    path.rename(tmp_path / "0.tar")  # the first bytes tell, not the name
    assert open_source(tmp_path / "0.tar").read(1).caption == "c1"
    assert pickle.loads(pickle.dumps(open_source(tmp_path))).read(1).image == image(1)


def test_names_are_split_as_webdataset_splits_them() -> None:
    assert split_name("a/b.seg.PNG") == ("a/b", "seg.png")
    assert split_name("a.b/c.txt") == ("a.b/c", "txt")
    assert split_name("./c.txt") == ("./c", "txt")
    assert split_name("README") is None and split_name("a/.hidden") is None


def test_incomplete_and_bad_samples_are_counted_by_reason(
    tmp_path: Path, image: MakeImage, write_tar: WriteTar
) -> None:
    files = {
        "good.png": image(),
        "b/nocaption.jpg": image(),
        "noimage.txt": b"x",
        "good.txt": b"good\n",  # not beside its image
        "good.json": b"{}",
        "README.md": b"not a sample",
        "empty.png": image(),
        "empty.txt": b" ",
        "latin.png": image(),
        "latin.txt": b"caf\xe9",
        "long.png": image(),
        "long.txt": b"a" * 1_000_000,
        "limit.webp": image(),
        "limit.txt": b"a" * MAX_CAPTION_BYTES,
    }
    source = open_source(write_tar(tmp_path / "0.tar", files))
    assert outcomes(source) == [
        "good",
        "missing caption",
        "missing image",
        "empty caption",
        "caption not UTF-8",
        "caption too long",
        "a" * MAX_CAPTION_BYTES,
    ]
    with pytest.raises(BadSample, match=r"0\.tar/b/nocaption"):
        source.read(1)


@pytest.mark.parametrize("kept", ["in the data", "in a header", "between members", "at the end mark"])
def test_a_truncated_shard_gives_its_complete_samples_and_reports_the_loss(shards: Path, kept: str) -> None:
    with tarfile.open(shards / "00001.tar") as tar:
        third = tar.getmember("p007.png")
        last = tar.getmembers()[-1]
    length = {
        "in the data": third.offset_data + 10,
        "in a header": third.offset + 100,
        "between members": third.offset,
        "at the end mark": last.offset_data + 512,
    }[kept]
    with (shards / "00001.tar").open("r+b") as file:
        file.truncate(length)
    source = open_source(shards)
    complete = [5, 6, 7, 8] if kept == "at the end mark" else [5, 6]
    expected = [f"pair {i}" for i in (*range(5), *complete)] + ["truncated shard"] + [f"pair {i}" for i in (9, 10, 11)]
    assert outcomes(source) == expected
    with pytest.raises(BadSample) as caught:
        source.read(expected.index("truncated shard"))
    assert caught.value.key == "00001.tar" and f"{len(complete)} samples are complete" in caught.value.detail


def test_a_half_sample_at_the_cut_is_part_of_the_loss(shards: Path) -> None:
    with tarfile.open(shards / "00000.tar") as tar:
        cut = tar.getmember("p002.txt").offset_data + 2
    with (shards / "00000.tar").open("r+b") as file:
        file.truncate(cut)
    assert outcomes(open_source(shards))[:3] == ["pair 0", "pair 1", "truncated shard"]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, content: bytes = b"") -> bytes:
    """A header with its content, whatever size it claims."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def extended(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header of records such as ``b"size=3"``, of 6 to 95 bytes."""
    content = b"".join(b"%d %s\n" % (len(record) + 4, record) for record in records)
    return header("pax", len(content), kind, content)


def sparse(numbers: int) -> bytes:
    """A member whose content is a map of a sparse file."""
    return header("9.png", 2 * numbers + 8, content=b"%7d\n" % (numbers // 2) + b"0\n" * numbers)


def test_records_for_all_members_that_name_none_are_no_harm(shards: Path) -> None:
    """git archive writes one."""
    path = shards / "00000.tar"
    path.write_bytes(extended(b"comment=0123456789", kind=tarfile.XGLTYPE) + path.read_bytes())
    listing = TarReader((path,)).listing(0)
    assert listing.cut is None and outcomes(open_source(shards))[:2] == ["pair 0", "pair 1"]


def test_an_empty_shard_among_others_is_a_loss(shards: Path) -> None:
    (shards / "00001.tar").write_bytes(b"")
    source = open_source(shards)
    assert source.shard_sizes == (5, 1, 3) and outcomes(source)[5] == "truncated shard"


def test_a_compressed_shard_cut_short_gives_what_was_unpacked(
    tmp_path: Path, image: MakeImage, write_tar: WriteTar
) -> None:
    files = {f"{i}.{ext}": data for i in range(40) for ext, data in (("png", image(i, 32, 32)), ("txt", b"c%d" % i))}
    path = write_tar(tmp_path / "0.tar.gz", files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = outcomes(open_source(path))
    assert 5 < len(found) < 35 and found[-1] == "truncated shard"
    assert found[:-1] == [f"c{i}" for i in range(len(found) - 1)]


def test_what_looks_like_a_part_of_a_sample_and_is_none_is_said(
    tmp_path: Path, image: MakeImage, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    """A dot in a key, and a name that comes twice; a second archive behind the end of the first is read."""
    good = {f"{i}.{ext}": data for i in range(2) for ext, data in (("jpg", image(i)), ("txt", b"c"), ("seg.png", b""))}
    dotted = {"photo.0.png": image(), "photo.0.txt": b"c", "photo.0.json": b"{}"}
    more = {"9.png": image(9), "9.txt": b"nine"}
    first, second = write_tar(tmp_path / "0.tar", good | dotted), write_tar(tmp_path / "more", more)
    with tarfile.open(first, "a") as tar:
        tar.add(second, "1.jpg")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    for path in (first, tmp_path / "1.tar.gz"):
        path.write_bytes(gzip.compress(first.read_bytes()) if path != first else first.read_bytes())
        caplog.clear()
        source = open_source(path)
        assert outcomes(source) == ["c", "c", "nine"] and source.read(2).image == image(9)
        assert len(caplog.records) == 1
        assert caplog.text.rstrip().endswith(
            f"{path}: 3 rows; not read: 1 file of a name that the tar holds before, e.g. {path.name}/1.jpg; 2 files "
            f"whose key has a dot, as WebDataset's key ends at the first, e.g. {path.name}/photo.0.png"
        )


def test_behind_a_damaged_header_the_rest_is_read(shards: Path) -> None:
    path = shards / "00001.tar"
    with tarfile.open(path) as tar:
        place = tar.getmember("p006.png").offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"damage" * 20)
    found = outcomes(open_source(shards))
    assert found[5:10] == ["pair 5", "missing image", "pair 7", "pair 8", "truncated shard"]


def test_sizes_json_is_checked(shards: Path) -> None:
    (shards / "sizes.json").write_text(json.dumps({"00000.tar": 5, "00001.tar": 4}))
    assert len(open_source(shards)) == 12
    (shards / "sizes.json").write_text(json.dumps({"00000.tar": 7}))
    with pytest.raises(InputError, match=r"says 7 samples in 00000\.tar, which holds 5"):
        open_source(shards)
    with (shards / "00000.tar").open("r+b") as file:
        file.truncate(3000)
    source = open_source(shards)
    with pytest.raises(BadSample, match=r"sizes\.json says 7"):
        source.read(source.shard_sizes[0] - 1)
    (shards / "sizes.json").write_text(json.dumps({"00001.tar": 4, "00003.tar": 5, "00004.tar": 5}))
    with pytest.raises(InputError, match=r"00003\.tar: no such file, but sizes\.json beside it names it \(2 missing\)"):
        open_source(shards)
    assert len(open_source(shards / "0000[12].tar")) == 7
    (shards / "sizes.json").write_text("{oops")
    with pytest.raises(InputError, match=r"sizes\.json: is not JSON"):
        open_source(shards)


def test_a_shard_that_vanishes_later_is_a_bad_sample(shards: Path) -> None:
    source = ShardSource("s", sorted(shards.glob("*.tar")))
    (shards / "00000.tar").unlink()
    with pytest.raises(BadSample, match="missing image"):
        source.read(0)


def _read_in_child(source: ShardSource, pipe: multiprocessing.connection.Connection) -> None:
    pipe.send([source.read(i).caption for i in range(len(source))])


@pytest.mark.parametrize(("method", "processes"), [("fork", 2), ("spawn", 1)])
def test_several_processes_read_at_once(shards: Path, method: str, processes: int) -> None:
    source = open_source(shards)
    source.read(0)  # a handle is open before the child begins
    context = multiprocessing.get_context(method)
    ends = [context.Pipe(duplex=False) for _ in range(processes)]
    children = [context.Process(target=_read_in_child, args=(source, end)) for _, end in ends]
    for child in children:
        child.start()
    expected = [f"pair {i}" for i in range(12)]
    assert [source.read(i).caption for i in range(12)] == expected
    assert [end.recv() for end, _ in ends] == [expected] * processes
    for child in children:
        child.join()
    for pair in ends:
        for end in pair:
            end.close()


def test_handles_are_bounded_and_closed(tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarindex, "_MAX_OPEN_FILES", 3)
    reader = TarReader(tuple(write_tar(tmp_path / f"{i}.tar", {"a.txt": b"%d" % i}) for i in range(8)))
    members = [reader.listing(i).members[0] for i in range(8)]
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for i in [*range(8), 0, 7, 3]:
        assert reader.read(i, members[i].offset, members[i].size) == b"%d" % i
    assert len(os.listdir("/proc/self/fd")) == before + 3  # noqa: PTH208
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_gzip_of_an_empty_tar_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(InputError, match="0 of 1 pairs usable"):
        open_source(tmp_path / "0.tar.gz")


@pytest.mark.parametrize("positional", [True, False])
def test_threads_read_more_tars_than_are_open(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch, positional: bool
) -> None:
    """Each gets the bytes of its own tar, also without ``pread``, and while handles are let go of under its hands."""
    monkeypatch.setattr(tarindex, "_MAX_OPEN_FILES", 2)
    if not positional:
        monkeypatch.setattr(tarindex, "_pread", None)
    content = [bytes([number]) * 4096 for number in range(8)]
    paths = tuple(write_tar(tmp_path / f"{i}.tar", {"a.txt": data}) for i, data in enumerate(content))
    reader = tarindex.TarReader(paths)
    places = [reader.listing(i).members[0] for i in range(8)]

    def read(number: int) -> bool:
        tar = number % 8
        return reader.read(tar, places[tar].offset, places[tar].size) == content[tar]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(4000)))


NUMBER, LETTER = st.integers(-9, 12), st.sampled_from("azAZm")

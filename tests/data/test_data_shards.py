"""WebDataset tar shards on local disks, and the index of where their samples lie."""

import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from cloob import open_source
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample
from cloob.errors import InputError
from make import noise, outcomes, samples, sent, write_tar
from support import raises


def captions(source):
    """For each row its caption, or the reason why it has none."""
    return [*outcomes(source).values()]


def pairs(count, size=4):
    """The members of pairs ``0`` to ``count - 1``, whose captions are ``c0``,
    ``c1``, …
    """
    files = {}
    for i in range(count):
        files[f"{i}.png"] = noise(i, size, size)
        files[f"{i}.txt"] = b"c%d" % i
    return files


@pytest.mark.parametrize(
    "spec",
    [
        "shards",
        "shards/*.tar",
        "shards/{00000..00002}.tar",
        "shards/0000[0-2].tar",
        "./shards/0000{0,1,2}.tar",
    ],
)
def test_every_way_to_name_shards(shards, spec, monkeypatch):
    monkeypatch.chdir(shards.parent)
    monkeypatch.setenv("HOME", str(shards.parent))
    source = open_source(spec)
    assert source.shard_sizes == (5, 4, 3)
    assert len(source) == 12
    assert source.name == spec
    for i in (11, 0, 5):
        sample = source.read(i)
        assert sample.caption == f"pair {i}"
        assert sample.image == noise(i)
    assert source.read(5).key == "00001.tar/p005"
    assert len(open_source("shards/00002.tar")) == 3
    raises(InputError, "not a brace pattern", open_source, "shards/{a,b.tar")
    assert len(open_source("~/shards")) == 12


def test_reads_what_webdataset_reads(shards):
    files = {"a/b.png": noise(), "a/b.seg.PNG": noise(), "a/b.txt": b"x"}
    files |= {"a.b/c.png": noise(), "a.b/c.txt": b"x"}
    files |= {"README": b"x", "a/.hidden": b"x"}
    write_tar(shards / "00003.tar", files)
    theirs = []
    for path in sorted(shards.glob("*.tar")):
        with path.open("rb") as file:
            expanded = tar_file_expander([{"url": path.name, "stream": file}])
            for sample in group_by_keys(expanded):
                if "txt" in sample:
                    caption = sample["txt"].decode()
                    theirs.append((sample["__key__"], sample["png"], caption))
    ours = []
    for sample in samples(open_source(shards)):
        _, _, key = sample.key.partition("/")
        ours.append((key, sample.image, sample.caption))
    assert theirs == ours


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_compressed_shards(tmp_path, suffix):
    path = write_tar(tmp_path / f"0.tar.{suffix}", pairs(3))
    source = open_source(path)
    assert source.read(2).image == noise(2, 4, 4)
    assert source.read(0).image == noise(0, 4, 4)
    assert sent(source).read(1).caption == "c1"
    path.write_bytes(path.read_bytes()[:-20])
    message = rf"0\.tar\.{suffix} cannot be read as {suffix}"
    raises(InputError, message, open_source, tmp_path)


def test_bad_samples_are_counted_by_reason(tmp_path):
    files = {
        "good.png": noise(),
        "b/nocaption.jpg": noise(),
        "noimage.txt": b"x",
        "good.txt": b"good\n",  # not beside its image
        "good.json": b"{}",
        "README.md": b"not a sample",
        "empty.png": noise(),
        "empty.txt": b" ",
        "latin.png": noise(),
        "latin.txt": b"caf\xe9",
        "long.png": noise(),
        "long.txt": b"a" * 1_000_000,
        "limit.HEIC": noise(),
        "limit.TXT": b"a" * MAX_CAPTION_BYTES,
    }
    source = open_source(write_tar(tmp_path / "0.tar", files))
    expected = [
        "good",
        "missing caption",
        "missing image",
        "empty caption",
        "caption not UTF-8",
        "caption too long",
        "a" * MAX_CAPTION_BYTES,
    ]
    assert captions(source) == expected
    raises(BadSample, r"0\.tar/b/nocaption", source.read, 1)


@pytest.mark.parametrize(
    ("place", "complete"),
    [
        ("data", 2),
        ("caption", 2),
        ("header", 2),
        ("between", 2),
        ("end", 4),
        ("nothing", 0),
    ],
)
def test_a_truncated_shard_gives_its_complete_samples_and_reports_the_loss(
    shards, place, complete
):
    with tarfile.open(shards / "00001.tar") as tar:
        third = tar.getmember("p007.png")
        caption = tar.getmember("p007.txt")
        last = tar.getmembers()[-1]
    length = {"between": third.offset, "nothing": 0}
    length["data"] = third.offset_data + 10
    length["header"] = third.offset + 100
    length["caption"] = caption.offset_data + 2  # half a sample is part of the loss
    length["end"] = last.offset_data + 512
    os.truncate(shards / "00001.tar", length[place])
    source = open_source(shards)
    first = [*range(5), *range(5, 5 + complete)]
    expected = [f"pair {i}" for i in first]
    expected += ["truncated shard", "pair 9", "pair 10", "pair 11"]
    assert captions(source) == expected
    assert source.shard_sizes == (5, complete + 1, 3)
    with pytest.raises(BadSample) as caught:
        source.read(5 + complete)
    assert caught.value.key == "00001.tar"
    assert f"{complete} samples are complete" in caught.value.detail


def test_what_looks_like_a_part_of_a_sample_and_is_none_is_said(tmp_path, caplog):
    """A dot in a key, and a name that comes twice."""
    files = pairs(2)
    files["photo.0.png"] = noise()
    files["photo.0.txt"] = b"c"
    files["photo.0.json"] = b"{}"
    files["0.seg.png"] = b""
    first = write_tar(tmp_path / "0.tar", files)
    with tarfile.open(first, "a") as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    source = open_source(first)
    assert captions(source) == ["c0", "c1"]
    assert source.read(1).image == noise(1, 4, 4)
    assert len(caplog.records) == 1
    assert f"{first}: 2 rows; not read: 3 files" in caplog.text
    assert "0.tar/photo.0.png" in caplog.text


@pytest.mark.parametrize(
    ("kind", "sized"), [(tarfile.GNU_FORMAT, False), (tarfile.PAX_FORMAT, True)]
)
def test_names_and_sizes_that_a_header_has_no_room_for(tmp_path, kind, sized):
    """A name of 140 letters; a size in a record of its own, as a file of 8 GB has
    it.
    """
    place = "folder/" * 20
    files = {f"{place}{name}": data for name, data in pairs(2).items()}
    source = open_source(write_tar(tmp_path / "0.tar", files, kind, sized=sized))
    assert captions(source) == ["c0", "c1"]
    assert source.read(1).image == files[f"{place}1.png"]
    assert source.read(1).key == f"0.tar/{place}1"


def test_threads_read_more_tars_than_are_open(tmp_path):
    """Each gets the bytes of its own tar while files are let go of under its hands; few
    stay open.
    """
    picture = noise()
    for i in range(90):
        files = {"a.png": picture, "a.txt": b"caption %d" % i}
        write_tar(tmp_path / f"{i:02}.tar", files)
    source = open_source(tmp_path)
    rows = [*range(90)] * 22
    with ThreadPoolExecutor(8) as pool:
        for row, sample in zip(rows, pool.map(source.read, rows), strict=True):
            assert sample.caption == f"caption {row}"
    opened = Path("/proc/self/fd")
    if opened.exists():
        files = [entry.readlink() for entry in opened.iterdir() if entry.is_symlink()]
        assert sum(file.is_relative_to(tmp_path) for file in files) == 64


def test_an_index_is_kept_for_as_long_as_the_shards_are_the_same(
    shards, tmp_path, monkeypatch
):
    """With so many bytes that it is kept; they are a hole."""
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    indices = tmp_path / "cache" / "indices"
    info = tarfile.TarInfo("hole.bin")
    info.size = 64 * 1024 * 1024
    (shards / "00003.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(shards / "00003.tar", 512 + info.size + 1024)
    os.truncate(shards / "00001.tar", 3000)
    expected = captions(open_source(shards))
    (file,) = indices.glob("*.arrow")
    written = file.stat().st_mtime_ns
    again = open_source(shards)
    assert captions(again) == expected
    assert file.stat().st_mtime_ns == written
    packed = pickle.dumps(again)
    assert len(packed) < 2000  # the file's name, not its content
    assert captions(pickle.loads(packed)) == expected
    file.write_bytes(b"junk")
    raises(InputError, file.name, open_source, shards)
    write_tar(shards / "00002.tar", {"n.png": noise(), "n.txt": b"new"})
    assert captions(open_source(shards))[-1] == "new"
    assert len(list(indices.glob("*.arrow"))) == 2
    assert not list(indices.glob(".tmp-*"))


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="no file here whose reading fails"
)
def test_a_tar_whose_reading_fails_is_not_missing(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pairs(1))
    source = open_source(tmp_path)  # the third is not read yet
    (tmp_path / "2.tar").unlink()
    (tmp_path / "2.tar").symlink_to("/proc/self/mem")
    said = r"2\.tar/0: cannot be read \(.*2\.tar: Input/output error"
    raises(BadSample, said, source.read, 2)

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloob.data.batch import BadSample
from cloob.data.open import open_source
from cloob.data.shards import index as shardindex
from cloob.data.shards.local import ShardSource
from cloob.data.shards.tar import TarReader


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of saved indices; every set is large enough for one."""
    monkeypatch.setattr(shardindex, "_MIN_SAVED_BYTES", 0)
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indices"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars that were scanned."""
    scanned: list[str] = []
    listing = TarReader.listing

    def noted(self: TarReader, tar: int) -> object:
        scanned.append(self.paths[tar].name)
        return listing(self, tar)

    monkeypatch.setattr(TarReader, "listing", noted)
    return scanned


def content(source: ShardSource) -> list[object]:
    found: list[object] = []
    for i in range(len(source)):
        try:
            found.append(source.read(i))
        except BadSample as bad:
            found.append((bad.reason, bad.key, bad.detail))
    return found


def test_a_saved_index_gives_what_a_scan_gives(
    shards: Path, saved: Path, scans: list[str], write_tar: Callable[..., Path], image: Callable[..., bytes]
) -> None:
    os.truncate(shards / "00001.tar", 3000)
    write_tar(shards / "00003.tar.gz", {"ä.png": image(), "ä.txt": b"x", "b.png": image(), "c.txt": b"y"})
    (shards / "sizes.json").write_text('{"00001.tar": 4}')
    first = content(open_source(shards))
    assert len(scans) == 4 and len(list(saved.glob("*.arrow"))) == 1
    again = open_source(shards)
    assert len(scans) == 4 and content(again) == first
    assert {entry[0] for entry in first if isinstance(entry, tuple)} == {
        "truncated shard", "missing caption", "missing image",
    }  # fmt: skip
    packed = pickle.dumps(again)
    assert len(packed) < 2000 and content(pickle.loads(packed)) == first  # the file's name, not its content


def test_a_changed_shard_is_scanned_again(
    shards: Path, saved: Path, scans: list[str], write_tar: Callable[..., Path], image: Callable[..., bytes]
) -> None:
    assert len(open_source(shards)) == 12
    write_tar(shards / "00002.tar", {"n.png": image(), "n.txt": b"new"})
    changed = open_source(shards)
    assert len(scans) == 6 and len(changed) == 10 and changed.read(9).caption == "new"
    os.utime(shards / "00000.tar", ns=(0, 0))  # the same size, but it may be another file
    open_source(shards)
    assert len(scans) == 9


def test_a_damaged_index_is_replaced(shards: Path, saved: Path, scans: list[str]) -> None:
    expected = content(open_source(shards))
    (file,) = saved.glob("*.arrow")
    for junk in (b"", b"junk" * 100, file.read_bytes()[:-200]):
        file.write_bytes(junk)
        assert content(open_source(shards)) == expected
    assert len(scans) == 12 and content(open_source(shards)) == expected and len(scans) == 12
    assert not list(saved.glob(".tmp-*"))


def test_read_only_folders_cost_the_scan_and_nothing_else(
    shards: Path, tmp_path: Path, saved: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "file"))  # nobody can write below a file, not even root
    before = sorted(shards.iterdir())
    assert len(open_source(shards)) == len(open_source(shards)) == 12
    assert len(scans) == 6 and sorted(shards.iterdir()) == before


def test_small_sets_leave_no_file(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    open_source(shards)
    assert not (tmp_path / "cache").exists()


def _open(shards: Path, scanned: Path) -> None:
    listing = TarReader.listing

    def noted(self: TarReader, tar: int) -> object:
        with scanned.open("a") as file:
            file.write("x")
        return listing(self, tar)

    TarReader.listing = noted  # type: ignore[method-assign] # in this process
    assert len(open_source(shards)) == 12


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_one_of_several_processes_scans(shards: Path, saved: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_open, args=(shards, tmp_path / "scanned")) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "scanned").read_text() == "xxx"


@settings(max_examples=60)
@example(names=["\x80"], sizes=[0] * 9, kind=tarfile.PAX_FORMAT, cut=512)  # within the first extended header
@given(
    names=st.lists(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=120), max_size=9
    ),
    sizes=st.lists(st.integers(0, 1500), min_size=9, max_size=9),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    cut=st.integers(0, 4000),
)
def test_members_are_listed_as_tarfile_lists_them(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], sizes: list[int], kind: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "listed.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for i, (name, size) in enumerate(zip(names, sizes, strict=False)):
            info = tarfile.TarInfo(name)
            info.size = 0 if i == 4 else size
            info.type = tarfile.DIRTYPE if i == 4 else tarfile.REGTYPE
            with contextlib.suppress(ValueError):  # too long for ustar
                tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    listing = TarReader((path,)).listing(0)
    assert [(m.name, m.offset, m.size) for m in listing.members] == expected and listing.cut is None
    whole = path.stat().st_size
    os.truncate(path, max(whole - 10240 + cut, 0))
    short = TarReader((path,)).listing(0)
    size = path.stat().st_size
    assert [(m.name, m.offset, m.size) for m in short.members] == [e for e in expected if e[1] + e[2] <= size]

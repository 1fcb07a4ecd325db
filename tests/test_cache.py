"""Files and folders appear whole or not at all; the one cache is bounded; what this
machine has for a process.
"""

import errno
import os
import time
from pathlib import Path

import pytest

from cloob import machine
from cloob.cache import DEFAULT_BYTES, Cache
from cloob.errors import InputError
from cloob.files import read_at_most, whole_folder, write_whole
from support import raises

DAY = 86_400.0


def entry(cache, name, used_ago, kind="embeddings", size=1000):
    path = cache.put(kind, name, bytes(size))
    os.utime(path, (time.time() - used_ago,) * 2)
    return path


def test_what_was_used_longest_ago_makes_room_whatever_it_is(tmp_path):
    cache = Cache(tmp_path)
    again = entry(cache, "again", 9 * DAY)
    kinds = ("shards", "indices", "features", "embeddings")
    paths = [
        entry(cache, f"of day {day}", day * DAY, kind)
        for day, kind in enumerate(kinds, 1)
    ]
    half = again.with_name(f".tmp-{again.name}-9-9")
    half.write_bytes(bytes(1000))
    os.utime(half, (0, 0))
    assert cache.find("embeddings", "again") == again  # used just now
    assert Cache(tmp_path, 4300).evict() == [half, paths[3]]
    assert Cache(tmp_path, 3300).evict() == [paths[2]]
    new = Cache(tmp_path, 2000).put(
        "features", "new", bytes(1000)
    )  # whoever stores, tidies up
    assert again.exists()
    assert new.exists()
    assert not paths[1].exists()
    assert not paths[0].exists()


def test_what_another_run_may_be_about_to_read_stays(tmp_path):
    cache = Cache(tmp_path)
    young = [
        entry(cache, str(kind), 1800, kind)
        for kind in ("embeddings", "features", "indices")
    ]
    streamed = entry(cache, "shard", 1800, "shards")
    assert Cache(tmp_path, 0).evict() == [
        streamed
    ]  # whatever room there is has to do for those
    assert all(path.exists() for path in young)
    for path in young:
        os.utime(path, (time.time() - 3700,) * 2)
    assert sorted(Cache(tmp_path, 0).evict()) == sorted(young)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for key in ("CLOOB_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    raises(InputError, "set CLOOB_CACHE or HOME", Cache().find, "features", "x")


def test_what_is_not_of_the_cache_stays(tmp_path):
    """Weights that an offline machine was given, counts, and files of other
    programs.
    """
    names = (
        "weights/clip/model.pt",
        "sizes/0.json",
        "embeddings/notes.safetensors",
        "shards/.tmp-5",
        "model.tar",
    )
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
        os.utime(path, (0, 0))
    ours = entry(Cache(tmp_path), "old", DAY)
    assert Cache(tmp_path, 0).evict() == [ours]
    assert all((tmp_path / name).is_file() for name in names)


def test_a_failed_making_leaves_nothing(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise InputError("broke off")

    raises(InputError, "broke off", Cache(tmp_path).get, "shards", "x", fail)
    assert Cache(tmp_path).find("shards", "x") is None
    assert [path.name[:5] for path in (tmp_path / "shards").iterdir()] in (
        [],
        ["lock-"],
    )


def test_folder_and_size_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", "")
    monkeypatch.setenv("CLOOB_CACHE_BYTES", "")
    assert Cache().max_bytes == DEFAULT_BYTES == 50 * 1024**3
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path))
    monkeypatch.setenv("CLOOB_CACHE_BYTES", str(1 << 29))
    assert Cache().max_bytes == 1 << 29
    assert Cache(max_bytes=7).max_bytes == 7
    assert Cache().put("features", "x", b"x").parent == tmp_path / "features"
    monkeypatch.setenv("CLOOB_CACHE_BYTES", "20 GB")
    raises(
        InputError, r"CLOOB_CACHE_BYTES is '20 GB'; it takes a number of bytes", Cache
    )


def test_a_file_is_whole_or_what_was_there_stays(tmp_path):
    path = tmp_path / "made" / "name.txt"
    write_whole(path, "é\nfirst")
    assert path.read_bytes() == "é\nfirst".encode()
    write_whole(path, b"\x00second")
    for target, said in (
        (path / "x", r"name.txt/x: cannot be written \("),
        (path.parent, r"made: cannot be written"),
    ):
        raises(InputError, said, write_whole, target, "text")
    assert path.read_bytes() == b"\x00second"
    assert list(tmp_path.rglob("*")) == [
        path.parent,
        path,
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_no_pipe_and_no_device_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "link", "device"):
        raises(
            OSError,
            "a pipe or a device, not a file",
            read_at_most,
            tmp_path / name,
            100,
        )


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    rename = Path.rename

    def fail(path, to):
        if (path / "file").read_text() == "new":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with (
            pytest.raises(InputError, match="target: cannot be written"),
            whole_folder(target) as folder,
        ):
            (folder / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    link = tmp_path / "link"
    link.symlink_to(target)  # which stays
    with whole_folder(link) as folder:
        (folder / "file").write_text("new")
        assert (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new"
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, target]


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None)],
)
def test_a_containers_quota_bounds_the_processors(
    quota, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "_CPU_QUOTA", tmp_path / "cpu.max")
    assert machine.processors() == 8
    (tmp_path / "cpu.max").write_text(quota)
    assert machine.processors() == (expected or 8)

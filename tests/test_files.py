from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.files import TooLarge, flush, read_at_most, write_whole


def test_a_file_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "made" / "name.txt"
    write_whole(path, "é\nfirst")
    assert path.read_bytes() == "é\nfirst".encode()
    write_whole(path, b"\x00second")
    assert path.read_bytes() == b"\x00second" and list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_one_line_and_leaves_what_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(InputError, match=r"file/x: cannot be written \(") as caught:
        write_whole(tmp_path / "file" / "x", "text")
    assert "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"^no luck \("):
        write_whole(tmp_path / "folder", "text", "no luck")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("size", [0, 1, 70_000, 200_000])
def test_a_file_is_read_whole_or_not_at_all(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)) * (size // 100) or bytes(size))
    assert read_at_most(path, path.stat().st_size) == path.read_bytes()
    if size:
        with pytest.raises(TooLarge) as caught:
            read_at_most(str(path), path.stat().st_size - 1)
        assert caught.value.size == path.stat().st_size


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no files of unknown length here")
def test_a_file_of_unknown_length_is_read_up_to_the_limit() -> None:
    path = Path("/proc/self/maps")
    assert path.stat().st_size == 0 and read_at_most(path, 1 << 24).count(b"\n") > 10
    with pytest.raises(TooLarge):
        read_at_most(path, 10)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_no_pipe_and_no_device_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "link", "device"):
        with pytest.raises(OSError, match="a pipe or a device, not a file"):
            read_at_most(tmp_path / name, 100)
    with pytest.raises(IsADirectoryError):
        read_at_most(tmp_path, 100)


def test_every_file_and_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/er/c"):
        (tmp_path / name).write_text("x")
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    flush(tmp_path)
    assert flushed == {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}

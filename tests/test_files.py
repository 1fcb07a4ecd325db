from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.files import TooLarge, flush, read_at_most, whole_folder, write_whole


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


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder_with(tmp_path / "target", "old")
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if (path / "file").read_text() == "new":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(InputError, match="target: cannot be written"), whole_folder(target) as folder:
            (folder / "file").write_text("new")
    assert (target / "file").read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with whole_folder(target) as folder:
        (folder / "file").write_text("new")
        assert (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_link_s_folder_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link, new = folder_with(tmp_path / "real" / "a", "old"), tmp_path / "link", tmp_path / "new"
    link.symlink_to(real)
    new.symlink_to("real/b")  # nothing is there yet
    for target in (link, new):
        with whole_folder(target) as folder:
            (folder / "file").write_text("new")
        assert target.is_symlink() and (target / "file").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["a", "b"]


def test_a_file_is_no_folder_to_replace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(InputError, match="file: cannot be written"), whole_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "here" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_replaced_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder_with(tmp_path / "place", "old")
    (place / "deep").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "place")
    with pytest.raises(InputError, match="place: a file system is mounted here"), whole_folder(place):
        pytest.fail("work was done")
    monkeypatch.undo()
    monkeypatch.chdir(place / "deep")
    for target in (Path(), Path(".."), place):
        with pytest.raises(InputError, match="is where you are"), whole_folder(target):
            pytest.fail("work was done")
    assert (place / "file").read_text() == "old"

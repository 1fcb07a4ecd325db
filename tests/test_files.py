from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.files import read_at_most, whole_folder, write_whole


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

"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.files import read_at_most, whole_folder, write_whole


def test_a_file_is_whole_or_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "made" / "name.txt"
    write_whole(path, "é\nfirst")
    assert path.read_bytes() == "é\nfirst".encode()
    write_whole(path, b"\x00second")
    for target, said in ((path / "x", r"name.txt/x: cannot be written \("), (path.parent, r"made: cannot be written")):
        with pytest.raises(InputError, match=said) as caught:
            write_whole(target, "text")
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"\x00second" and list(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_no_pipe_and_no_device_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "link", "device"):
        with pytest.raises(OSError, match="a pipe or a device, not a file"):
            read_at_most(tmp_path / name, 100)


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
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
    link = tmp_path / "link"
    link.symlink_to(target)  # which stays
    with whole_folder(link) as folder:
        (folder / "file").write_text("new")
        assert (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new" and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, target]

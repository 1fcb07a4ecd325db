from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.files import flush, write_whole


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


def test_every_file_and_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/er/c"):
        (tmp_path / name).write_text("x")
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    flush(tmp_path)
    assert flushed == {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}

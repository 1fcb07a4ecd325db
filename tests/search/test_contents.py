"""A vector belongs to bytes: what happens to paths costs a hash, never an embedding."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from index_fakes import FakeEncoder, options, write_noise

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.store import KEPT_DAYS
from make import encoded, noise_image
from search_colours import loads, write_pictures
from support import run_cloob

DAY = 86_400


def names(index):
    return sorted(Path(item.path).name for item in index.items(index.store.ids()))


def test_a_renamed_folder_of_1000_pictures_is_up_to_date_with_none_embedded(tmp_path):
    """Nor are they when they come back after they were removed."""
    folder = tmp_path / "old"
    encoder = FakeEncoder()
    folder.mkdir()
    base = encoded(noise_image(0))
    for number in range(1000):  # after the end of a PNG anything may stand
        (folder / f"{number}.png").write_bytes(base + number.to_bytes(4, "big"))
    with Index.create(tmp_path / "idx") as index:
        assert index.update([folder], options(encoder)).embedded == 1000
        new = folder.rename(tmp_path / "new")
        done = index.update([new], options(encoder))
        assert done.added == 1000
        assert done.embedded == 0
        assert encoder.seen == 1000
        assert index.update([], options(encoder, remove_all=True)).removed == 1000
        assert index.update([], options(encoder)).unchanged == len(index) == 1000
        new.rename(tmp_path / "away")
        index.update([], options(encoder, remove_all=True))
        assert len(index) == 0
        (tmp_path / "away").rename(new)
        assert index.update([new], options(encoder)).added == 1000
        assert encoder.seen == 1000


def test_a_search_knows_each_path_of_equal_files(tmp_path, index):
    folder = tmp_path / "p"
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", 1)):
        write_noise(folder / f"{name}.png", seed)
    assert index.update([folder], options(FakeEncoder())).embedded == 2
    (row,) = index.store.vectors(index.store.ids_of(str(folder / "b.png")))
    hits = index.search(row, top=2).hits
    found = [Path(hit.item.path).name for hit in hits]
    assert found == ["a.png", "b.png"]
    hits = index.search(row, top=3, where="name != 'a.png'").hits
    assert [Path(hit.item.path).name for hit in hits] == ["b.png", "d.png", "c.png"]
    assert index.search(row, top=9).searched == 4


def test_prune_forgets_what_no_path_has_named_for_30_days(tmp_path, index):
    folder = tmp_path / "p"
    encoder = FakeEncoder()
    for seed in range(3):
        write_noise(folder / f"{seed}.png", seed)
    index.update([folder], options(encoder))
    (folder / "0.png").rename(tmp_path / "0.png")
    (folder / "1.png").rename(folder / "renamed.png")
    index.update([folder], options(encoder))
    assert index.store.prune() == 0
    assert index.store.prune(time.time() + (KEPT_DAYS - 1) * DAY) == 0
    assert index.store.prune(time.time() + (KEPT_DAYS + 1) * DAY) == 1
    (tmp_path / "0.png").rename(folder / "0.png")
    done = index.update([folder], options(encoder))
    assert done.added == 1
    assert done.embedded == 1
    assert index.store.prune(time.time() + (KEPT_DAYS + 1) * DAY) == 0
    assert index.search(encoder.rows([noise_image(0)])[0], top=1).searched == 3


def test_the_command_prunes(tmp_path, capsys, monkeypatch):
    loads(monkeypatch)
    pictures = write_pictures(tmp_path / "p", n=1)
    words = f"index {pictures} --model m --out {tmp_path}/idx"
    run_cloob(words)
    (pictures / "red-0.png").unlink()
    run_cloob(f"{words} --prune")
    assert "forgotten: 0 contents that no path names" in capsys.readouterr().err
    later = time.time() + 40 * DAY
    monkeypatch.setattr("time.time", lambda: later)
    run_cloob(f"{words} --prune")
    assert "forgotten: 1 content that no path names" in capsys.readouterr().err


def test_a_folder_that_held_pictures_and_is_empty_is_kept_and_said(tmp_path, index):
    folder = tmp_path / "p"
    encoder = FakeEncoder()
    for seed, name in enumerate(("usb/2020/a.png", "usb/b.png", "sub/c.png", "d.png")):
        write_noise(folder / name, seed)
    index.update([folder], options(encoder))
    shutil.rmtree(folder / "usb")
    (folder / "usb").mkdir()  # as after umount
    shutil.rmtree(folder / "sub")  # that is gone
    for removed in (1, 0):
        done = index.update([folder], options(encoder))
        assert done.removed == removed
        assert done.unread == 2
        (reason,) = done.left_out.counts
        assert "kept" in reason
        assert names(index) == ["a.png", "b.png", "d.png"]
    assert index.update([folder], options(encoder, remove_all=True)).removed == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_another_disk_in_the_place_of_one_keeps_its_pictures(tmp_path, index):
    folder = tmp_path / "p"
    encoder = FakeEncoder()
    write_noise(folder / "usb" / "a.png", 1)
    write_noise(folder / "b.png", 2)
    write_noise(tmp_path / "other" / "c.png", 3)
    index.update([folder], options(encoder))
    mount = ["mount", "-t", "tmpfs", "none", str(folder / "usb")]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        shutil.copy(tmp_path / "other" / "c.png", folder / "usb")
        done = index.update([folder], options(encoder))
    finally:
        subprocess.run(["umount", mount[-1]], check=True)
    assert done.added == 1
    assert done.removed == 0
    assert names(index) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("seconds", [-(10**9), 0, 32_503_680_000, 2**55])
def test_a_file_of_any_year(tmp_path, index, seconds):
    path = write_noise(tmp_path / "p" / "a.png", 1)
    encoder = FakeEncoder()
    try:
        os.utime(path, (seconds, seconds))
    except OSError:
        pytest.skip("this file system has no such time")
    assert index.update([path.parent], options(encoder)).added == 1
    assert index.update([path.parent], options(encoder)).unchanged == 1
    path.with_suffix(".txt").write_text("a caption")
    os.utime(path.with_suffix(".txt"), (seconds, seconds))
    assert index.update([path.parent], options(encoder)).described == 1


def test_find_says_why_a_folder_is_left_out(tmp_path, capsys, monkeypatch):
    loads(monkeypatch)
    pictures = write_pictures(tmp_path / "p", n=1)
    (pictures / "bad.png").write_bytes(b"nope")
    listdir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    (pictures / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    for _ in range(2):
        run_cloob(f"find {pictures} red --model m", code=1)
        err = capsys.readouterr().err
        assert "1 × folder cannot be listed" in err
        assert "1 × corrupt image" in err


def test_an_index_elsewhere_with_a_base_and_one_in_its_source(tmp_path):
    """The one in its source may move with it; the other names where it looks."""
    encoder = FakeEncoder()
    write_noise(tmp_path / "p" / "sub" / "a.png", 1)
    for place in (tmp_path / "p" / ".cloob", tmp_path / "idx"):
        with Index.create(place) as index:
            index.update([tmp_path / "p"], options(encoder))
    (tmp_path / "p").rename(tmp_path / "q")
    with Index.open(tmp_path / "q" / ".cloob", writable=True) as index:
        assert index.store.sources() == (str(tmp_path / "q"),)
        assert index.update([], options(encoder)).unchanged == 1
        (found,) = index.items(index.store.ids())
        assert found.path == str(tmp_path / "q" / "sub" / "a.png")
        where = f"path = '{found.path}' and source = '{tmp_path / 'q'}'"
        assert index.store.ids(index.filter(where)).tolist() == [found.id]
    with Index.open(tmp_path / "idx", writable=True) as index:
        assert index.store.sources() == (str(tmp_path / "p"),)
        assert index.update([], options(encoder)).refused
        with pytest.raises(InputError, match="no such file"):
            index.update([tmp_path / "p2"], options(encoder))

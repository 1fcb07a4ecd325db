"""An index lives with its folder: it is moved, linked, aged and damaged, and two work on it at once."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from index_fakes import item, units

from cloob import cli
from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.records import INDEX_FILE, Busy, IndexedModel
from search_colours import loads, make_index, write_pictures
from support import refused


@pytest.fixture
def find(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], str]]:
    """Runs a command and gives the paths that it prints, and what else it says."""
    loads(monkeypatch)

    def run(*words: object) -> tuple[list[str], str]:
        assert cli.main([*map(str, words), "--paths"]) == 0
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


def test_a_folder_that_is_moved_or_linked_keeps_its_index(
    tmp_path: Path, find: Callable[..., tuple[list[str], str]]
) -> None:
    old, new = write_pictures(tmp_path / "old", n=2), tmp_path / "new ü{0}'s"
    assert len(find("find", old, "red", "--model", "m")[0]) == 2
    old.rename(new)
    (tmp_path / "link").symlink_to(new)
    for folder in (new, tmp_path / "link"):
        wanted = [f"{folder}/red-{number}.png" for number in range(2)]
        found, err = find("find", folder, "red")
        assert sorted(found) == wanted and "16 as they were; 0 embedded" in err
        assert sorted(find("search", folder / ".cloob", "red")[0]) == wanted
        quoted = str(folder).replace("'", "''")
        where = f"path like '{quoted}/red%' and source = '{quoted}' and name = 'red-1.png'"
        assert find("search", folder, "--where", where)[0] == wanted[1:]
        assert find("search", folder, "--like", wanted[0], "--top", 1)[0] == wanted[1:]
    (new / "red-0.png").unlink()
    assert find("find", new, "red")[0] == [f"{new}/red-1.png"]


def test_a_folder_of_an_index_that_lies_elsewhere(
    tmp_path: Path, find: Callable[..., tuple[list[str], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    index, old, new = tmp_path / "idx", tmp_path / "disk" / "photos", tmp_path / "mnt"
    make_index(index, write_pictures(old, n=1))
    (tmp_path / "disk").rename(new)
    words = ("index", "--out", str(index), "--moved", str(tmp_path / "disk"))
    assert "is in" in refused(capsys, *words, str(tmp_path / "disk" / "photos"))
    assert cli.main([*words, str(new)]) == 0
    assert "8 as they were; 0 embedded" in capsys.readouterr().out
    assert find("search", index, "red")[0] == [str(new / "photos" / "red-0.png")]
    assert "holds no source" in refused(capsys, *words, str(new))


def test_a_damaged_index_says_what_is_still_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Index.create(tmp_path / "idx") as index:
        index.store.add_model(IndexedModel("m", "m", "f" * 32, 512))
        items = [item(f"{number}.png", str(number)) for number in range(400)]
        index.store.write(items, "m", units(400, 512))
    file = tmp_path / "idx" / INDEX_FILE
    whole = file.read_bytes()
    for damaged, said in ((whole[: len(whole) // 2], "400 pictures and"), (b"x" * 9999, "is damaged; delete it")):
        file.write_bytes(damaged)
        for suffix in ("-wal", "-shm"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        with pytest.raises(InputError, match="is damaged") as caught, Index.open(tmp_path / "idx") as index:
            index.store.vectors("m", index.store.ids())
        assert said in str(caught.value) and "--anew" in str(caught.value)
    with sqlite3.connect(file := tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE t (a)")
    other.close()
    (tmp_path / "no").mkdir()
    shutil.copy(file, tmp_path / "no" / INDEX_FILE)
    with pytest.raises(InputError, match="is no index of cloob's"):
        Index.open(tmp_path / "no")


def test_two_updates_at_once_and_a_search(tmp_path: Path, find: Callable[..., tuple[list[str], str]]) -> None:
    pictures = write_pictures(tmp_path / "p", n=1)
    find("find", pictures, "red", "--model", "m")
    with Index.open(pictures / ".cloob", writable=True) as index, index.store.exclusive():
        with Index.open(pictures / ".cloob", writable=True) as other, pytest.raises(Busy, match="is at work"):
            other.update([])  # as in a notebook
        found, err = find("find", pictures, "red")
        assert found == [str(pictures / "red-0.png")] and "searched is what it has done so far" in err

"""An index in the hands of people: moved, linked, aged, damaged, exported,
shared, and a stranger's.
"""

import json
import shlex
import shutil
import sqlite3
from pathlib import Path

import pytest
from index_fakes import FakeEncoder, item, options, units, write, write_noise
from PIL import Image
from pyarrow import parquet

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.records import INDEX_FILE, Busy
from cloob.search.update import UpdateOptions
from make import web
from search_colours import loads, write_pictures
from support import run_cloob, use_hub


@pytest.fixture
def find(capsys, monkeypatch):
    """Runs a command and gives the paths that it prints, and what else it says."""
    loads(monkeypatch)

    def run(*words):
        run_cloob([*map(str, words), "--paths"])
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


def test_a_folder_that_is_moved_or_linked_keeps_its_index(tmp_path, find):
    old = write_pictures(tmp_path / "old", n=2)
    new = tmp_path / "new ü{0}'s"
    assert len(find("find", old, "red", "--model", "m")[0]) == 2
    old.rename(new)
    (tmp_path / "link").symlink_to(new)
    for folder in (new, tmp_path / "link"):
        wanted = [f"{folder}/red-{number}.png" for number in range(2)]
        found, err = find("find", folder, "red")
        assert sorted(found) == wanted
        assert "16 as they were; 0 embedded" in err
        assert sorted(find("search", folder / ".cloob", "red")[0]) == wanted
        quoted = str(folder).replace("'", "''")
        where = (
            f"path like '{quoted}/red%' and source = '{quoted}' and name = 'red-1.png'"
        )
        assert find("search", folder, "--where", where)[0] == wanted[1:]
        between = (
            f"path >= '{quoted}/red-1' and path < '{quoted}/red-2' and not path in"
            f" ('{quoted}/red-0.png')"
        )
        assert find("search", folder, "--where", between)[0] == wanted[1:]
        assert find("search", folder, "--like", wanted[0], "--top", 1)[0] == wanted[1:]
    (new / "red-0.png").unlink()
    assert find("find", new, "red")[0] == [f"{new}/red-1.png"]


def test_a_damaged_index_names_the_command_that_mends_it(tmp_path):
    place = write_pictures(tmp_path / "my pictures", n=1) / ".cloob"
    with Index.create(place) as index:
        index.update([place.parent], options(FakeEncoder()))
        items = [item(f"{number}.png", str(number)) for number in range(4000)]
        write(index.store, items, index.model(), units(4000, 16))
    file = place / INDEX_FILE
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"x" * 9999):
        file.write_bytes(damaged)
        for suffix in ("-wal", "-shm"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        with (
            pytest.raises(InputError, match="is damaged") as caught,
            Index.open(place) as index,
        ):
            index.items(index.store.ids())
        said = shlex.split(str(caught.value).partition("make it again: ")[2])
        assert said[-3:] == ["--out", str(place), "--anew"]
    with sqlite3.connect(file := tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE t (a)")
    other.close()
    (tmp_path / "no").mkdir()
    shutil.copy(file, tmp_path / "no" / INDEX_FILE)
    with pytest.raises(InputError, match="is no index of cloob's"):
        Index.open(tmp_path / "no")


def test_two_updates_at_once_and_a_search(tmp_path, find):
    pictures = write_pictures(tmp_path / "p", n=1)
    find("find", pictures, "red", "--model", "m")
    with (
        Index.open(pictures / ".cloob", writable=True) as index,
        index.store.exclusive(),
    ):
        with (
            Index.open(pictures / ".cloob", writable=True) as other,
            pytest.raises(Busy, match="is at work"),
        ):
            other.update([])  # as in a notebook
        found, err = find("find", pictures, "red")
        assert found == [str(pictures / "red-0.png")]
        assert "searched is what it has done so far" in err


# What an index names as its model is fetched only where it was typed on this machine,
# or is of a fixed list.
TRACKER = "hf-hub:evil/tracker"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has nothing; nothing was typed or fetched."""
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    with web() as server:
        use_hub(monkeypatch, server.url, tmp_path / "hub")
        yield server


def theirs(folder, spec):
    """An index of somebody else, who names this model."""
    write_noise(folder / "pictures" / "a.png", 1)
    with Index.create(folder / "index") as index:
        index.update([folder / "pictures"], options(FakeEncoder()))
    with sqlite3.connect(folder / "index" / "index.sqlite") as file:
        file.execute("UPDATE cloob_model SET spec = ?", [spec])
    file.close()
    return folder / "index"


UNTYPED = r"so it is not fetched; .* type it once: cloob index --out INDEX --model"


def use(place, spec=None):
    """Has the model loaded, typed or not."""
    with Index.open(place, writable=True) as index:
        write_noise(place.parent / "pictures" / "new.png", 2)
        index.update([], UpdateOptions(model=spec))


def test_a_model_of_the_hub_is_not_fetched_for_the_index_alone(tmp_path, hub):
    place = theirs(tmp_path, TRACKER)
    with pytest.raises(InputError, match=f"{UNTYPED} {TRACKER}$"):
        use(place)
    assert not hub.asked
    for typed in (TRACKER, None):  # which is remembered
        with pytest.raises(InputError, match="tracker"):
            use(place, typed)
        assert hub.asked
        hub.asked.clear()


def test_a_folder_that_names_an_encoder_of_the_hub_takes_it_from_the_cache_alone(
    tmp_path, hub
):
    folder = tmp_path / "model"
    folder.mkdir()
    head = {"features": 2, "embed_dim": 2, "kind": "linear", "dropout": 0.0}
    content = {
        "format": 1,
        "image_size": 32,
        "image_encoder": TRACKER,
        "text_encoder": TRACKER,
        "heads": {"image": head, "text": head},
        "probe": {"image": [1.0], "text": [1.0]},
    }
    (folder / "aligned.json").write_text(json.dumps(content))
    place = theirs(tmp_path, str(folder))
    with pytest.raises(InputError, match=UNTYPED):
        use(place)
    assert not hub.asked
    with pytest.raises(InputError, match="tracker"):
        use(place, str(folder))
    assert hub.asked


def test_an_export_has_the_columns_of_the_source(tmp_path):
    rows = [
        {
            "filepath": "a.png",
            "year": 2020,
            "id": 2**60,
            "column_id": "x",
            "score": 1,
            "mixed": True,
            "new": False,
        },
        {
            "filepath": "b.png",
            "year": 2021,
            "id": 7,
            "column_id": "y",
            "score": 0.5,
            "mixed": "no",
        },
    ]
    for row, colour in zip(rows, ("red", "blue"), strict=True):
        Image.new("RGB", (7, 5), colour).save(tmp_path / row["filepath"])
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with Index.create(tmp_path / "index") as index:
        index.update([tmp_path / "t.jsonl"], options(FakeEncoder()))
        assert index.export(tmp_path / "all.parquet") == 2
        assert index.export(tmp_path / "some.parquet", where="year > 2020") == 1
    table = parquet.read_table(tmp_path / "all.parquet")
    types = {
        "column_id": "string",
        "column_column_id": "int64",
        "mixed": "string",
        "new": "bool",
        "score": "double",
    }
    found = {
        name: str(table.schema.field(name).type) for name in table.column_names[9:]
    }
    assert found == types | {"year": "int64"}
    found = table.to_pydict()
    cells = {
        "id": [1, 2],
        "column_column_id": [2**60, 7],
        "column_id": ["x", "y"],
        "score": [1.0, 0.5],
        "new": [False, None],
        "year": [2020, 2021],
        "mixed": ["true", "no"],
    }
    assert {name: found[name] for name in cells} == cells
    assert "new" not in parquet.read_table(tmp_path / "some.parquet").column_names

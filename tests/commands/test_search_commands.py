"""``cloob search``, ``cloob classify`` and ``cloob embed`` as a user runs them, with a
model that knows colours.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cloob.search.index import Index
from make import picture
from search_colours import loads, make_index, write_pictures
from support import run_cloob


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``pictures`` and ``index``."""
    folder = tmp_path_factory.mktemp("searched")
    make_index(folder / "index", write_pictures(folder / "pictures"))
    return folder


@pytest.fixture(autouse=True)
def colour_model(monkeypatch):
    """Whatever model is asked for knows colours, and each name is one of a model."""
    loads(monkeypatch)
    for variable in ("CLOOB_CACHE", "CLOOB_CACHE_BYTES"):  # put back at the end
        monkeypatch.setenv(variable, os.environ.get(variable, ""))


def run(capsys, words):
    """What a command prints, and what it says beside."""
    run_cloob(words)
    out, err = capsys.readouterr()
    return out, err


def test_lines_json_and_paths(place, capsys):
    index = place / "index"
    out, err = run(capsys, f"search {index} 'a red thing'")
    lines = [line.split("\t") for line in out.splitlines()]
    assert err == "cloob: loading colours …\n"
    assert len(lines) == 4
    for score, margin, id_, path, caption in lines:
        assert float(score) > 0.9
        assert float(margin) > 3
        assert int(id_) > 0
        assert Path(path).stem.startswith("red-")
        assert caption.startswith("red number")
    found = json.loads(run(capsys, f"search {index} red --json --top 2")[0])
    assert found["query"] == ["red"]
    assert found["searched"] == 32
    assert found["cut"] == 0
    assert found["model"] == "colours"
    expected = [line[3] for line in lines[:2]]
    assert [hit["path"] for hit in found["hits"]] == expected
    keys = "id score margin caption width columns date"
    assert found["hits"][0].keys() >= {*keys.split()}
    out, _ = run(capsys, f"search {index} red --paths")
    assert out.splitlines() == [line[3] for line in lines]
    out, _ = run(capsys, f"search {index} ~root --cutoff none --json")
    found = json.loads(out)
    assert found["query"] == ["~root"]
    assert len(found["hits"]) == 20  # words


def test_classify_an_index_and_a_folder_alike(place, tmp_path, capsys, monkeypatch):
    strict = "--json --none --cutoff 3"
    of_index, err = run(capsys, f"classify {place}/index --labels 'red, blue' {strict}")
    assert "red 4" in err
    assert "none of these 24" in err
    assert "stores no temperature" in err
    words = f"classify {place}/pictures --labels red,blue --model colours {strict}"
    of_folder, _ = run(capsys, words)
    rows = [json.loads(line) for line in of_index.splitlines()]
    wanted = [json.loads(line)["labels"] for line in of_folder.splitlines()]
    assert [row["labels"] for row in rows] == wanted
    for row in rows:
        name = Path(row["path"]).stem.split("-")[0]
        labels = [entry["label"] for entry in row["labels"]]
        assert labels == ([name] if name in ("red", "blue") else [])
    monkeypatch.chdir(tmp_path)
    # a file only where it is written with a slash
    Path("blue").write_text("# colours\nred\n\ngreen\n")
    for text, expected in (("red,blue", {"red", "blue"}), ("./blue", {"red", "green"})):
        out, _ = run(capsys, f"classify {place}/index --labels {text} --json")
        rows = map(json.loads, out.splitlines())
        found = [entry["label"] for row in rows for entry in row["labels"]]
        assert len(found) == 32
        assert set(found) == expected


def test_the_paths_of_a_label_are_a_list(place, capsys):
    words = f"classify {place}/index --labels red,blue --none --cutoff 3"
    out, err = run(capsys, f"{words} --paths blue")
    pictures = place / "pictures"
    expected = [str(pictures / f"blue-{i}.png") for i in range(4)]
    assert sorted(out.splitlines()) == expected
    assert "red 4, blue 4, none of these 24" in err
    out, _ = run(capsys, f"{words} --paths 'none of these'")
    assert out.count("\n") == 24


def test_embed_writes_the_same_rows_in_two_forms(place, tmp_path, capsys, monkeypatch):
    from pyarrow import parquet

    pictures = tmp_path / "pictures"
    write_pictures(pictures, n=1)
    (pictures / "cut.png").write_bytes(picture("red")[:50])
    (pictures / "red-0.txt").write_text("long " * 10_000)
    for suffix in ("npz", "parquet"):
        out = tmp_path / f"vectors.{suffix}"
        run_cloob(f"embed {pictures} --model colours --out {out}", code=1)
        err = capsys.readouterr().err
        assert "1 × corrupt image: " in err
        assert "8 pictures, 1 could not be read" in err
    with np.load(tmp_path / "vectors.npz", allow_pickle=False) as file:
        vectors = file["vectors"]
        paths = json.loads(file["paths"].item())
        captions = json.loads(file["captions"].item())
    assert vectors.dtype == np.float32
    assert vectors.shape == (8, 24)
    assert len(paths) == 8
    expected = [
        (pictures / path).with_suffix(".txt").read_text().strip() for path in paths
    ]
    assert captions == expected
    # no caption is padded to the longest
    assert (tmp_path / "vectors.npz").stat().st_size < 60_000
    table = parquet.read_table(tmp_path / "vectors.parquet").to_pydict()
    np.testing.assert_allclose(np.array(table["vector"]), vectors, atol=1e-6)
    assert table["path"] == paths
    loads(monkeypatch, None)  # no model is loaded
    _, err = run(capsys, f"embed {place}/index --out {tmp_path}/of-index.npz")
    assert "32 pictures" in err


def test_what_strangers_wrote_does_not_command_the_terminal(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "red\x1b]0;title\x07\u202e.png").write_bytes(picture("red"))
    (pictures / "red\x1b]0;title\x07\u202e.txt").write_text("red \x1b[2J\u2066 caption")
    index = make_index(tmp_path / "index", pictures)
    out, _ = run(capsys, f"search {index} red")
    assert "\x1b" not in out
    assert "\u202e" not in out
    out, _ = run(capsys, f"classify {index} --labels red,blue")
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_a_single_picture(place, tmp_path, capsys):
    (tmp_path / "link.png").symlink_to(place / "pictures" / "red-0.png")
    for path in (place / "pictures" / "red-0.png", tmp_path / "link.png"):
        words = f"classify {path} --labels red,blue --model colours --json"
        found = json.loads(run(capsys, words)[0])
        assert found["path"] == str(path)
        assert found["labels"][0]["label"] == "red"
        run(capsys, f"embed {path} --model colours --overwrite --out {tmp_path}/v.npz")
        with np.load(tmp_path / "v.npz") as file:
            assert file["vectors"].shape == (1, 24)
            expected = ["red number 0" if path.name == "red-0.png" else ""]
            assert json.loads(file["captions"].item()) == expected


def test_find_indexes_what_is_new_and_answers(tmp_path, capsys, monkeypatch):
    pictures = write_pictures(tmp_path / "pictures", n=1)
    out, err = run(capsys, f"find {pictures} 'a red thing' --json")
    found = [Path(hit["path"]).name for hit in json.loads(out)["hits"]]
    assert found == ["red-0.png"]
    assert "605 MB, fetched once" in err
    assert f"{pictures / '.cloob'}: 8 pictures" in err
    (pictures / "more").mkdir()
    (pictures / "more" / "red.png").write_bytes(picture((250, 0, 0)))
    out, err = run(capsys, f"find {pictures} 'a red thing'")
    assert len(out.splitlines()) == 2
    assert "1 added, 8 as they were" in err
    assert "605" not in err
    with Index.open(pictures / ".cloob") as index:
        assert index.model().name == "ViT-B-32-256/datacomp_s34b_b86k"


def test_find_in_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    """The index that lies in it is used; else one in the cache, which the other
    commands find too.
    """
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    there, bare = (write_pictures(tmp_path / name, n=1) for name in ("there", "bare"))
    run(capsys, f"find {there} red")
    monkeypatch.setattr("os.access", lambda path, _: "cache" in str(path))
    (there / "new.png").write_bytes(picture((250, 0, 0)))
    out, err = run(capsys, f"find {there} red")
    assert "cannot be written, so what is new since is not in it" in err
    assert out.count(f"{there}/red") == 1
    _, err = run(capsys, f"find {bare} red")
    assert f"{tmp_path}/cache/photos/bare-" in err
    for words in ("red", "--where \"name like 'red%'\""):
        out, _ = run(capsys, f"search {bare} {words}")
        assert str(bare / "red-0.png") in out


def test_the_newest_pictures_that_a_filter_lets_through(place, capsys):
    words = f"search {place}/index --where \"caption like 'red%'\""
    out, err = run(capsys, f"{words} --top 3")
    assert out.count("\n") == 3
    assert "3 of 4 pictures, the newest" in err
    found = json.loads(run(capsys, f"{words} --json")[0])
    assert found["searched"] == 4
    assert {hit["caption"][:3] for hit in found["hits"]} == {"red"}
    out, _ = run(capsys, f"{words} --paths")
    assert [hit["path"] for hit in found["hits"]] == out.splitlines()

"""Rows of vectors with labels through ``cloob index`` and ``cloob search``; a plain
loop says what is right.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from starlette.testclient import TestClient

import cloob
from cloob import cli
from cloob.serve.app import make_app
from cloob.serve.collection import ServeConfig

NAMES = [f"m{row:02}" for row in range(60)]  # the labels of the rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder: two kinds of rows, ``a.npy`` and ``b.npy``, ``names.txt``,
    and a model of them, ``heads``.
    """
    monkeypatch.chdir(tmp_path)
    cause = np.random.default_rng(0).normal(size=(len(NAMES), 4))
    a, b = (
        cause @ np.ones((4, 6)) + cause[:, :1],
        np.tanh(cause @ np.arange(40).reshape(4, 10) / 40),
    )
    np.save("a.npy", np.concatenate([a, cause], axis=1).astype(np.float16))
    np.save("b.npy", b)
    Path("names.txt").write_text("\n".join(NAMES))
    settings = {
        "n_components": 8,
        "epochs": 2,
        "validation_fraction": 0,
        "random_state": 0,
        "device": "cpu",
    }
    cloob.ContrastiveHeads("infoloob", **settings).fit(np.load("a.npy"), b).save(
        "heads"
    )
    return tmp_path


def run(capsys, words, code=0):
    """The lines of a command, and what it says on stderr."""
    assert cli.main(words.split()) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return out.splitlines(), err


def by_loop(queries, top, names=NAMES):
    """Row, score and label of what is nearest; ``queries`` are unit rows."""
    library = cloob.load_model("heads").encode_b(np.load("b.npy")).numpy()
    found = []
    for row, query in enumerate(queries):
        scored = sorted(
            (-float(library[place] @ query), place)
            for place, name in enumerate(NAMES)
            if name in names
        )
        found += [[row, -score, NAMES[place]] for score, place in scored[:top]]
    return found


def test_what_is_nearest_is_what_a_loop_finds(place, capsys):
    out, err = run(
        capsys, "index --b b.npy --labels names.txt --model heads --out rows.idx"
    )
    assert (
        len(out) == 1
        and out[0].startswith("rows.idx: 60 rows, heads; 60 added; 60 embedded in ")
        and not err
    )
    heads = cloob.load_model("heads")
    few = [f"'{name}'" for name in NAMES[:9]]
    for side, encode in (("a", heads.encode_a), ("b", heads.encode_b)):
        queries = encode(np.load(f"{side}.npy")[:5]).numpy()
        np.save("q.npy", np.load(f"{side}.npy")[:5])
        lines = [
            line.split("\t")
            for line in run(capsys, f"search rows.idx --{side} q.npy --top 7")[0]
        ]
        wanted = by_loop(queries, 7)
        assert [(int(row), label) for row, _, label in lines] == [
            (row, label) for row, _, label in wanted
        ]
        assert [float(score) for _, score, _ in lines] == pytest.approx(
            [score for _, score, _ in wanted], abs=1e-4
        )
        words = ["search", "rows.idx", f"--{side}", "q.npy", "--top", "3", "--json"]
        assert cli.main([*words, "--where", f"path in ({', '.join(few)})"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["model"] == "heads"
        labels = [label for *_, label in by_loop(queries, 3, NAMES[:9])]
        assert [hit["path"] for hits in found["rows"] for hit in hits] == labels
    labels = [label for *_, label in by_loop(queries[:1], 3)]
    with cloob.Index.open("rows.idx") as index:  # a row that was embedded elsewhere
        assert [hit.item.path for hit in index.search(queries[0], top=3).hits] == labels


def test_only_what_changed_is_embedded(place, capsys):
    run(capsys, "index --b b.npy --labels names.txt --model heads --out rows.idx")
    rows = np.load("b.npy")
    rows[3] += 1
    rows[4, 0] = np.nan
    np.savez("b.npz", rows=rows)
    again = "index --b b.npy --labels names.txt --out rows.idx"
    assert run(capsys, again)[0][0].startswith(
        "rows.idx: 60 rows, heads; 60 as they were; 0 embedded"
    )
    np.save("b.npy", rows[:50])
    Path("names.txt").write_text("\n".join(["new", *NAMES[1:50]]))
    for said in (
        "1 added, 1 changed, 11 removed, 47 as they were; 2 embedded",
        "49 as they were; 1 embedded",
    ):
        out, err = run(capsys, again)
        assert len(out) == 1 and out[0].startswith(f"rows.idx: 49 rows, heads; {said}")
        faults = "; cloob index --out rows.idx --faults lists those not read"
        assert err == f"cloob: left out: 1 × embedding not finite: {NAMES[4]}{faults}\n"
    assert run(capsys, "index --out rows.idx --faults")[0] == [
        f"{NAMES[4]}: embedding not finite"
    ]
    with cloob.Index.open("rows.idx") as index:
        items = {item.path: item.id for item in index.items(index.store.ids())}
        vectors = index.store.vectors(
            "heads", [items["new"], items[NAMES[3]], items[NAMES[9]]]
        )
    wanted = cloob.load_model("heads").encode_b(rows[[0, 3, 9]]).numpy()
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)

    # By the other head a row is another one. Another form is another source. What is
    # not finite is not searched for.
    assert "; 49 changed; 50 embedded" in run(capsys, again.replace("--b", "--a"))[0][0]
    assert "; 49 changed; 50 embedded" in run(capsys, again)[0][0]
    parquet.write_table(pa.table({"id": range(60)}), "ids.parquet")
    out, _ = run(capsys, "index --b b.npz:rows --labels ids.parquet:id --out rows.idx")
    assert out[0].startswith("rows.idx: 108 rows, heads; 59 added; ")
    out, err = run(capsys, "search rows.idx --b b.npy --top 1", code=1)
    assert [line.split("\t")[:2] for line in out] == [
        [str(row), "1.0000"] for row in range(50) if row != 4
    ]
    assert err == "cloob: b.npy: 1 row left out, as not finite: row 4 …\n"


def test_what_else_takes_an_index_takes_one_of_rows(place, capsys):
    run(capsys, "index --a a.npy --labels names.txt --model heads --out rows.idx")
    heads = cloob.load_model("heads")
    rows = heads.encode_a(np.load("a.npy")).numpy()
    order = np.argsort(-(rows @ rows[17]), kind="stable")[1:6]
    for like in (NAMES[17], "18"):  # a label, and an id
        out, err = run(capsys, f"search rows.idx --like {like} --top 5")
        assert [line.split("\t")[3] for line in out] == [
            NAMES[row] for row in order
        ] and not err
    Path("numbers.txt").write_text("".join(f"{60 - row}\n" for row in range(60)))
    run(capsys, "index --a a.npy --labels numbers.txt --model heads --out numbers.idx")
    out, _ = run(
        capsys, "search numbers.idx --like 43 --top 5"
    )  # a label that is another row's id
    assert [line.split("\t")[3] for line in out] == [str(60 - row) for row in order]
    weights = np.exp(8 * rows @ rows[17])
    found = json.loads(
        run(capsys, f"search rows.idx --like {NAMES[17]} --explain --json")[0][0]
    )
    assert found["pictures"][1]["path"] == NAMES[order[0]]
    assert found["pictures"][1]["weight"] == pytest.approx(
        weights[order[0]] / weights.sum(), rel=1e-3
    )
    assert (
        run(capsys, "embed rows.idx --out rows.npz")[1]
        == "cloob: rows.npz: 60 pictures\n"
    )
    stored = np.load("rows.npz")
    assert stored["paths"].tolist() == NAMES
    np.testing.assert_allclose(stored["vectors"], rows, atol=1e-6)
    assert (
        run(capsys, "index --merge rows.idx --out all.idx")[0][1]
        == "all.idx: 60 pictures, heads"
    )
    assert (
        run(capsys, "search all.idx --duplicates --exact")[1]
        == "cloob: no files are equal\n"
    )
    np.save("wide.npy", np.ones((60, 11)))
    for words, said in (
        (
            ["search", "rows.idx", "red"],
            "a model of vectors takes no pictures and texts, but rows: --a",
        ),
        (["search", "rows.idx", "--b", "wide.npy"], "not (60, 11)"),
        (
            ["search", "rows.idx", "--a", "a.npy", "--where", "path = 'z'"],
            "the filter lets none through",
        ),
        (["classify", "rows.idx", "--labels", "a,b"], "takes no pictures and texts"),
        (["index", "--out", "rows.idx"], "a.npy: expected a folder"),
    ):
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err
    with (
        cloob.Index.open("rows.idx") as index,
        TestClient(make_app(index, ServeConfig()), "http://localhost") as client,
    ):
        answer = client.post("/api/search", json={"parts": [{"words": "red"}]})
        assert (
            answer.status_code == 400
            and "takes no pictures and texts" in answer.json()["detail"]
        )
        assert (
            client.get("/api/items/18/similar?top=1").json()["hits"][0]["path"]
            == NAMES[order[0]]
        )

"""``cloob match``: every row of a against all rows of b."""

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet
from scipy import sparse

from cloob import ContrastiveHeads, load_model
from cloob.commands import match
from make import write_lines
from support import refused, run_cloob


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Heads, 7 rows for a and 40 for b, of which two are equal."""
    folder = tmp_path_factory.mktemp("match")
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 5)).astype(np.float32)
    b = (a @ rng.normal(size=(5, 6))).astype(np.float32)
    heads = ContrastiveHeads("clip", n_components=4, epochs=2, validation_fraction=0)
    heads.fit(a, b).save(folder / "heads")
    b[31] = b[4]
    np.save(folder / "a.npy", a[:7])
    np.save(folder / "b.npy", b[:40])
    write_lines(folder / "a.txt", [f"cell, {i}" for i in range(7)])
    write_lines(folder / "b.txt", [f"molecule {i}" for i in range(40)])
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def plain_scores():
    """Of all rows with all others, by a plain product."""
    encoder = load_model("heads", device="cpu").eval()
    a = encoder.encode_a(np.load("a.npy"))
    b = encoder.encode_b(np.load("b.npy"))
    return (a.double() @ b.double().T).numpy()


def expected(top):
    """Row numbers and cosines; of equal rows the earlier first."""
    scores = plain_scores()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(scores, order, 1)


def ranked(rows):
    """What a CSV says of them: the row of a, the rank, the row of b."""
    for a, best in enumerate(rows):
        for rank, b in enumerate(best, 1):
            yield a, rank, b


WORDS = "match heads --a a.npy --b b.npy --device cpu"


def lines_of(text, delimiter):
    """The lines of a CSV without its header: names and rank, and scores."""
    header, *lines = csv.reader(io.StringIO(text), delimiter=delimiter)
    assert header == ["a", "rank", "b", "score"]
    return [line[:3] for line in lines], [float(line[3]) for line in lines]


@pytest.mark.parametrize("size", [1, 3, 8192])
def test_lines_on_stdout(here, capsys, monkeypatch, size):
    monkeypatch.setattr(match, "N_BLOCK", size)
    monkeypatch.setattr(match, "N_QUERIES", size)
    run_cloob(f"{WORDS} --top 5")
    out, err = capsys.readouterr()
    names, found = lines_of(out, "\t")
    rows, scores = expected(5)
    assert names == [list(map(str, line)) for line in ranked(rows)]
    assert np.allclose(found, scores.ravel(), atol=2e-6)
    assert "7 rows of a, for each the nearest 5 of 40 rows of b" in err


def test_sparse_rows_are_matched_and_embedded_as_others(here, capsys):
    for name in "ab":
        rows = np.load(f"{name}.npy")
        sparse.save_npz(f"{name}.npz", sparse.csr_array(rows))

    def matched(ending):
        run_cloob(WORDS.replace(".npy", f".{ending}"))
        return capsys.readouterr().out

    def embedded(ending):
        run_cloob(f"embed heads --b b.{ending} --out rows-{ending}.npy --device cpu")
        return np.load(f"rows-{ending}.npy")

    assert matched("npz") == matched("npy")
    assert np.array_equal(embedded("npz"), embedded("npy"))


def test_files_with_ids(here):
    ids = "--a-ids a.txt --b-ids b.txt"
    for name in ("hits.csv", "hits.parquet"):
        run_cloob(f"{WORDS} {ids} --top 100 --out new/{name}")
    written = {path.name for path in (here / "new").iterdir()}
    assert written == {"hits.csv", "hits.parquet"}
    rows, scores = expected(100)  # all rows of b where there are fewer
    lines, found = lines_of(Path("new/hits.csv").read_text(encoding="utf-8"), ",")
    wanted = [(f"cell, {a}", rank, f"molecule {b}") for a, rank, b in ranked(rows)]
    assert lines == [list(map(str, line)) for line in wanted]
    table = parquet.read_table("new/hits.parquet").to_pydict()
    columns = (table[name] for name in ("a", "rank", "b"))
    assert list(zip(*columns, strict=True)) == wanted
    assert np.allclose(table["score"], scores.ravel(), atol=1e-6)
    assert np.allclose(found, scores.ravel(), atol=1e-6)


def test_row_numbers_in_parquet_are_integers(here):
    words = f"{WORDS} --top 1 --out n.parquet"
    run_cloob(words)
    found = parquet.read_table("n.parquet")["b"].to_pylist()
    rows, _ = expected(1)
    assert found == rows.ravel().tolist()
    run_cloob(f"{words} --overwrite")


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_row_that_is_not_finite_is_named_and_nothing_is_left(here, capsys, side):
    rows = np.load(f"{side}.npy")
    rows[5, 2] = np.nan
    np.save(f"bad-{side}.npy", rows)
    words = WORDS.replace(f" {side}.npy", f" bad-{side}.npy")
    before = sorted(here.iterdir())
    line = refused(capsys, f"{words} --out bad.csv")
    assert f"bad-{side}.npy: row 5 has numbers that are not finite" in line
    assert sorted(here.iterdir()) == before


IDS_A = ["x", "y", "x", "z", "y", "alone", "w"]
IDS_B = [f"{'xyzw'[i % 4]}" if i < 12 else f"other {i}" for i in range(40)]


def numbers_of_loops(ids_a, ids_b):
    """By key, the mean over ids of what a loop over scores and draws finds."""
    scores = plain_scores()
    by_id = {}
    for i, name in enumerate(ids_a):
        right = [j for j, other in enumerate(ids_b) if other == name]
        if not right:
            continue
        wrong = [j for j in range(len(ids_b)) if j not in right]
        best = max(scores[i, j] for j in right)
        ahead = {j for j in wrong if scores[i, j] >= best - 1e-6}
        rank = len(ahead)
        draws = itertools.combinations(wrong, 3)
        chosen = [ahead.isdisjoint(three) for three in draws]
        twentieth = math.ceil(0.05 * (len(wrong) + 1))
        row = {"a_to_b@1": rank < 1, "a_to_b@10": rank < 10}
        row["a_to_b_mrr"] = 1 / (rank + 1)
        row["a_to_b@5%"] = rank < twentieth
        row["a_to_b_choose_4"] = np.mean(chosen)
        row["chance@1"] = len(right) / len(ids_b)
        row["chance_choose_4"] = len(right) / (len(right) + 3)
        by_id.setdefault(name, []).append(row)
    of_ids = [pd.DataFrame(rows).mean() for rows in by_id.values()]
    return pd.DataFrame(of_ids).mean().to_dict()


@pytest.mark.parametrize("seed", [None, 0])
def test_true_pairs_are_judged_as_by_loops(here, capsys, seed):
    """Ids repeat on both sides, rows 4 and 31 of b are equal, a row of a is alone; a
    permutation of b changes nothing.
    """
    order = np.arange(40)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(40)
    np.save("turned.npy", np.load("b.npy")[order])
    write_lines(Path("ia.txt"), IDS_A)
    write_lines(Path("ib.txt"), [IDS_B[row] for row in order])
    words = WORDS.replace("b.npy", "turned.npy")
    ids = "--a-ids ia.txt --b-ids ib.txt"
    run_cloob(f"{words} {ids} --judge --json")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "1 of 7 rows of a have no partner" in err
    assert found["n"] == 6
    assert found["n_ids"] == 4
    for key, number in numbers_of_loops(IDS_A, IDS_B).items():
        assert found[key] == pytest.approx(number), key
        if not key.startswith("chance"):
            low, high = found[f"{key}_interval"]
            assert low <= found[key] <= high


def test_aligned_rows_are_judged_beside_the_hits(here, capsys):
    np.save("b7.npy", np.load("b.npy")[:7])
    words = WORDS.replace("b.npy", "b7.npy")
    run_cloob(f"{words} --judge --out seven.csv")
    out = capsys.readouterr().out
    assert "MRR" in out
    assert "recall@5%" in out
    assert "choose 1 of 4" in out
    assert "choose 1 of 10" not in out, "b has 7 rows"
    lines = Path("seven.csv").read_text().splitlines()
    assert len(lines) == 1 + 7 * 7
    assert "has 7 rows, b.npy has 40" in refused(capsys, f"{WORDS} --judge")
    Path("no.txt").write_text("?\n" * 40)
    ids = "--a-ids a.txt --b-ids no.txt"
    assert "no id of a is one of b" in refused(capsys, f"{WORDS} {ids} --judge")

"""``cloob train vectors``: two files to a run folder that other commands read."""

import csv
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from scipy import sparse
from views import pairs_of, views

import cloob
from cloob.data.vectors import open_vector_pairs
from cloob.errors import InputError
from cloob.heads import run as runs_of_heads
from cloob.heads.config import HeadsConfig
from cloob.heads.run import vector_pairs
from support import raises, read_json, read_lines, run_cloob

N = 400


def write_csv(table, file):
    table.to_csv(file, index=False)


def write_parquet(table, file):
    table.rename(columns=str).to_parquet(file, index=False)


# How a table of the rows is written in a form.
TABLES = {
    "{}.csv": write_csv,
    "{}-named.csv": lambda table, file: write_csv(table.add_prefix("1,2;"), file),
    "{}-bare.csv": lambda table, file: np.savetxt(file, table, delimiter=","),
    "{}.parquet": write_parquet,
    "{}-sparse.npz": lambda table, file: sparse.save_npz(file, sparse.csc_array(table)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two views of one hidden cause, four rows an id, with one bad row."""
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(N, 6))
    of_a = cause @ rng.normal(size=(6, 20))
    of_b = cause @ rng.normal(size=(6, 10))
    a = (of_a + 3).astype(np.float32)
    b = np.tanh(of_b / 2).astype(np.float16)
    a[7, 3] = np.nan
    np.save(folder / "a.npy", a)
    np.save(folder / "b.npy", b)
    np.savez(folder / "ab.npz", a=a, b=b)
    ids = [f"M{row // 4}" for row in range(N)]
    columns = {"a": a.tolist(), "b": b.astype(float).tolist(), "id": ids}
    parquet.write_table(pa.table(columns), folder / "ab.parquet")
    (folder / "ids.txt").write_text("\n".join(ids))
    return folder


@pytest.fixture
def config(files, tmp_path):
    paths = {name: str(files / f"{name}.npy") for name in "ab"}
    paths["ids"] = str(files / "ids.txt")
    recipe = cloob.get_recipe("vectors", objective="infoloob")
    quick = recipe.override(embed_dim=16, batch_size=40, epochs=3, patience=0)
    return quick.override(**paths, device="cpu", out=tmp_path / "run")


def numbers(run):
    """The lines of the epochs without what a clock says."""
    lines = read_lines(run / "epochs.jsonl")
    return [{**line, "seconds": None} for line in lines]


def weights(run):
    """The weights of all checkpoints."""
    files = (run / "checkpoints").rglob("heads.safetensors")
    return {str(f.relative_to(run)): f.read_bytes() for f in files}


def test_the_command_trains_heads_that_other_commands_read(
    files, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    out = tmp_path / "run"
    report = tmp_path / "report"
    words = "train vectors --a a.npy --b b.npy --ids ids.txt --objective infoloob"
    words += f" --epochs 8 --batch-size 40 --device cpu --out {out}"
    run_cloob(words)
    said = capsys.readouterr().out
    for expected in (":best: val_recall", "of 10 ids", "MRR", "choose 1 of 4"):
        assert expected in said
    assert read_lines(out / "epochs.jsonl")[-1]["val_recall"] > 0.6
    (skipped,) = read_lines(out / "skipped.jsonl")
    assert skipped["key"] == "a.npy row 7"
    assert skipped["reason"] == "not finite"
    run_cloob(f"eval {out} --held-out --out {report}")
    row = read_json(report / "results.json")["rows"][0]
    (found,) = row["vectors"].values()
    assert found["n"] == 40
    assert found["n_ids"] == 10
    assert found.pop("chose") == ["epoch"]
    (stored,) = out.glob("checkpoints/*/validation.json")
    written = read_json(stored)["numbers"]
    for key in written | found:
        assert found[key] == pytest.approx(written[key])

    capsys.readouterr()
    run_cloob(f"{words} --resume auto")
    assert "already finished" in capsys.readouterr().out
    run_cloob(words, code=2)
    assert "already holds a run" in capsys.readouterr().err
    copied = f"train --config {out}/config.json --out {tmp_path}/copy"
    run_cloob(f"{copied} --epochs 1")
    assert len(read_lines(tmp_path / "copy/epochs.jsonl")) == 1


def test_a_model_of_vectors_takes_rows_alone(config):
    model = cloob.load_model(cloob.train_heads(config.override(epochs=1)).run)
    a = np.load(config.a, mmap_mode="r")
    b = torch.from_numpy(np.load(config.b))
    of_a = model.encode_a(a)
    of_b = model.encode_b(b, batch_size=7)
    assert of_a.shape == of_b.shape == (N, 16)
    assert of_a[0].norm() == pytest.approx(1)
    raises(InputError, "encode_a", lambda: model.encode_text(["a"]))
    raises(InputError, r"\(n, 20\)", model.encode_a, b)


def test_overwrite_works_with_the_default_objective(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    words = "train vectors --a a.npy --b b.npy --epochs 2 --device cpu --overwrite"
    for _ in range(2):
        run_cloob(f"{words} --out {tmp_path}/run")
    decided = read_json(tmp_path / "run/decisions.json")
    assert decided["objective"]["chosen"]
    assert "joined" in decided


def wrong_pairs(folder, n=800, seed=0):
    a, b = views(n, (24, 16), seed)
    wrong = np.arange(0, n, 4)
    order = np.arange(n)
    order[wrong] = np.roll(wrong, 1)
    np.save(folder / "a.npy", a)
    np.save(folder / "b.npy", b[order])
    return set(wrong.tolist())


def test_clean_leaves_wrong_training_pairs_out_and_no_held_out_ones(config, tmp_path):
    wrong = wrong_pairs(tmp_path)
    files = {"a": f"{tmp_path}/a.npy", "b": f"{tmp_path}/b.npy", "ids": None}
    run = cloob.train_heads(config.override(**files, clean="auto")).run
    listed = list(csv.DictReader((run / "suspects.csv").read_text().splitlines()))
    assert [*listed[0]] == ["pair", "score", "probability", "row"]
    left_out = {int(line["pair"]) for line in listed}
    judges = {*read_json(run / "decisions.json")["held_out"]}
    assert not left_out & judges
    trained = wrong - judges
    assert len(left_out & trained) > 0.9 * len(trained) > 0.8 * len(left_out)
    seen = read_lines(run / "epochs.jsonl")[-1]["samples_seen"]
    assert seen <= 3 * (800 - len(judges) - len(left_out))


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_left_over_decisions_of_other_data_are_never_applied(config, tmp_path):
    """A run that was stopped before its first step, then other files of the same
    names, as a scheduler does that always passes --resume auto.
    """
    wrong_pairs(tmp_path)
    files = {"a": f"{tmp_path}/a.npy", "b": f"{tmp_path}/b.npy", "ids": None}
    config = config.override(**files, clean="auto", resume="auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_of_heads, "choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cloob.train_heads(config)
    assert read_json(config.out / "decisions.json")["suspects"]
    other = views(800, (24, 16), 5)
    for name, side in zip("ab", other, strict=True):
        np.save(tmp_path / f"{name}.npy", side)
    said = "is a run of other pairs or settings .training pairs: other rows of a"
    raises(InputError, said, cloob.train_heads, config)
    wrong_pairs(tmp_path)
    raises(
        InputError, "lr is 0.1, not 0.001", cloob.train_heads, config.override(lr=0.1)
    )
    assert cloob.train_heads(config).epochs == 3


def test_a_killed_run_goes_on_and_a_longer_one_too(config, tmp_path):
    config = config.override(objective="auto", embed_dim=None)
    whole = cloob.train_heads(config).run

    def stop(line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    again = config.override(out=tmp_path / "again", resume="auto")
    with pytest.raises(KeyboardInterrupt):
        cloob.train_heads(again, on_epoch=stop)
    assert not (again.out / "checkpoints").exists()
    cloob.train_heads(again)
    assert numbers(again.out) == numbers(whole)
    assert weights(again.out) == weights(whole)
    assert cloob.train_heads(again).already_finished
    longer = cloob.train_heads(again.override(epochs=5))
    assert longer.epochs == 5


KILLED = """
import sys
from cloob.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("objective", ["auto", "cloob"])
def test_kills_at_random_moments_change_no_bit(objective, tmp_path):
    """Ten kill -9 of a command, resumed each time; the run ends as one that nobody
    killed.
    """
    for name, rows in zip("ab", views(1500, (40, 30), noise=1.0), strict=True):
        np.save(tmp_path / f"{name}.npy", rows)
    options = (
        f"train vectors --resume auto --a a.npy --b b.npy --objective {objective}"
        " --epochs 25 --device cpu --patience 0"
    )
    words = [sys.executable, "-c", KILLED, *options.split()]
    began = time.monotonic()
    subprocess.run([*words, "--out", "whole"], cwd=tmp_path, check=True)
    seconds = time.monotonic() - began
    draws = random.Random(objective)
    kills = 0
    while kills < 10:
        process = subprocess.Popen([*words, "--out", "killed"], cwd=tmp_path)
        time.sleep(draws.uniform(0.3, 0.9) * seconds)
        if process.poll() is not None:
            if kills:
                break
            (tmp_path / "killed" / "decisions.json").unlink()
        process.kill()
        process.wait()
        (tmp_path / "killed" / ".lock").unlink(missing_ok=True)
        kills += 1
    subprocess.run([*words, "--out", "killed"], cwd=tmp_path, check=True)
    runs = [tmp_path / name for name in ("whole", "killed")]
    assert numbers(runs[0]) == numbers(runs[1])
    assert weights(runs[0]) == weights(runs[1])


def test_held_out_files_take_the_place_of_a_split(config, tmp_path, monkeypatch):
    """What a split would hold out, given as files, is judged alike."""
    monkeypatch.chdir(tmp_path)
    files = {}
    for prefix, part in zip(("", "val_"), vector_pairs(config), strict=True):
        batch = part.batch()
        (a, b), ids = batch.parts, batch.ids
        np.save(f"{prefix}a.npy", a.numpy())
        sparse.save_npz(f"{prefix}b.npz", sparse.csr_array(b.numpy()))
        np.savetxt(f"{prefix}ids.txt", ids.numpy(), "%d")
        for name in ("a.npy", "b.npz", "ids.txt"):
            files[prefix + name.partition(".")[0]] = prefix + name
    both = config.override(**files, out="own")
    recalls = []
    for each in (config, both):
        run = cloob.train_heads(each).run
        recalls.append(
            [line["val_recall"] for line in read_lines(run / "epochs.jsonl")]
        )
    assert recalls[0] == pytest.approx(recalls[1], abs=1e-12)
    run_cloob("eval own --held-out --out report")
    error = "refit is True; it must be left out with held-out pairs of other files"
    raises(InputError, error, cloob.train_heads, both.override(refit=True, out="x"))


def test_ids_join_rows_and_are_held_out_whole(config, files, tmp_path):
    names = [*(f"M{row}" for row in range(N - 1)), "one\u2028id\x0c"]
    (tmp_path / "b.txt").write_text("".join(f"{name}\n" for name in names))
    join = {"a_ids": str(files / "ids.txt"), "b_ids": f"{tmp_path}/b.txt"}
    pairs = open_vector_pairs(config.a, config.b, **join)
    rows = [[row, row // 4] for row in range(N) if row != 7]
    assert pairs.rows.tolist() == rows
    rest, held_out = pairs.split(0.1)
    assert not {*rest.ids} & {*held_out.ids}
    assert len({*held_out.ids}) == 10
    joined = config.override(ids=None, **join)
    error = r"300 no partner \(e.g. M100: only b has this id\)"
    raises(InputError, error, cloob.train_heads, joined)
    assert cloob.train_heads(joined.override(max_bad_fraction=0.8)).epochs == 3


def test_groups_and_weights_come_from_files(config, tmp_path, capsys):
    groups = tmp_path / "groups.txt"
    weights_file = tmp_path / "weights.txt"
    groups.write_text("".join(f"{row // 20}\n" for row in range(N)))
    weights_file.write_text("".join(f"{row % 3}\n" for row in range(N)))
    config = config.override(
        ids=None, groups=str(groups), weights=str(weights_file), val_split=0.5
    )
    train, held_out = vector_pairs(config)
    assert len(held_out) in (199, 200)  # row 7 cannot be used
    assert len(np.unique(held_out.ids)) == len(held_out)
    assert not {*train.group_ids} & {*held_out.group_ids}
    expected = [float(row % 3) for row in train.rows[:, 0]]
    assert train.weights.tolist() == expected
    run = cloob.train_heads(config).run
    words = f"eval {run} --held-out --out {tmp_path}/report"
    run_cloob(words)
    said = capsys.readouterr().out
    assert "a.npy and b.npy (held out): intervals over 10 groups" in said
    weights_file.write_text("1\n" * (N - 1) + "-1\n")
    error = "weights.txt: row 399 is -1; 0 or more is right"
    raises(InputError, error, vector_pairs, config)


def test_runs_are_judged_together_that_hold_the_same_pairs_out(files, tmp_path, capsys):
    paths = {name: str(files / f"{name}.npy") for name in "ab"}
    start = cloob.get_recipe("vectors", objective="cca").override(**paths)
    runs = []
    for name, share in (("x", 0.1), ("y", 0.1), ("z", 0.5)):
        config = start.override(val_split=share, out=tmp_path / name)
        runs.append(str(cloob.train_heads(config).run))
    words = f"eval {runs[0]} {runs[1]} --held-out --out {tmp_path}/report"
    run_cloob(words)
    capsys.readouterr()
    run_cloob(f"{words} {runs[2]}", code=2)
    assert "z held different pairs out" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["ab.npz:{}", "ab.parquet:{}", *TABLES])
def test_every_form_holds_the_same_pairs(form, files, monkeypatch):
    monkeypatch.chdir(files)
    for name in ("a", "b") if form in TABLES else ():
        rows = np.load(f"{name}.npy").astype(np.float32)
        TABLES[form](pd.DataFrame(rows), form.format(name))
    a, b, ids = (form.format(name) for name in ("a", "b", "id"))
    has_ids = form.startswith("ab.p")
    pairs = open_vector_pairs(a, b, ids if has_ids else "ids.txt")
    is_table = pairs.unencoded[0] is not None  # a missing cell spoils no row of it
    assert len(pairs) == N - 1 + is_table
    found = pairs.only(pairs.rows[:, 0] != 7).batch(np.arange(N - 1))
    wanted = open_vector_pairs("a.npy", "b.npy", "ids.txt").batch(np.arange(N - 1))
    assert torch.equal(found.ids, wanted.ids)
    for one, other in zip(found.parts, wanted.parts, strict=True):
        assert torch.equal(one.to(other.dtype), other)


def test_a_column_that_both_tables_have_is_refused_and_dropped(files, tmp_path, capsys):
    for name in "ab":
        table = pd.DataFrame(np.load(files / f"{name}.npy")[8:]).add_prefix("x")
        table.insert(1, "sample", np.arange(1000, 1000 + len(table)))
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    words = f"train vectors --a {tmp_path}/a.csv --b {tmp_path}/b.csv --objective cca"
    words += f" --device cpu --out {tmp_path}/run"
    run_cloob(words, code=2)
    said = capsys.readouterr().err
    assert "column 'sample' of" in said
    assert "`cloob train vectors` by --drop" in said
    run_cloob(f"{words} --drop sample")
    model = cloob.load_model(tmp_path / "run")
    assert model.heads[0].options["features"] == 20
    run_cloob(f"{words} --drop simple --overwrite", code=2)
    assert "no table has the column 'simple'" in capsys.readouterr().err


MISTAKES = [
    ({"a": "ab.npz:c"}, "ab.npz: has no 'c'; it has a, b"),
    ({"a": "ab.npz"}, "ab.npz: holds a, b: give one as ab.npz:NAME"),
    ({"a": "beyond.npz"}, "beyond.npz cannot be read as npz: indices must be"),
    ({"a": "ab.parquet:c"}, "ab.parquet: has no 'c'; it has a, b, id"),
    ({"a": "ab.parquet:id"}, "ab.parquet:id: holds object"),
    ({"a": "ab.parquet"}, "ab.parquet: column 'a' holds list"),
    ({"a": "odd.csv:twice"}, "odd.csv: has several columns 'twice'; rename all"),
    ({"a": "odd.parquet:pair"}, "odd.parquet: column 'pair' holds struct<"),
    (
        {"a": "index-a.csv", "b": "index-b.csv"},
        "column '' of index-a.csv is column '' of index-b.csv, row by row",
    ),
    (
        {"a": "objects.npy"},
        "objects.npy cannot be read as npy: Array",
    ),
    ({"a": "nan.npy"}, "nan.npy and b.npy: 400 of 400 pairs cannot be used"),
    ({"a": "large.npy"}, "large.npy and b.npy: 400 of 400 pairs cannot be used"),
    (
        {"ids": None, "a": "turned.npy", "b": "b.npy"},
        "turned.npy has 10 rows, b.npy has 400 rows; row i of one belongs to",
    ),
    ({"a": "cut.npy"}, "cut.npy cannot be read"),
    ({"a": "flat.npy"}, "flat.npy: holds float64 (400,)"),
    (
        {"val_a": "b.npy", "val_b": "b.npy"},
        "b.npy and b.npy: a has 10 columns, not 20",
    ),
]


@pytest.mark.parametrize(("leaves", "error"), MISTAKES)
def test_a_mistake_is_named_in_one_line(config, files, leaves, error, monkeypatch):
    monkeypatch.chdir(files)
    np.save("objects.npy", np.array([{}, None], object), allow_pickle=True)
    np.save("flat.npy", np.zeros(N))
    Path("odd.csv").write_text("twice,twice\n1,2\n")
    parquet.write_table(pa.table({"pair": [{"x": 1}] * N}), "odd.parquet")
    for name in "ab":
        pd.DataFrame(np.zeros((N, 20))).to_csv(f"index-{name}.csv")
    np.save("nan.npy", np.full((N, 20), np.nan))
    np.save("large.npy", np.full((N, 20), 1e300))
    np.save("turned.npy", np.zeros((10, N)))
    beyond = sparse.csr_array(np.eye(N, 20))
    beyond.indices[3] = 1 << 20  # scipy would write there
    sparse.save_npz("beyond.npz", beyond)
    Path("cut.npy").write_bytes(Path("a.npy").read_bytes()[:1000])
    config = config.override(**leaves)
    raises(InputError, f"^{re.escape(error)}", cloob.train_heads, config)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bad_rows_are_told_from_large_ones(dtype):
    rows = np.random.default_rng(0).normal(size=(700, 4)).astype(dtype)
    rows[300] = min(np.finfo(dtype).max, np.finfo(np.float32).max)
    rows[255, 3] = np.nan
    rows[699] = (np.inf, -np.inf, 0, 0)
    rows[256, 0] = 1e39 if dtype is np.float64 else np.inf
    pairs = pairs_of(rows, np.ones((700, 2), np.int8))
    bad = [skip.key.rpartition(" ")[2] for skip in pairs.skipped]
    assert bad == ["255", "256", "699"]
    assert len(pairs) == 697


def test_the_configuration_is_read_as_it_was_written(tmp_path):
    config = HeadsConfig(a="x", b="y", drop=("id",), val_split=0.2, refit=True)
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    assert HeadsConfig().merge_file(file) == config
    file.write_text('{"drop_out": 0.9}')
    error = "config.json: unknown key 'drop_out'"
    raises(InputError, error, HeadsConfig().merge_file, file)

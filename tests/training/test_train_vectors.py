"""Two files of vectors through train, eval, embed and load_model: bad rows and files,
ids, resume.
"""

import csv
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import save_file
from torch.nn import functional as F
from train_helpers import exact, lines, recall, result_of

import cloob
from cloob import cli
from cloob.data.vectors import open_pairs
from cloob.errors import InputError
from cloob.functional.cca import PairMoments, canonical_directions
from cloob.training import align, record
from cloob.training.align import open_vectors
from cloob.training.config.parts import VAL_SPLIT
from support import fork, raises

N = 400


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two views of one hidden cause, four rows an id, with one bad row."""
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(N, 6))
    a = (cause @ rng.normal(size=(6, 20)) + 3).astype(np.float32)
    b = np.tanh(cause @ rng.normal(size=(6, 10)) / 2).astype(np.float16)
    a[7, 3] = np.nan
    np.save(folder / "a.npy", a)
    np.save(folder / "b.npy", b)
    np.savez(folder / "ab.npz", a=a, b=b)
    save_file({"a": a, "b": b}, folder / "ab.safetensors")
    columns = {
        "a": a.tolist(),
        "b": b.astype(float).tolist(),
        "id": [f"M{row // 4}" for row in range(N)],
    }
    parquet.write_table(pa.table(columns), folder / "ab.parquet")
    for name, side in (("a", a), ("b", b.astype(np.float32))):
        table = pd.DataFrame(side)
        table.to_csv(folder / f"{name}.csv", index=False)
        table.to_csv(folder / f"index-{name}.csv")
        np.savetxt(folder / f"{name}-bare.csv", side, delimiter=",")
        table.rename(columns=str).to_parquet(folder / f"{name}.parquet", index=False)
    (folder / "ids.txt").write_text("".join(f"M{row // 4}\n" for row in range(N)))
    return folder


@pytest.fixture
def config(files, tmp_path):
    start = cloob.get_recipe("vectors", objective="infoloob").override(
        a=str(files / "a.npy"), b=str(files / "b.npy")
    )
    small = start.override(
        ids=str(files / "ids.txt"),
        embed_dim=16,
        batch_size=40,
        epochs=3,
        warmup=2,
        patience=0,
    )
    return small.override(device="cpu", tensorboard=False, out=tmp_path / "run")


def test_the_command_trains_heads_that_find_partners(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    out = tmp_path / "run"
    words = (
        "train vectors --a a.npy --b b.npy --ids ids.txt --objective infoloob --epochs"
        " 8 --batch-size 40"
    )
    assert cli.main([*words.split(), "--device", "cpu", "--out", str(out)]) == 0
    stored = json.loads((out / "config.json").read_text())
    assert (
        stored["loss"]["objective"],
        stored["loss"]["inv_tau"],
        stored["optim"]["lr"],
    ) == ("infoloob", 10.0, 1e-3)
    epochs, skipped = lines(out / "epochs.jsonl"), lines(out / "skipped.jsonl")
    assert epochs[-1]["val_recall"] > 0.6
    assert [(line["key"], line["reason"]) for line in skipped] == [
        ("a.npy row 7", "not finite")
    ]
    model = cloob.load_model(out)
    a, b = np.load("a.npy", mmap_mode="r"), torch.from_numpy(np.load("b.npy"))
    za, zb = model.encode_a(a), model.encode_b(b, batch_size=7)
    assert za.shape == zb.shape == (N, 256) and za[0].norm() == pytest.approx(1)
    assert ((za[8:40] @ zb[8:40].T).argmax(1) == torch.arange(32)).float().mean() > 0.8
    assert model.make_objective().name == "infoloob"
    raises(InputError, "encode_a", model.encode_text, ["a"])
    raises(InputError, r"\(n, 20\)", model.encode_a, b)


def test_the_closed_form_takes_the_place_of_training(
    config, files, tmp_path, monkeypatch, capsys
):
    """The heads are the directions of all training pairs, for the ridge and power that
    the run reports.
    """
    monkeypatch.chdir(files)
    out = tmp_path / "run"
    words = (
        f"--a a.npy --b b.npy --ids ids.txt --objective cca --device cpu --out {out}"
    )
    assert cli.main(["train", "vectors", *words.split()]) == 0
    assert lines(out / "epochs.jsonl")[-1]["val_recall"] > 0.6
    assert [line["key"] for line in lines(out / "skipped.jsonl")] == ["a.npy row 7"]
    model = cloob.load_model(out)
    ridge, power, by_column = (
        model.objective_config[key] for key in ("ridge", "power", "by_column")
    )
    train, _ = open_vectors(config.override(val_split=VAL_SPLIT))
    a, b, *_ = train.take(np.arange(len(train)))
    (directions,) = canonical_directions(
        PairMoments.of(a, b), [ridge], by_column=by_column
    )
    expected = F.normalize(
        (a - a.mean(0)).double() @ directions.weighted(power)[0], dim=1
    )
    torch.testing.assert_close(model.encode_a(a).double(), expected, atol=1e-4, rtol=0)
    raises(InputError, "closed form", model.make_objective)
    capsys.readouterr()
    assert cli.main(["train", "vectors", *words.split(), "--resume", "auto"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert (
        cli.main(["eval", str(out), "--held-out", "--out", f"{tmp_path}/report"]) == 0
    )
    assert (
        json.loads((tmp_path / "report/results.json").read_text())["rows"][0][
            "objective"
        ]
        == "cca"
    )
    ranks = fork(
        tmp_path / "ranks",
        2,
        lambda: cli.main(["train", "vectors", *words.split(), "--overwrite"]),
    )
    assert ranks.wait() == [0, 0], ranks.told()
    torch.testing.assert_close(
        cloob.load_model(out).encode_a(a), model.encode_a(a), atol=1e-4, rtol=0
    )


def test_clean_leaves_wrong_training_pairs_out_and_no_held_out_ones(
    config, tmp_path, monkeypatch, caplog, capsys
):
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(800, 8))
    wrong = np.arange(0, 800, 4)
    order = np.arange(800)
    order[wrong] = np.roll(wrong, 1)
    np.save(tmp_path / "a.npy", cause @ rng.normal(size=(8, 24)))
    np.save(tmp_path / "b.npy", (cause @ rng.normal(size=(8, 16)))[order])
    words = [
        "train",
        "vectors",
        *(word for side in "ab" for word in (f"--{side}", f"{tmp_path}/{side}.npy")),
    ]
    words += ["--device", "cpu", "--epochs", "2", "--objective"]
    assert (
        cli.main([*words, "infoloob", "--clean", "auto", "--out", f"{tmp_path}/auto"])
        == 0
    )
    assert any(
        "720 pairs, fewer after --clean: batch size 32" in message
        for message in caplog.messages
    )
    split = config.override(
        a=f"{tmp_path}/a.npy", b=f"{tmp_path}/b.npy", ids=None, val_split=VAL_SPLIT
    )
    train, held_out = open_vectors(split)
    trained = set(np.setdiff1d(wrong, held_out.rows[:, 0]).tolist())
    listed = list(csv.reader((tmp_path / "auto/suspects.csv").read_text().splitlines()))
    assert listed[0] == ["pair", "score", "probability", "row"] and float(
        listed[1][1]
    ) <= float(listed[-1][1])
    left_out = {int(pair) for pair, *_ in listed[1:]}
    assert len(left_out & trained) > 0.9 * len(trained) > 0.8 * len(left_out)
    assert not left_out & set(held_out.rows[:, 0].tolist())
    assert lines(tmp_path / "auto/metrics.jsonl")[-1]["samples_seen"] <= 2 * (
        len(train) - len(left_out)
    )
    with (
        monkeypatch.context() as patch
    ):  # a resumed run leaves out those that its folder lists
        patch.setattr(align, "clean", None)
        more = [
            "infoloob",
            "--clean",
            "auto",
            "--out",
            f"{tmp_path}/auto",
            "--resume",
            "auto",
        ]
        assert cli.main([*words, *more, "--epochs", "3"]) == 0
    assert (
        list(csv.reader((tmp_path / "auto/suspects.csv").read_text().splitlines()))
        == listed
    )
    assert lines(tmp_path / "auto/epochs.jsonl")[-1]["epoch"] == 3
    assert (
        cli.main(
            [
                *words,
                "cca",
                "--clean",
                "0.1",
                "--val-split",
                "0",
                "--out",
                f"{tmp_path}/share",
            ]
        )
        == 0
    )
    assert len((tmp_path / "share/suspects.csv").read_text().splitlines()) == 81
    assert cli.main(["eval", f"{tmp_path}/share", "--held-out"]) == 2
    assert "name pairs by --a and --b" in capsys.readouterr().err
    few = config.override(
        **dict.fromkeys(("a", "b"), f"{tmp_path}/few.npy"), ids=None, clean="auto"
    )
    np.save(tmp_path / "few.npy", cause[:80])
    raises(InputError, r"\d\d distinct ids; --clean needs 100", cloob.train, few)


def test_runs_are_judged_side_by_side_and_embed(
    config, files, tmp_path, monkeypatch, capsys
):
    """Each row four times over, with its id, says the same as once."""
    monkeypatch.chdir(tmp_path)
    for name in ("infoloob", "clip"):
        cloob.train(config.override(objective=name, out=tmp_path / name))
    a, b = np.load(files / "a.npy")[100:180], np.load(files / "b.npy")[100:180]
    once = evaluated(a, b, range(80))
    often = evaluated(a.repeat(4, 0), b.repeat(4, 0), np.arange(80).repeat(4).tolist())
    assert [row["model"] for row in once["rows"]] == ["infoloob", "clip"]
    row, same = (
        once["rows"][0]["vectors"]["ta.npy and tb.npy"],
        often["rows"][0]["vectors"]["ta.npy and tb.npy"],
    )
    assert (row["n"], same["n"], same["n_ids"], same["chance@10"]) == (
        80,
        320,
        80,
        10 / 80,
    )
    model = cloob.load_model("infoloob")
    za, zb = model.encode_a(a), model.encode_b(b)
    ranks = cloob.functional.ranking.ranks(za, zb, torch.arange(80))
    assert (
        row["a_to_b@1"]
        == same["a_to_b@1"]
        == pytest.approx(float((ranks < 1).double().mean()))
    )
    assert row["b_to_a@5_interval"] == pytest.approx(
        same["b_to_a@5_interval"], abs=0.03
    )
    geometry = once["rows"][0]["geometry"]["ta.npy and tb.npy"]
    assert geometry["n"] == 80 and "ajne_a" in geometry
    assert [entry["metric"] for entry in once["differences"]][:2] == [
        "a_to_b@1",
        "a_to_b@5",
    ]
    capsys.readouterr()
    page = Path("report/report.html").read_text(encoding="utf-8")
    for shown in (
        "a → b recall",
        f"{100 * row['b_to_a@1']:.1f}",
        "Chance, %",
        "Embeddings of a",
        "recall@10, b → a",
    ):
        assert shown in page
    assert cli.main(["eval", "infoloob", "clip", "--held-out", "--out", "held"]) == 0
    (numbers,) = json.loads(Path("held/results.json").read_text())["rows"][0][
        "vectors"
    ].items()
    assert numbers[0] == "a.npy and b.npy (held out)" and (
        numbers[1]["n"],
        numbers[1]["n_ids"],
    ) == (40, 10)
    assert (
        cli.main(
            [
                "eval",
                "infoloob",
                "--a",
                str(files / "a.npy"),
                "--b",
                str(files / "b.npy"),
                "--out",
                "x",
            ]
        )
        == 0
    )
    errors = capsys.readouterr().err
    assert "infoloob: was trained on" in errors and "a.npy row 7: holds NaN" in errors
    assert (
        cli.main(["eval", "infoloob", "--a", "tb.npy", "--b", "ta.npy", "--out", "x"])
        == 2
    )
    assert "its head takes an array (n, 20), not (320, 10)" in capsys.readouterr().err
    for out, part in (("v.npz", "vectors"), ("v.npy", None)):
        assert cli.main(["embed", "infoloob", "--b", "tb.npy", "--out", out]) == 0
        found = np.load(out) if part is None else np.load(out)[part]
        assert np.allclose(found[::4], zb, atol=1e-6)
    assert (
        cli.main(
            [
                "embed",
                "infoloob",
                "--a",
                str(files / "a.npy"),
                "--out",
                "bad.safetensors",
            ]
        )
        == 1
    )
    for more in ([], ["--overwrite"]):  # the copy is a model folder, too
        assert cli.main(["export", "infoloob", "--to=cloob", "--out=copy", *more]) == 0


def evaluated(a, b, ids):
    """results.json of `cloob eval` on these rows."""
    np.save("ta.npy", a)
    np.save("tb.npy", b)
    Path("ids.txt").write_text("".join(f"{label}\n" for label in ids))
    words = [
        "eval",
        "infoloob",
        "clip",
        "--a",
        "ta.npy",
        "--b",
        "tb.npy",
        "--ids",
        "ids.txt",
        "--out",
        "report",
    ]
    assert cli.main(words) == 0
    return json.loads(Path("report/results.json").read_text())


def test_a_resumed_run_gives_the_same_numbers(config, tmp_path):
    result = cloob.train(config)
    whole = exact(result.run)
    assert result.skipped == {"not finite": 1}
    assert len(whole) == 3 * 8  # of 90 ids with 4 rows each, one of them bad
    stopped = config.override(out=tmp_path / "stopped", save_every=5, keep=0)
    cloob.train(stopped)
    resume = str(stopped.save.out / "checkpoints" / "step-00000010")
    again = cloob.train(stopped.override(resume=resume, out=tmp_path / "again"))
    assert exact(again.run)[-14:] == whole[10:]
    raises(
        InputError, "other ids", cloob.train, stopped.override(resume="auto", ids=None)
    )


def test_held_out_files_take_the_place_of_a_split(config, files, tmp_path, monkeypatch):
    """What a split would hold out, given as files, is judged alike."""
    monkeypatch.chdir(tmp_path)
    split = cloob.train(config).run
    parts = dict(zip(("", "val_"), open_vectors(config), strict=True))
    own = {}
    for prefix, part in parts.items():
        a, b, ids, _ = part.take(np.arange(len(part)))
        for name, rows in (("a", a), ("b", b)):
            np.save(f"{prefix}{name}.npy", rows.numpy())
            own[prefix + name] = f"{prefix}{name}.npy"
        own[f"{prefix}ids"] = f"{prefix}ids.txt"
        Path(own[f"{prefix}ids"]).write_text(
            "".join(f"{label}\n" for label in ids.tolist())
        )
    both = config.override(**own, out="own")
    assert both.pairs.val_split == 0
    run = cloob.train(both).run
    recalls = [
        [line["val_recall"] for line in lines(each / "epochs.jsonl")]
        for each in (split, run)
    ]
    assert recalls[0] == recalls[1]
    assert cli.main(["eval", "own", "--held-out", "--out", "report"]) == 0
    (numbers,) = json.loads(Path("report/results.json").read_text())["rows"][0][
        "vectors"
    ].values()
    assert numbers["n_ids"] == 10
    raises(
        InputError,
        r"val_split is 0\.2; it must be left out",
        cloob.train,
        config.override(**own, val_split=0.2),
    )


FORMS = [
    "ab.npz:{}",
    "ab.safetensors:{}",
    "ab.parquet:{}",
    "{}.csv",
    "{}-bare.csv",
    "{}.parquet",
    "ab.h5:cells/{}",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_pairs(form, files, monkeypatch):
    monkeypatch.chdir(files)
    if form.startswith("ab.h5"):
        h5py, arrays = pytest.importorskip("h5py"), np.load("ab.npz")
        with h5py.File("ab.h5", "w") as file:
            file["cells/a"], file["cells/b"] = (
                arrays["a"].astype(np.float64),
                arrays["b"],
            )
            file["cells/id"] = [f"M{row // 4}" for row in range(N)]
    a, b, ids = (form.format(name) for name in ("a", "b", "id"))
    found = open_pairs(a, b, ids if form.startswith(("ab.p", "ab.h5")) else "ids.txt")
    wanted = open_pairs("a.npy", "b.npy", "ids.txt")
    for one, other in zip(
        found.take(np.arange(N - 1)), wanted.take(np.arange(N - 1)), strict=True
    ):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one.to(other.dtype), other)
        else:
            assert one == other


def test_hdf5_that_cannot_be_read_is_one_line(files, monkeypatch):
    monkeypatch.chdir(files)
    Path("none.h5").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        raises(InputError, "pip install h5py", open_pairs, "none.h5:a", "b.npy")
    h5py = pytest.importorskip("h5py")
    with h5py.File("few.h5", "w") as file:
        file["cells/a"] = file["b"] = np.ones((2, 2))
    for spec, error in (
        ("few.h5:c", "has no 'c'; it has b, cells/a"),
        ("none.h5:a", "cannot be read"),
    ):
        raises(InputError, error, open_pairs, spec, "b.npy")


def test_losses_are_those_of_a_plain_loop(config, tmp_path):
    from cloob.data.order import EpochOrder, ShardSizes
    from cloob.training.given import make_encoder

    config = config.override(
        head_dropout=0.0, val_split=0.0, epochs=5, log_every=1, embed_dim=32
    )
    pairs, _ = open_vectors(config)
    heads = make_encoder(config, pairs)
    objective = cloob.make_objective("infoloob", inv_tau=10.0)
    weights = [p for p in heads.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if (p.ndim > 1) == decays]}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [groups[0], {**groups[1], "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    )
    losses = []
    for epoch in range(5):
        order = torch.from_numpy(
            EpochOrder([ShardSizes((len(pairs),))], 0).epoch(epoch)(
                np.arange(len(pairs))
            )
        )
        for places in order.split(40)[: len(pairs) // 40]:
            a, b, ids, _ = pairs.take(places.numpy())
            loss = objective(*heads(a, b), ids=ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    run = cloob.train(config.override(schedule="constant", warmup=0)).run
    assert [line["loss"] for line in lines(run / "metrics.jsonl")] == pytest.approx(
        losses, abs=1e-6
    )


def test_auto_keeps_to_its_run(config, tmp_path):
    """It tries nothing over another run, leaves with it, and ends by a signal as any
    training does.
    """
    out, auto = tmp_path / "run", config.override(objective="auto", steps=400)
    cloob.train(config.override(steps=1))
    (out / "objectives.json").write_text("{}")  # of an earlier choice
    raises(InputError, "already holds a run", cloob.train, auto)
    assert (out / "objectives.json").read_text() == "{}"
    cloob.train(config.override(objective="clip", steps=1, overwrite=True))
    assert not (out / "objectives.json").exists()

    ended = threading.Event()

    def terminate():
        while not ended.wait(0.02):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        threading.Thread(target=terminate).start()
        result = result_of(cloob.train, auto.override(out=tmp_path / "other"))
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, before)
    assert (result.stopped, result.steps, result.run) == (
        "SIGTERM",
        0,
        tmp_path / "other",
    ) and not result.run.exists()


@pytest.mark.parametrize(
    ("how", "found"), [("auto", "column"), ("one", None), ("none", "none")]
)
def test_columns_of_unlike_units_are_scaled_apart(config, tmp_path, how, found):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N, 20)) * np.logspace(-2, 4, 20) + 5
    rows[:, 0] = 7
    np.save(tmp_path / "a.npy", rows)
    run = cloob.train(
        config.override(a=f"{tmp_path}/a.npy", ids=None, steps=2, standardise=how)
    ).run
    head = cloob.load_model(run).model.image_head
    assert head.options.get("standardise") == found
    middle = (torch.from_numpy(rows).float() - head.mean) / head.scale
    if how == "auto":
        assert middle[:, 0].abs().max() == 0 and middle[:, 1:].std(
            0
        ).tolist() == pytest.approx([1] * 19, abs=0.1)
    else:
        assert middle.std(0)[1] < 0.1


def test_rows_in_a_cone_are_told_of_once_if_they_are_retrieved(
    config, files, tmp_path, caplog
):
    np.save(tmp_path / "a.npy", np.load(files / "a.npy") + 30)
    config = config.override(
        a=f"{tmp_path}/a.npy", steps=3, standardise="none", overwrite=True
    )
    for change in (
        {"objective": "cloob"},
        {"objective": "clip"},
        {"objective": "cloob", "standardise": "one"},
    ):
        cloob.train(config.override(**change))
        assert (
            sum(
                "step 1: rows have a mean cosine of 0.9" in message
                for message in caplog.messages
            )
            == 1
        )


def test_ids_join_rows_and_are_held_out_whole(config, files, tmp_path):
    names = [*(f"M{row}" for row in range(N - 1)), "one\u2028id\x0c"]
    (tmp_path / "b.txt").write_text("".join(f"{name}\n" for name in names))
    pairs = open_pairs(
        str(files / "a.npy"),
        str(files / "b.npy"),
        None,
        str(files / "ids.txt"),
        f"{tmp_path}/b.txt",
    )
    assert (
        pairs.rows[:5].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 1]]
        and len(pairs) == N - 1
    )
    assert sum(skip.reason == "no partner" for skip in pairs.skipped) == N - N // 4
    rest, held_out = pairs.split(0.1)
    assert not set(rest.ids) & set(held_out.ids) and len(set(held_out.ids)) == 10
    joined = config.override(
        ids=None, a_ids=str(files / "ids.txt"), b_ids=f"{tmp_path}/b.txt"
    )
    raises(
        InputError,
        r"300 no partner \(e.g. M100: only b has this id\)",
        cloob.train,
        joined,
    )
    assert cloob.train(joined.override(max_bad_fraction=0.5, steps=2)).steps == 2


@pytest.mark.parametrize(
    ("leaves", "error"),
    [
        ({"a": "ab.npz:c"}, "ab.npz: has no 'c'; it has a, b"),
        ({"a": "ab.parquet:c"}, "ab.parquet: has no 'c'; it has a, b, id"),
        ({"a": "ab.parquet:id"}, "ab.parquet:id: holds object"),
        ({"a": "ab.parquet"}, "ab.parquet: column 'a' holds list"),
        ({"a": "index-a.csv"}, "index-a.csv: column 1 is an index of pandas"),
        ({"a": "objects.npy"}, "objects.npy: holds Python objects"),
        ({"a": "nan.npy"}, "nan.npy and b.npy: 400 of 400 pairs cannot be used"),
        ({"a": "large.npy"}, "large.npy and b.npy: 400 of 400 pairs cannot be used"),
        (
            {"ids": None, "a": "row.npy", "b": "row.npy"},
            "row.npy and row.npy: 1 id; 2 to train on",
        ),
        (
            {"a": "turned.npy", "b": "b.npy"},
            "turned.npy has 10 rows, b.npy has 400 rows; one of them is transposed",
        ),
        ({"a": "cut.npy"}, "cut.npy cannot be read"),
        ({"a": "flat.npy"}, "flat.npy: holds float64 (400,)"),
        ({"val_a": "b.npy", "val_b": "b.npy"}, "val_a has 10 columns, a has 20"),
    ],
)
def test_a_mistake_is_named_in_one_line(config, files, leaves, error, monkeypatch):
    monkeypatch.chdir(files)
    np.save("objects.npy", np.array([{}, None], object), allow_pickle=True)
    np.save("flat.npy", np.zeros(N))
    np.save("nan.npy", np.full((N, 20), np.nan))
    np.save("large.npy", np.full((N, 20), 1e300))
    np.save("row.npy", np.zeros((1, 20)))
    np.save("turned.npy", np.zeros((10, N)))
    Path("cut.npy").write_bytes(Path("a.npy").read_bytes()[:1000])
    raises(InputError, f"^{re.escape(error)}", cloob.train, config.override(**leaves))


def test_of_many_held_out_pairs_every_other_batch_is_in_the_recall(config, monkeypatch):
    monkeypatch.setattr(record, "GALLERY", 100)
    config = config.override(ids=None, val_split=0.3, batch_size=20, lr=1e-2)
    run = cloob.train(config).run
    held_out, model = open_vectors(config)[1], cloob.load_model(f"{run}:last")
    a, b, *_ = held_out.take(np.flatnonzero(np.arange(len(held_out)) // 20 % 2 == 0))
    found = np.mean(
        [recall(k, model.encode_a(a), model.encode_b(b)) for k in (1, 5, 10)]
    )
    assert found > 0.2 and len(a) == 60
    assert lines(run / "epochs.jsonl")[-1]["val_recall"] == pytest.approx(
        found, abs=1e-3
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bad_rows_are_told_from_large_ones(tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(700, 4)).astype(dtype)
    rows[300] = min(
        np.finfo(dtype).max, np.finfo(np.float32).max
    )  # their sum overflows
    rows[255, 3], rows[256, 0], rows[699] = (
        np.nan,
        1e39 if dtype is np.float64 else np.inf,
        (np.inf, -np.inf, 0, 0),
    )
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "b.npy", np.ones((700, 2), np.int8))
    pairs = open_pairs(str(tmp_path / "a.npy"), str(tmp_path / "b.npy"))
    assert [skip.key.rpartition(" ")[2] for skip in pairs.skipped] == [
        "255",
        "256",
        "699",
    ] and len(pairs) == 697

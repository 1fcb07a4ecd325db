"""``cloob eval`` from end to end on a tiny model: suites with missing sets, probes, the
files, and a repeated run.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import cloob
from cloob import get_recipe, load_model, train, train_heads
from cloob.models.folder import save_model
from cloob.models.load import fingerprint
from cloob.models.towers import create_model
from cloob.objective import make_objective
from make import tiny_model, write_classes, write_lines
from support import read_json, refused, run_cloob

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny_model(folder / "model", "tiny-convnext")
    write_classes(folder / "sets" / "one" / "test", COLOURS, 3)
    write_classes(folder / "sets" / "one" / "train", COLOURS, 6)
    write_classes(folder / "sets" / "two", COLOURS, 2)
    return folder


@pytest.fixture
def work(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def results_in(out):
    return read_json(Path(out) / "results.json")


def rows_in(out):
    return results_in(out)["rows"]


def test_probes_are_written_and_a_second_run_writes_the_same(work, capsys):
    out = work / "out"
    words = f"eval {work}/model --zeroshot {work}/sets/one {work}/sets/two --probe"
    words += f" --device cpu --out {out}"
    run_cloob(words)
    assert "linear probe top-1" in capsys.readouterr().out
    (row,) = rows_in(out)
    assert list(row["zeroshot"]) == ["one", "two"]
    (probe,) = row["probe"].values()
    assert probe["acc1"] == 1.0
    assert probe["n_train"] == 12
    assert row["fingerprint"] == fingerprint(load_model(work / "model", device="cpu"))
    assert "Linear probe" in (out / "report.html").read_text(encoding="utf-8")

    content = (out / "results.json").read_bytes()
    run_cloob(words)
    assert (out / "results.json").read_bytes() == content


def vectors_run(out, **changes):
    """A run of heads on the vectors of a.npy and b.npy."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(80, 6)).astype(np.float32)
    np.save("a.npy", a)
    np.save("b.npy", a @ rng.normal(size=(6, 5)).astype(np.float32))
    defaults = {"objective": "clip", "epochs": 3, "batch_size": 16, "embed_dim": 4}
    config = get_recipe("vectors").override(a="a.npy", b="b.npy", **defaults)
    if changes.get("objective") == "cca":
        config = config.override(embed_dim=None)
    train_heads(config.override(out=out, **changes))


def vectors_in(out):
    """The numbers of every model on its only pairs of vectors."""
    return [next(iter(row["vectors"].values())) for row in rows_in(out)]


def test_recall_says_what_its_pairs_chose(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vectors_run("heads", val_split=0.3)
    vectors_run("cca", objective="cca", val_split=0.3)
    run_cloob("eval heads cca --held-out --out e")
    out = capsys.readouterr().out
    found = [numbers["chose"] for numbers in vectors_in("e")]
    assert found == [["epoch"], ["ridge"]]
    said = "chose epoch of heads, ridge of cca"
    assert f"{said}: recall on new pairs is lower" in out
    assert said in Path("e/report.html").read_text(encoding="utf-8")
    for line in out.splitlines():
        if "recall@" in line:
            assert ("*" in line) is not line.startswith("chance")


def test_pairs_of_a_file_chose_where_training_held_them_out(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    vectors_run("heads", val_split=0.3)
    rng = np.random.default_rng(1)
    np.save("c.npy", rng.normal(size=(30, 6)).astype(np.float32))
    np.save("d.npy", rng.normal(size=(30, 5)).astype(np.float32))
    run_cloob("eval heads --a=c.npy --b=d.npy --out e")
    assert "*" not in capsys.readouterr().out
    assert vectors_in("e")[0]["chose"] == []
    # the file of the held-out pairs is known under any spelling
    vectors_run("files", val_a="c.npy", val_b="d.npy", val_split=0.0)
    words = f"--a={tmp_path}/c.npy --b=d.npy --out e"
    run_cloob(f"eval files {words}")
    assert vectors_in("e")[0]["chose"] == ["epoch"]


def test_held_out_pairs_of_python_code_are_named_by_the_user(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own = {name: cloob.open_source(f"demo:{name}") for name in ("train", "val")}
    config = cloob.TrainConfig().override(
        model="tiny-vit", steps=1, batch_size=8, workers=0, device="cpu", out="own"
    )
    train(config, pairs=own["train"], held_out=own["val"])
    line = refused(capsys, "eval own --held-out")
    assert "given by Python code; name them by --retrieval" in line


def test_an_unreadable_picture_is_counted_told_and_wrong(work, capsys):
    (work / "sets" / "two" / "red" / "1.png").write_bytes(b"no picture")
    words = f"eval {work}/model --zeroshot {work}/sets/two"
    words += f" --device cpu --out {work}/out --batch-size 1"
    run_cloob(words)
    said = "1 of 4 images could not be read (corrupt image × 1); they count as wrong"
    assert f"cloob: two: {said}\n" in capsys.readouterr().err
    assert said in (work / "out" / "report.html").read_text(encoding="utf-8")
    found = rows_in(work / "out")[0]["zeroshot"]["two"]
    assert found["n"] == 4
    assert found["acc5"] == 3 / 4
    assert found["unreadable"] == {"corrupt image": 1}


def broken_model(folder):
    """A model whose embeddings of pictures are not finite."""
    encoder = create_model("tiny-convnext", seed=0)
    next(encoder.model.visual.parameters()).data.fill_(1e38)
    save_model(folder, encoder, make_objective("cloob").config())


def write_ucf101(root, picture):
    """A test video of the paper's set, and no list of those to train on."""
    lists = root / "ucf101" / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")
    frame = root / "ucf101" / "frames" / "YoYo" / "v_YoYo_g01_c01.png"
    frame.parent.mkdir(parents=True)
    shutil.copy(picture, frame)


def test_every_kind_of_failure_names_its_file_as_it_was_typed(work, capsys):
    """Also in a folder with a space in its name."""
    two = (work / "sets").rename(work / "my sets") / "two"
    broken_model(work / "a" / "model")
    write_ucf101(work, two / "red" / "0.png")
    table = work / "pairs of mine.csv"
    gone = work / "gone.csv"
    rows = "".join(f"{two}/{name}/0.png,{name}\n" for name in COLOURS)
    table.write_text(f"filepath,title\n{rows}")
    gone.write_text(f"filepath,title\n{work}/x y/1.png,a\n{work}/x y/2.png,b\n")
    models = [str(work / name) for name in ("model", "a/model", "nowhere")]
    words = ["--zeroshot", str(two), "--paper", str(work), "--probe"]
    words += ["--retrieval", str(table), str(gone), "--device", "cpu"]
    run_cloob(["eval", *models, *words, "--out", str(work / "out")], code=1)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("cloob: ") for line in lines)
    assert sum("put there" in line for line in lines) == 8
    results = results_in(work / "out")
    found = [row["model"] for row in results["rows"]]
    assert found == models[:2]
    assert list(results["rows"][0]["zeroshot"]) == ["ucf101", "two"]
    failures = results["failures"]
    said = {(entry["model"], entry["set"]): entry["error"] for entry in failures}
    assert len(said) == len(failures) == 14
    broken = models[1]
    for model, of, words in (
        (None, "ucf101 (training)", "trainlist01.txt"),
        (None, "country211", f"cannot be read under {work} ("),
        ("nowhere", None, f"{work}/nowhere: no such folder"),
        (broken, "pairs of mine.csv", f"is that of '{two}/red/0.png'"),
        (broken, "gone.csv", f"{work}/x y/1.png: missing image"),
    ):
        assert words in said[model, of]


def test_sets_of_one_name_are_told_apart_by_their_folders(work):
    for folder in ("a", "b"):
        shutil.copytree(work / "sets" / "one", work / folder / "one")
        rows = [f"../sets/two/{name}/0.png,{name} {folder}\n" for name in COLOURS]
        text = "".join(["filepath,title\n", *rows])
        (work / folder / "val.csv").write_text(text)
    sets = [str(work / folder / "one") for folder in "ab"]
    pairs = [str(work / folder / "val.csv") for folder in "ab"]
    words = f"eval {work}/model --device cpu --probe --out {work}/out"
    words += f" --zeroshot {sets[0]} {work}/sets/two {sets[1]}"
    run_cloob(f"{words} --retrieval {pairs[0]} {pairs[1]}")
    (row,) = rows_in(work / "out")
    expected = [sets[0], "two", sets[1]]
    assert list(row["zeroshot"]) == expected
    assert list(row["probe"]) == sets
    assert list(row["retrieval"]) == pairs


def test_the_papers_sets_that_are_all_missing_end_with_one_line_more(work, capsys):
    words = f"eval {work}/model --paper {work}"
    run_cloob(f"{words} --out {work}/out", code=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert "none of the 8 sets" in lines[-1]
    assert not (work / "out").exists()


def test_groups_of_given_pairs_widen_the_intervals(tmp_path, monkeypatch, capsys):
    """Of --a and --b of eval, and of --val-a and --val-b of the training."""
    monkeypatch.chdir(tmp_path)
    vectors_run("plain", val_split=0.3)
    write_lines(Path("groups.txt"), [f"plate {i // 8}" for i in range(80)])
    words = "eval plain --a a.npy --b b.npy"
    run_cloob(f"{words} --out ids")
    run_cloob(f"{words} --groups groups.txt --out groups")
    assert "intervals over 10 groups" in capsys.readouterr().out
    (by_id,), (by_group,) = vectors_in("ids"), vectors_in("groups")
    assert by_group["n_groups"] == 10
    assert "n_groups" not in by_id
    assert by_group["a_to_b@5"] == by_id["a_to_b@5"]
    assert by_group["a_to_b@5_interval"] != by_id["a_to_b@5_interval"]

    held_out = {"val_a": "a.npy", "val_b": "b.npy", "val_split": 0.0}
    vectors_run("grouped", **held_out, val_groups="groups.txt")
    (file,) = Path("grouped").glob("checkpoints/*/validation.json")
    assert read_json(file)["numbers"]["n_groups"] == 10
    run_cloob("eval grouped --held-out --out again")
    assert vectors_in("again")[0]["n_groups"] == 10


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A folder with a run, ids that repeat in a, a b with rows that no row of a belongs
    to, and lists of candidates; the ids of both sides, and the lists.
    """
    folder = tmp_path_factory.mktemp("lists")
    with contextlib.chdir(folder):
        vectors_run("run", val_split=0.3)
    rng = np.random.default_rng(3)
    order = rng.permutation(80)
    np.save(folder / "b2.npy", np.load(folder / "b.npy")[order])
    a_ids = [f"m{i % 60}" for i in range(80)]
    b_ids = [f"m{i}" if i < 60 else f"other{i}" for i in order]
    (folder / "a.txt").write_text("\n".join(a_ids) + "\n")
    (folder / "b.txt").write_text("\n".join(b_ids) + "\n")
    found = [[name, *rng.choice(b_ids, 8, replace=False).tolist()] for name in a_ids]
    text = "".join(f"{json.dumps(line)}\n" for line in found)
    (folder / "lists.jsonl").write_text(text)
    return folder, a_ids, b_ids, found


OF_LISTS = "eval run --a=a.npy --b=b2.npy --out=out"
BY_IDS = "--a-ids=a.txt --b-ids=b.txt"


def test_vectors_have_the_numbers_of_other_papers(lists, monkeypatch, capsys):
    """Against loops over the rows that the run itself embeds."""
    folder, a_ids, b_ids, candidates = lists
    monkeypatch.chdir(folder)
    run_cloob(f"{OF_LISTS} {BY_IDS} --candidates lists.jsonl")
    out = capsys.readouterr().out
    assert "a → b MRR" in out
    assert "candidates recall@5" in out
    (found,) = vectors_in("out")

    model = cloob.load_model("run")
    scores = model.encode_a(np.load("a.npy")) @ model.encode_b(np.load("b2.npy")).T
    row_of_b = {name: row for row, name in enumerate(b_ids)}

    def n_ahead(place, names):
        """How many of some ids of b score at least as much as the own one."""
        own = a_ids[place]
        wrong = [row_of_b[name] for name in {*names} - {own}]
        return int((scores[place, wrong] >= scores[place, row_of_b[own]]).sum())

    by_id = {}
    for i, name in enumerate(a_ids):
        rank = n_ahead(i, a_ids)
        listed = n_ahead(i, candidates[i])
        n_wrong = len({*candidates[i]} - {name})
        numbers = {
            "a_to_b_mrr": 1 / (rank + 1),
            "a_to_b@1%": rank < 1,  # 1 % of 60 is one
            "a_to_b_choose_4": math.comb(59 - rank, 3) / math.comb(59, 3),
            "candidates@5": listed < 5,
            "candidates_mrr": 1 / (listed + 1),
            "chance_candidates@5": min(5 / (n_wrong + 1), 1),
        }
        by_id.setdefault(name, []).append(list(numbers.values()))
    means = np.mean([np.mean(rows, 0) for rows in by_id.values()], 0)
    assert [found[key] for key in numbers] == pytest.approx(means, abs=1e-6)
    for key in ("a_to_b_mrr", "b_to_a@5%", "candidates_mrr", "a_to_b_median_rank"):
        low, high = found[f"{key}_interval"]
        assert low <= found[key] <= high


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "has 1 lines, and a has 80 rows"),
        ("3\n" * 80, "line 1 is no list of candidates"),
        ('["m7"]\n' * 80, "line 1 does not list the row's own partner"),
        ('["m0", "zinc"]\n' * 80, "line 1 names 'zinc', which b has not"),
        (None, "no such file"),
    ],
)
def test_lists_of_candidates_that_do_not_fit_are_refused(
    lists, tmp_path, monkeypatch, capsys, text, message
):
    monkeypatch.chdir(lists[0])
    wrong = tmp_path / "wrong.jsonl"
    if text is not None:
        wrong.write_text(text)
    run_cloob(f"{OF_LISTS} {BY_IDS} --candidates {wrong}", code=2)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_options_of_vectors_need_each_other(lists, monkeypatch, capsys):
    monkeypatch.chdir(lists[0])
    run_cloob(f"{OF_LISTS} --candidates lists.jsonl", code=2)
    assert "--candidates needs --ids" in capsys.readouterr().err
    line = refused(capsys, f"eval run --held-out {BY_IDS}")
    assert "--a-ids needs --a and --b" in line


def test_heads_of_vectors_are_exported_as_cloob_alone(tmp_path, monkeypatch, capsys):
    """They have no pictures, so that nothing else reads them."""
    monkeypatch.chdir(tmp_path)
    vectors_run("run")
    words = "export run --out exported --to"
    run_cloob(f"{words} onnx", code=2)
    assert "heads of vectors go to no other program" in capsys.readouterr().err
    run_cloob(f"{words} cloob")
    assert "next:" not in capsys.readouterr().out

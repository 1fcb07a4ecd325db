"""``cloob eval`` from end to end on a tiny model: suites with missing sets, probes, the
files, and a repeated run.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import cloob
from cloob import cli, get_recipe, load_model, train, train_heads
from cloob.models.folder import save_model
from cloob.models.load import fingerprint
from cloob.models.runs import CONFIG_FILE
from cloob.models.towers import create_model
from cloob.objective import make_objective
from make import tiny_model, write_classes
from support import refused

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
    return json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))


def rows_in(out):
    return results_in(out)["rows"]


def test_probes_are_written_and_a_second_run_writes_the_same(work, capsys):
    out = work / "out"
    sets = [str(work / "sets" / name) for name in ("one", "two")]
    words = ["eval", str(work / "model"), "--zeroshot", *sets, "--probe"]
    words += ["--device", "cpu", "--out", str(out)]
    assert cli.main(words) == 0
    assert "linear probe top-1" in capsys.readouterr().out
    (row,) = rows_in(out)
    assert list(row["zeroshot"]) == ["one", "two"]
    assert list(row["probe"]) == ["one"]
    assert row["fingerprint"] == fingerprint(load_model(work / "model", device="cpu"))
    assert row["probe"]["one"]["acc1"] == 1.0
    assert row["probe"]["one"]["n_train"] == 12
    assert "Linear probe" in (out / "report.html").read_text(encoding="utf-8")

    content = (out / "results.json").read_bytes()
    assert cli.main(words) == 0
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


def test_recall_says_what_its_pairs_chose(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vectors_run("heads", val_split=0.3)
    vectors_run("cca", objective="cca", val_split=0.3)
    assert cli.main(["eval", "heads", "cca", "--held-out", "--out", "e"]) == 0
    out = capsys.readouterr().out
    rows = rows_in("e")
    chose = [next(iter(row["vectors"].values()))["chose"] for row in rows]
    assert chose == [["epoch"], ["ridge"]]
    assert "chose epoch of heads, ridge of cca: recall on new pairs is lower" in out
    for line in out.splitlines():
        if "recall@" in line:
            assert ("*" in line) is not line.startswith("chance")
    page = Path("e/report.html").read_text(encoding="utf-8")
    assert "chose epoch of heads, ridge of cca" in page
    # pairs that chose nothing, and a checkpoint that is not the best
    rng = np.random.default_rng(1)
    np.save("c.npy", rng.normal(size=(30, 6)).astype(np.float32))
    np.save("d.npy", rng.normal(size=(30, 5)).astype(np.float32))
    assert cli.main(["eval", "heads", "--a=c.npy", "--b=d.npy", "--out", "e"]) == 0
    assert "*" not in capsys.readouterr().out
    (row,) = rows_in("e")
    assert next(iter(row["vectors"].values()))["chose"] == []
    # the file of the held-out pairs is known under any spelling
    vectors_run("files", val_a="c.npy", val_b="d.npy", val_split=0.0)
    words = [f"--a={tmp_path}/c.npy", "--b=d.npy", "--out", "e"]
    assert cli.main(["eval", "files", *words]) == 0
    (row,) = rows_in("e")
    assert next(iter(row["vectors"].values()))["chose"] == ["epoch"]


def test_held_out_pairs_of_python_code_are_named_by_the_user(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own = {name: cloob.open_source(f"demo:{name}") for name in ("train", "val")}
    config = cloob.TrainConfig().override(
        model="tiny-vit", steps=1, batch_size=8, workers=0, device="cpu", out="own"
    )
    train(config, pairs=own["train"], held_out=own["val"])
    line = refused(capsys, "eval", "own", "--held-out")
    assert "given by Python code; name them by --retrieval" in line


def test_an_unreadable_picture_is_counted_told_and_wrong(work, capsys):
    (work / "sets" / "two" / "red" / "1.png").write_bytes(b"no picture")
    words = ["eval", str(work / "model"), "--zeroshot", str(work / "sets" / "two")]
    words += ["--device", "cpu", "--out", str(work / "out"), "--batch-size", "1"]
    assert cli.main(words) == 0
    said = "1 of 4 images could not be read (corrupt image × 1); they count as wrong"
    err = capsys.readouterr().err
    assert f"cloob: two: {said}\n" in err
    (row,) = rows_in(work / "out")
    found = row["zeroshot"]["two"]
    assert found["n"] == 4
    assert found["acc5"] == 3 / 4
    assert found["unreadable"] == {"corrupt image": 1}
    assert said in (work / "out" / "report.html").read_text(encoding="utf-8")


def test_every_kind_of_failure_names_its_file_as_it_was_typed(work, capsys):
    """Also in a folder with a space in its name."""
    (work / "sets").rename(work / "my sets")
    sets, broken = work / "my sets", create_model("tiny-convnext", seed=0)
    next(broken.model.visual.parameters()).data.fill_(1e38)
    save_model(work / "a" / "model", broken, make_objective("cloob").config())
    frames = work / "ucf101" / "ucfTrainTestlist"
    frames.mkdir(parents=True)
    (frames / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")
    shutil.copytree(sets / "two" / "red", work / "ucf101" / "frames" / "YoYo")
    (work / "ucf101/frames/YoYo/0.png").rename(
        work / "ucf101/frames/YoYo/v_YoYo_g01_c01.png"
    )
    table = work / "pairs of mine.csv"
    table.write_text(
        "filepath,title\n"
        + "".join(f"{sets}/two/{name}/0.png,{name}\n" for name in COLOURS)
    )
    gone = work / "gone.csv"
    gone.write_text(f"filepath,title\n{work}/x y/1.png,a\n{work}/x y/2.png,b\n")
    wordless = shutil.copytree(
        work / "model", work / "wordless"
    )  # its tokenizer is not there
    config = json.loads((wordless / CONFIG_FILE).read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/words"
    (wordless / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    models = [work / "model", work / "a" / "model", wordless, work / "nowhere"]
    words = ["--zeroshot", str(sets / "two"), "--paper", str(work), "--probe"]
    words += ["--retrieval", str(table), str(gone), "--device", "cpu"]
    words += ["--out", str(work / "out")]
    assert cli.main(["eval", *map(str, models), *words]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("cloob: ") for line in lines)
    assert sum("put there" in line for line in lines) == 8
    results = results_in(work / "out")
    assert [row["model"] for row in results["rows"]] == list(map(str, models[:2]))
    assert list(results["rows"][0]["zeroshot"]) == ["ucf101", "two"]
    said = {
        (failure["model"], failure["set"]): failure["error"]
        for failure in results["failures"]
    }
    assert "trainlist01.txt" in said[None, "ucf101 (training)"]
    assert f"cannot be read under {work} (" in said[None, "country211"]
    assert said["wordless", None].startswith(f"{models[2]}/{CONFIG_FILE}: ")
    assert said["nowhere", None].startswith(f"{work}/nowhere: no such folder")
    assert (
        f"is that of '{sets}/two/red/0.png'"
        in said[str(models[1]), "pairs of mine.csv"]
    )
    assert f"{work}/x y/1.png: missing image" in said[str(models[1]), "gone.csv"]
    assert len(said) == len(results["failures"]) == 15


def test_sets_of_one_name_are_told_apart_by_their_folders(work):
    for folder in ("a", "b"):
        shutil.copytree(work / "sets" / "one", work / folder / "one")
        lines = [f"../sets/two/{name}/0.png,{name} {folder}" for name in COLOURS]
        (work / folder / "val.csv").write_text(
            "\n".join(["filepath,title", *lines]) + "\n"
        )
    sets = [str(work / folder / "one") for folder in "ab"]
    pairs = [str(work / folder / "val.csv") for folder in "ab"]
    words = ["eval", str(work / "model"), "--device", "cpu", "--probe"]
    words += ["--zeroshot", sets[0], str(work / "sets" / "two"), sets[1]]
    words += ["--retrieval", *pairs, "demo:val", "--out", str(work / "out")]
    assert cli.main(words) == 0
    (row,) = rows_in(work / "out")
    assert list(row["zeroshot"]) == [sets[0], "two", sets[1]]
    assert list(row["probe"]) == sets
    assert list(row["retrieval"]) == [*pairs, "demo:val"]
    assert (work / "out" / "report.html").is_file()


def test_the_papers_sets_that_are_all_missing_end_with_one_line_more(work, capsys):
    words = ["eval", str(work / "model"), "--paper", str(work)]
    assert cli.main([*words, "--out", str(work / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert "none of the 8 sets" in lines[-1]
    assert not (work / "out").exists()


def test_the_bundled_set_has_no_training_images(work, capsys):
    words = ["eval", str(work / "model"), "--zeroshot", "demo:noto-emoji", "--probe"]
    line = refused(capsys, *words, "--out", str(work / "out"))
    assert "none of the sets has training images" in line


def test_groups_of_given_pairs_widen_the_intervals(tmp_path, monkeypatch, capsys):
    """Of --a and --b of eval, and of --val-a and --val-b of the training."""
    monkeypatch.chdir(tmp_path)
    vectors_run("plain", val_split=0.3)
    Path("groups.txt").write_text("".join(f"plate {i // 8}\n" for i in range(80)))
    pairs = ["--a", "a.npy", "--b", "b.npy"]
    found = {}
    for name, more in (("ids", []), ("groups", ["--groups", "groups.txt"])):
        assert cli.main(["eval", "plain", *pairs, *more, "--out", name]) == 0
        (found[name],) = rows_in(name)[0]["vectors"].values()
    assert found["groups"]["n_groups"] == 10 and "n_groups" not in found["ids"]
    assert found["groups"]["a_to_b@5"] == found["ids"]["a_to_b@5"]
    interval = found["groups"]["a_to_b@5_interval"]
    assert interval != found["ids"]["a_to_b@5_interval"]
    assert "intervals over 10 groups" in capsys.readouterr().out

    held_out = {"val_a": "a.npy", "val_b": "b.npy", "val_split": 0.0}
    vectors_run("grouped", **held_out, val_groups="groups.txt")
    (file,) = Path("grouped").glob("checkpoints/*/validation.json")
    assert json.loads(file.read_text())["numbers"]["n_groups"] == 10
    assert cli.main(["eval", "grouped", "--held-out", "--out", "again"]) == 0
    (again,) = rows_in("again")[0]["vectors"].values()
    assert again["n_groups"] == 10


def listed_vectors():
    """A run, ids that repeat in a, a b with rows that no row of a belongs to, and lists
    of candidates; the ids of both sides, the lists, and words of the command.
    """
    vectors_run("run", val_split=0.3)
    rng = np.random.default_rng(3)
    order = rng.permutation(80)
    a_ids = [f"m{i % 60}" for i in range(80)]
    b_ids = [f"m{i}" if i < 60 else f"other{i}" for i in order]
    np.save("b2.npy", np.load("b.npy")[order])
    Path("a.txt").write_text("\n".join(a_ids) + "\n")
    Path("b.txt").write_text("\n".join(b_ids) + "\n")
    lists = [[name, *rng.choice(b_ids, 8, replace=False).tolist()] for name in a_ids]
    Path("lists.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lists))
    words = ["eval", "run", "--a=a.npy", "--b=b2.npy", "--out=out", "--a-ids=a.txt"]
    return a_ids, b_ids, lists, [*words, "--b-ids=b.txt", "--candidates"]


def test_vectors_have_the_numbers_of_other_papers(tmp_path, monkeypatch, capsys):
    """Against loops over the rows that the run itself embeds."""
    monkeypatch.chdir(tmp_path)
    a_ids, b_ids, lists, words = listed_vectors()
    assert cli.main([*words, "lists.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "a → b MRR" in out and "candidates recall@5" in out
    (row,) = rows_in("out")
    (found,) = row["vectors"].values()

    model = cloob.load_model("run")
    rows_a = model.encode_a(np.load("a.npy"))
    rows_b = model.encode_b(np.load("b2.npy"))
    row_of_b = {name: row for row, name in enumerate(b_ids)}
    gallery = [row_of_b[name] for name in dict.fromkeys(a_ids)]
    by_id = {}
    for i, name in enumerate(a_ids):
        scores = (rows_a[i] @ rows_b.T).tolist()
        own = row_of_b[name]
        ahead = sum(scores[j] >= scores[own] for j in gallery if j != own)
        wrong = {row_of_b[other] for other in lists[i]} - {own}
        above = sum(scores[j] >= scores[own] for j in wrong)
        numbers = {
            "a_to_b_mrr": 1 / (ahead + 1),
            "a_to_b@1%": ahead < 1,  # 1 % of 60 is one
            "a_to_b_choose_4": math.comb(59 - ahead, 3) / math.comb(59, 3),
            "candidates@5": above < 5,
            "candidates_mrr": 1 / (above + 1),
            "chance_candidates@5": min(5 / (len(wrong) + 1), 1),
        }
        by_id.setdefault(name, []).append(numbers)
    for key in numbers:
        means = [np.mean([each[key] for each in some]) for some in by_id.values()]
        assert found[key] == pytest.approx(np.mean(means), abs=1e-6), key
    assert found["chance_choose_4"] == pytest.approx(0.25, rel=1e-12)
    assert found["chance@1%"] == pytest.approx(1 / 60, rel=1e-12)
    for key in ("a_to_b_mrr", "b_to_a@5%", "candidates_mrr", "a_to_b_choose_20"):
        low, high = found[f"{key}_interval"]
        assert low <= found[key] <= high
    low, high = found["a_to_b_median_rank_interval"]
    assert low <= found["a_to_b_median_rank"] <= high


def test_lists_of_candidates_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    *_, words = listed_vectors()

    def last_line(*words):
        assert cli.main(words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    for text, message in (
        ("[1]\n", "has 1 lines, and a has 80 rows"),
        ("3\n" * 80, "line 1 is no list of candidates"),
        ('["m7"]\n' * 80, "line 1 does not list the row's own partner"),
        ('["m0", "zinc"]\n' * 80, "line 1 names 'zinc', which b has not"),
    ):
        Path("wrong.jsonl").write_text(text)
        assert message in last_line(*words, "wrong.jsonl")
    assert "no such file" in last_line(*words, "none.jsonl")
    plain = ["eval", "run", "--a=a.npy", "--b=b.npy", "--out=out", "--candidates"]
    assert "--candidates needs --ids" in last_line(*plain, "lists.jsonl")
    words = ("eval", "run", "--held-out", "--candidates", "rows.jsonl")
    assert "--candidates needs --a and --b" in refused(capsys, *words)
    words = ("eval", "run", "--held-out", "--a-ids", "a.txt", "--b-ids", "b.txt")
    assert "--a-ids needs --a and --b" in refused(capsys, *words)


def test_heads_of_vectors_are_exported_as_cloob_alone(tmp_path, monkeypatch, capsys):
    """They have no pictures, so that nothing else reads them."""
    monkeypatch.chdir(tmp_path)
    vectors_run("run")
    words = ["export", "run", "--out", "exported", "--to"]
    assert cli.main([*words, "onnx"]) == 2
    assert "heads of vectors go to no other program" in capsys.readouterr().err
    assert cli.main([*words, "cloob"]) == 0
    assert "next:" not in capsys.readouterr().out

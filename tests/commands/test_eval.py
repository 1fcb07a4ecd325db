"""``cloob eval`` from end to end on a tiny model: suites with missing sets, probes, the files, and a repeated run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cloob import cli, load_model
from cloob.commands.work.console import print_table
from cloob.commands.work.evaluate import named
from cloob.models.fingerprint import fingerprint
from cloob.models.folder import save_model
from cloob.models.runs import CONFIG_FILE
from cloob.models.towers import create_model
from cloob.objective import make_objective
from support import write_classes, write_pairs

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", create_model("tiny-convnext", seed=0), make_objective("cloob").config())
    write_classes(tmp_path / "sets" / "one" / "test", COLOURS, 3)
    write_classes(tmp_path / "sets" / "one" / "train", COLOURS, 6)
    write_classes(tmp_path / "sets" / "two", COLOURS, 2)
    return tmp_path


def test_a_suite_with_probes_writes_all_and_a_second_run_the_same(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", str(work / "model"), "--suite", "pictograms", str(work / "sets"), "--probe", "--device", "cpu"]
    words += ["--out", str(work / "out"), "--probe-seeds", "0", "1", "--shots", "2"]
    assert cli.main(words) == 0
    assert "probe, top-1 %" in capsys.readouterr().out
    text = (work / "out" / "results.json").read_text(encoding="utf-8")
    row = json.loads(text)["rows"][0]
    assert list(row["zeroshot"]) == ["one", "two"] and list(row["probe"]) == ["one"]
    assert row["fingerprint"] == fingerprint(load_model(work / "model", device="cpu"))
    assert row["probe"]["one"]["acc1"] == 1.0 and row["probe"]["one"]["n_train"] == 4
    names = {path.relative_to(work / "out").as_posix() for path in (work / "out").rglob("*") if path.is_file()}
    assert {
        "report.html",
        "clip_benchmark/one_model_en_linear_probe.json",
        "clip_benchmark/two_model_en_zeroshot_classification.json",
        "per_class/one.csv",
    } <= names
    assert "Linear probe" in (work / "out" / "report.html").read_text(encoding="utf-8")

    def refuse(*_: object, **__: object) -> object:
        raise AssertionError("computed again")

    monkeypatch.setattr("cloob.evaluate.loaded.load_model", refuse)
    monkeypatch.setattr("cloob.evaluate.embeddings.fit_probe", refuse)
    assert cli.main(words) == 0
    assert (work / "out" / "results.json").read_text(encoding="utf-8") == text


def test_missing_sets_are_named_and_the_others_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "sets" / "empty").mkdir()
    words = ["eval", str(work / "model"), "--suite", "pictograms", "paper", "--root", str(work / "sets")]
    assert cli.main([*words, "--device", "cpu", "--out", str(work / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9 and all(line.startswith("cloob: ") for line in lines)
    assert sum("put there" in line for line in lines) == 8
    results = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))
    assert list(results["rows"][0]["zeroshot"]) == ["one", "two"]
    assert [failure["model"] for failure in results["failures"]] == [None] * 9
    assert results["failures"][0]["set"] == "empty"


def test_an_unreadable_picture_is_counted_told_and_wrong(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "sets" / "two" / "red" / "1.png").write_bytes(b"no picture")
    words = ["eval", str(work / "model"), "--zeroshot", str(work / "sets" / "two"), "--device", "cpu"]
    assert cli.main([*words, "--out", str(work / "out")]) == 0
    said = "1 of 4 images could not be read (corrupt image × 1); they count as wrong"
    assert f"cloob: two: {said}\n" in capsys.readouterr().err
    found = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))["rows"][0]["zeroshot"]["two"]
    assert found["n"] == 4 and found["unreadable"] == {"corrupt image": 1} and found["acc5"] == 3 / 4
    assert said in (work / "out" / "report.html").read_text(encoding="utf-8")


def test_what_fails_for_one_model_or_set_leaves_the_rest(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of NaN, and a set whose training images are of one class."""
    broken = create_model("tiny-convnext", seed=0)
    next(broken.model.visual.parameters()).data.fill_(1e38)
    save_model(work / "nan", broken, make_objective("cloob").config())
    for part in ("train", "test"):
        write_classes(work / "sets" / "single" / part, {"red": COLOURS["red"]}, 1)
    words = ["eval", str(work / "nan"), str(work / "model"), "--suite", "pictograms", str(work / "sets"), "--probe"]
    assert cli.main([*words, "--device", "cpu", "--out", str(work / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("cloob: ") for line in lines)
    assert (
        sum(line.startswith("cloob: nan on two: ") and "not finite" in line and ".png" in line for line in lines) == 1
    )
    assert [line for line in lines if line.startswith("cloob: model on ")] == [
        "cloob: model on single: a linear probe needs two classes or more, "
        "and the only training image that can be read is of class 'red'"
    ]
    nan, good = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert (
        nan["zeroshot"] == {} and list(good["zeroshot"]) == ["one", "single", "two"] and list(good["probe"]) == ["one"]
    )
    page = (work / "out" / "report.html").read_text(encoding="utf-8")
    assert "Could not be measured" in page and "not finite" in page


def test_training_images_with_a_mistake_leave_the_set_to_be_classified(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "sets" / "one" / "train" / "green").mkdir()
    words = ["eval", str(work / "model"), "--suite", "pictograms", str(work / "sets"), "--probe"]
    assert cli.main([*words, "--device", "cpu", "--out", str(work / "out")]) == 1
    assert "one/train/green: no image in this class folder" in capsys.readouterr().err
    results = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))
    assert list(results["rows"][0]["zeroshot"]) == ["one", "two"]
    assert [failure["set"] for failure in results["failures"]] == ["one (training)"]


def without_tokenizer(model: Path, name: str) -> Path:
    """A copy of a model folder that asks for a tokenizer which is not there."""
    folder = model.with_name(name)
    shutil.copytree(model, folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/words"
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_model_without_its_tokenizer_leaves_the_others(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = without_tokenizer(work / "model", "wordless")
    words = ["--zeroshot", str(work / "sets" / "two"), "--device", "cpu", "--out", str(work / "out")]
    assert cli.main(["eval", str(bad), str(work / "model"), *words]) == 1
    line = capsys.readouterr().err
    assert line.startswith("cloob: wordless could not be loaded: ") and line.count("\n") == 1
    assert f"{CONFIG_FILE}: text_cfg.hf_tokenizer_name asks for the tokenizer 'nobody/words'" in line
    results = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in results["rows"]] == ["model"] and results["rows"][0]["zeroshot"]["two"]["n"] == 4
    assert [(failure["model"], failure["set"]) for failure in results["failures"]] == [("wordless", None)]
    page = (work / "out" / "report.html").read_text(encoding="utf-8")
    assert "Models that could not be loaded" in page and "<dt>wordless</dt>" in page
    shutil.rmtree(work / "out")
    other = without_tokenizer(work / "model", "other")
    for models, said in (([bad], "wordless: "), ([bad, other], "none of 2 models can be loaded; wordless: ")):
        assert cli.main(["eval", *map(str, models), *words]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"cloob: {said}") and line.count("nobody/words") == len(models)
        assert line.count("\n") == 1 and not any((work / "out").glob("*.*"))


@pytest.mark.parametrize(
    ("odd", "said"),
    [({"inv_tau": "x"}, "inv_tau is 'x'"), ({"contrast": {}}, "the settings of its objective are not readable")],
    ids=["no number", "no name"],
)
def test_a_model_whose_objective_is_none_leaves_the_others(
    odd: dict[str, object], said: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = work / "odd"
    shutil.copytree(work / "model", bad)
    settings = json.loads((bad / "objective.json").read_text())
    (bad / "objective.json").write_text(json.dumps(settings | odd))
    # A name in brackets is no markup, and a class may have a name that is not UTF-8.
    folder = work / "sets" / "two [new]"
    shutil.copytree(work / "sets" / "two", folder)
    (folder / "red").rename(folder / os.fsdecode(b"caf\xe9"))
    words = ["--zeroshot", str(folder), "--device", "cpu", "--out", str(work / "out")]
    assert cli.main(["eval", str(bad), str(work / "model"), *words]) == 1
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1
    assert "two [new]" in told.out
    results = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in results["rows"]] == ["model"]
    assert (work / "out" / "report.html").is_file()


def test_every_kind_of_failure_names_its_file_as_it_was_typed(work: Path) -> None:
    """Also in a folder with a space in its name."""
    (work / "sets").rename(work / "my sets")
    sets, broken = work / "my sets", create_model("tiny-convnext", seed=0)
    next(broken.model.visual.parameters()).data.fill_(1e38)
    save_model(work / "a" / "model", broken, make_objective("cloob").config())
    (sets / "empty").mkdir()
    (sets / "one" / "train" / "green").mkdir()
    table = work / "pairs of mine.csv"
    table.write_text("filepath,title\n" + "".join(f"{sets}/two/{name}/0.png,{name}\n" for name in COLOURS))
    gone = work / "gone.csv"
    gone.write_text(f"filepath,title\n{work}/x y/1.png,a\n{work}/x y/2.png,b\n")
    models = [work / "model", work / "a" / "model", without_tokenizer(work / "model", "wordless"), work / "nowhere"]
    words = ["--suite", "pictograms", str(sets), "paper", str(work), "--probe", "--out", str(work / "out")]
    words += ["--retrieval", str(table), str(gone), "--device", "cpu"]
    assert cli.main(["eval", *map(str, models), *words]) == 1
    results = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in results["rows"]] == [f"{work.name}/model", "a/model"]
    said = {(failure["model"], failure["set"]): failure["error"] for failure in results["failures"]}
    assert said[None, "empty"].startswith(f"{sets}/empty has no sub-folder")
    assert said[None, "one (training)"].startswith(f"{sets}/one/train/green: no image in this class folder")
    assert f"not found under {work} (" in said[None, "country211"]
    assert said["wordless", None].startswith(f"{models[2]}/{CONFIG_FILE}: ")
    assert said["nowhere", None].startswith(f"{work}/nowhere: no such folder")
    assert f"is that of '{sets}/two/red/0.png'" in said["a/model", "pairs of mine.csv"]
    assert f"{work}/x y/1.png: missing image" in said["a/model", "gone.csv"]
    assert len(said) == len(results["failures"]) == 17


def test_without_a_terminal_there_is_a_line_at_each_tenth(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = {f"a {name} square {i}": rgb for i in range(8) for name, rgb in COLOURS.items()}
    write_pairs(work / "pairs", {f"{i}": (rgb, caption) for i, (caption, rgb) in enumerate(colours.items())})
    words = ["eval", str(work / "model"), "--retrieval", str(work / "pairs"), "--device", "cpu", "--batch-size", "1"]
    assert cli.main([*words, "--out", str(work / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cloob: embed ")]
    done = [2, 4, 5, 7, 8, 10, 12, 13, 15]  # of 16: after the last the table comes
    assert lines == [f"cloob: embed model: pairs{what}: {n} of 16" for what in ("", ", texts") for n in done]


def test_no_table_is_printed_that_has_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"rows": [{"model": "m", "retrieval": {}, "train_seconds": None}]})
    assert capsys.readouterr().out == ""


def test_models_are_called_by_the_least_that_tells_them_apart() -> None:
    assert list(named(["runs/a", "/x/b/", "RN50/openai", "."])) == ["a", "b", "openai", "."]
    sources = ["/runs/one/m", "/runs/two/m", "other/two/m", "m", "RN50/openai", "ViT-B-32/openai", "z", "z/"]
    names = ["one/m", "runs/two/m", "other/two/m", "m", "RN50/openai", "ViT-B-32/openai", "z", "z/"]
    assert named(sources) == dict(zip(names, sources, strict=True))


def test_sets_of_one_name_are_told_apart_by_their_folders(work: Path) -> None:
    for folder in ("a", "b"):
        shutil.copytree(work / "sets" / "one", work / folder / "one")
        lines = [f"../sets/two/{name}/0.png,{name} {folder}" for name in COLOURS]
        (work / folder / "val.csv").write_text("\n".join(["filepath,title", *lines]) + "\n")
    words = ["eval", str(work / "model"), "--device", "cpu", "--out", str(work / "out"), "--probe"]
    words += ["--zeroshot", str(work / "a" / "one"), str(work / "sets" / "two"), str(work / "b" / "one")]
    words += ["--retrieval", str(work / "a" / "val.csv"), str(work / "b" / "val.csv"), "demo:val"]
    assert cli.main(words) == 0
    row = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))["rows"][0]
    assert list(row["zeroshot"]) == ["a/one", "two", "b/one"] and list(row["probe"]) == ["a/one", "b/one"]
    assert list(row["retrieval"]) == ["a/val.csv", "b/val.csv", "demo:val"]
    assert (work / "out" / "report.html").is_file()


def test_several_captions_from_the_command_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = work / "sets" / "t.jsonl"
    rows = [{"image": f"two/{name}/0.png", "texts": [f"{name} one", f"{name} two"]} for name in COLOURS]
    table.write_text("\n".join(map(json.dumps, rows)) + "\n")
    named_columns = ["--image-column", "image", "--caption-column", "texts"]
    words = ["eval", str(work / "model"), "--retrieval", str(table), *named_columns]
    assert cli.main([*words, "--device", "cpu", "--out", str(work / "out")]) == 0
    assert f"analyze {work / 'model'} --pairs {table} {' '.join(named_columns)} --out" in capsys.readouterr().err
    found = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))["rows"][0]["retrieval"]["t.jsonl"]
    assert (found["n_images"], found["n"]) == (2, 4) and found["text_to_image@5"] == 1.0


def test_a_suite_of_which_nothing_is_there_ends_with_one_line_more(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(work / "model"), "--suite", "paper", str(work), "--out", str(work / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9 and "none of the 8 sets" in lines[-1]
    assert not (work / "out").exists()

"""``cloob eval`` from end to end on a tiny model: suites with missing sets, probes, the files, and a repeated run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cloob import cli
from cloob.models.store import save_model
from cloob.models.towers import create_model
from cloob.objective import make_objective

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def images(folder: Path, n: int) -> None:
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20 + i, 20), colour).save(folder / name / f"{i}.png")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", create_model("tiny-convnext", seed=0), make_objective("cloob").config())
    images(tmp_path / "sets" / "one" / "test", 3)
    images(tmp_path / "sets" / "one" / "train", 6)
    images(tmp_path / "sets" / "two", 2)
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
    assert row["probe"]["one"]["acc1"] == 1.0 and row["probe"]["one"]["n_train"] == 4
    names = {path.relative_to(work / "out").as_posix() for path in (work / "out").rglob("*") if path.is_file()}
    assert {
        "report.html",
        "clip_benchmark/one_model_en_linear_probe.json",
        "clip_benchmark/two_model_en_zeroshot_classification.json",
        "per_class/one.csv",
        "confusion/two--model.png",
    } <= names
    assert "Linear probe" in (work / "out" / "report.html").read_text(encoding="utf-8")

    def refuse(*_: object, **__: object) -> object:
        raise AssertionError("computed again")

    monkeypatch.setattr("cloob.models.store.load_model", refuse)
    monkeypatch.setattr("cloob.evaluate.store.fit_probe", refuse)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", refuse)
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "papper"], "no suite 'papper'"),
        (["--suite", "paper"], "--root DIR"),
        (["--suite", "pictograms", "nowhere"], "nowhere is no folder"),
        (["--zeroshot", "sets/two", "--probe"], "none of the sets has training images"),
        (["--zeroshot", "sets/two", "--shots", "3"], "add --probe"),
        (["--zeroshot", "sets/one", "--probe", "--shots", "0"], "shots is 0"),
    ],
)
def test_mistakes(
    words: list[str], said: str, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    assert cli.main(["eval", "model", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("cloob: ") and said in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("two/green/readme", b"", "two/green: no image in this class folder"),
        ("two/classnames.txt", b"a\nb\nc\n", "classnames.txt names 3 classes, but sets/two has 2 sub-folders"),
        ("two/templates.txt", b"{c}\na photo of {}\n", "templates.txt: line 2 has no {c} for the class name"),
    ],
)
def test_a_set_with_a_mistake_in_it(
    file: str,
    content: bytes,
    said: str,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (work / "sets" / file).parent.mkdir(exist_ok=True)
    (work / "sets" / file).write_bytes(content)
    monkeypatch.chdir(work)
    assert cli.main(["eval", "model", "--zeroshot", "sets/two", "--out", "out"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("cloob: sets/two") and said in line and line.count("\n") == 1
    assert not (work / "out").exists()


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
    next(broken.model.visual.parameters()).data.fill_(float("nan"))
    save_model(work / "nan", broken, make_objective("cloob").config())
    for part in ("train", "test"):
        (work / "sets" / "single" / part / "red").mkdir(parents=True)
        Image.new("RGB", (20, 20), COLOURS["red"]).save(work / "sets" / "single" / part / "red" / "0.png")
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


def test_several_captions_from_the_command_line(work: Path) -> None:
    table = work / "sets" / "t.jsonl"
    rows = [{"image": f"two/{name}/0.png", "texts": [f"{name} one", f"{name} two"]} for name in COLOURS]
    table.write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = [
        "eval",
        str(work / "model"),
        "--retrieval",
        str(table),
        "--image-column",
        "image",
        "--caption-column",
        "texts",
    ]
    assert cli.main([*words, "--device", "cpu", "--out", str(work / "out")]) == 0
    found = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))["rows"][0]["retrieval"]["t.jsonl"]
    assert (found["n_images"], found["n"]) == (2, 4) and found["text_to_image@5"] == 1.0


def test_a_suite_of_which_nothing_is_there_ends_with_one_line_more(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(work / "model"), "--suite", "paper", str(work), "--out", str(work / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9 and "none of the 8 sets" in lines[-1]
    assert not (work / "out").exists()

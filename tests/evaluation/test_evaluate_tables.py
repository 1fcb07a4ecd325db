"""The files beside results.json: CLIP_benchmark's schema and the classes' CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.suite import evaluate
from cloob.evaluation.tables import write_set_files
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs

NAMES = list(COLOURS)


def test_all_files_of_an_evaluation(tmp_path: Path) -> None:
    models = {"good": ColourModel(), "runs/bad": ColourModel(confused=[("red", "blue")])}
    data = Labels(NAMES * 2, broken=[1], name="lid")
    embeddings = Embeddings(models, tower=True)
    results = evaluate(embeddings, [data], [Pairs(NAMES)], training={"lid": Labels(NAMES * 6)})
    folders = write_set_files(tmp_path, results, embeddings, [data])
    assert [folder.name for folder in folders] == ["clip_benchmark", "per_class"]
    of_set = [("lid", "linear_probe"), ("lid", "zeroshot_classification"), ("pairs", "zeroshot_retrieval")]
    names = {f"{name}_{model}_en_{task}.json" for name, task in of_set for model in ("good", "runs-bad")}
    assert {path.name for path in (tmp_path / "clip_benchmark").iterdir()} == names
    text = (tmp_path / "per_class" / "lid.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["class"] for row in rows] == NAMES and {row["images"] for row in rows} == {"2"}
    assert [row["good: recall"] for row in rows] == ["1", "0.5", "1", "1", "1", "1"]
    assert rows[1]["good: mostly taken for"] == "(unreadable)" and rows[0]["good: mostly taken for"] == ""
    assert rows[0]["runs/bad: recall"] == "0" and rows[0]["runs/bad: mostly taken for"] == "blue"


def test_names_that_are_alike_as_file_names_keep_their_files(tmp_path: Path) -> None:
    """Also on systems that do not tell ``A`` from ``a``."""
    sets = [Labels(NAMES, name="my set"), Labels(NAMES[:1], name="my-set", classnames=NAMES[:2])]
    embeddings = Embeddings({"runs/a": ColourModel(), "runs-A": ColourModel()})
    results, per_class = write_set_files(tmp_path, evaluate(embeddings, sets), embeddings, sets)
    assert len({path.name.casefold() for path in results.iterdir()}) == 4
    lengths = {path.name: len(path.read_text().splitlines()) for path in per_class.iterdir()}
    assert lengths == {"my-set.csv": 7, "my-set-2.csv": 3}
    assert "1,green,0,,,," in (tmp_path / "per_class" / "my-set-2.csv").read_text()  # without images no recall


def test_clip_benchmarks_schema_says_not_where_a_model_lies(tmp_path: Path) -> None:
    """tests/interop has its ``build`` read the files."""
    sources = {"a": "RN50/openai", "b": tmp_path / "run", "c": f"local-dir:{tmp_path}/run", "d": "runs/d"}
    data = Labels(["red", "blue"], classnames=["red", "blue"])
    results = evaluate({name: ColourModel() for name in sources}, [data], [Pairs(NAMES)])
    write_set_files(tmp_path, results, Embeddings(sources), [])
    files = [json.loads(file.read_text()) for file in sorted((tmp_path / "clip_benchmark").iterdir())]
    retrieval, zeroshot = files[:4], files[4:]
    assert [file["pretrained"] for file in zeroshot] == ["RN50/openai", "b", "c", "runs/d"]
    assert zeroshot[0] == {
        "metrics": {"acc1": 1.0, "acc5": None, "mean_per_class_recall": 1.0},
        "dataset": "solid",
        "model": "a",
        "pretrained": "RN50/openai",
        "task": "zeroshot_classification",
        "language": "en",
    }
    assert retrieval[0]["task"] == "zeroshot_retrieval"
    assert retrieval[0]["metrics"]["image_retrieval_recall@5"] == 1.0

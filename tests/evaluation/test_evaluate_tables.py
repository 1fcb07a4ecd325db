"""The files beside results.json: CLIP_benchmark's schema and the classes' CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.suite import evaluate
from cloob.evaluation.tables import (
    write_clip_benchmark,
    write_per_class,
    write_set_files,
)
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs

NAMES = list(COLOURS)


def test_all_files_of_an_evaluation(tmp_path: Path) -> None:
    models = {"good": ColourModel(), "runs/bad": ColourModel(confused=[("red", "blue")])}
    data = Labels(NAMES * 2, broken=[1], name="lid")
    embeddings = Embeddings(models, tower=True)
    results = evaluate(embeddings, [data], [Pairs(NAMES)], training={"lid": Labels(NAMES * 6)})
    folders = write_set_files(tmp_path, results, embeddings, [data])
    assert [folder.name for folder in folders] == ["clip_benchmark", "per_class"]
    assert sorted(path.name for path in (tmp_path / "clip_benchmark").iterdir()) == [
        f"{name}_{model}_en_{task}.json"
        for name, model, task in (
            ("lid", "good", "linear_probe"),
            ("lid", "good", "zeroshot_classification"),
            ("lid", "runs-bad", "linear_probe"),
            ("lid", "runs-bad", "zeroshot_classification"),
            ("pairs", "good", "zeroshot_retrieval"),
            ("pairs", "runs-bad", "zeroshot_retrieval"),
        )
    ]
    text = (tmp_path / "per_class" / "lid.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["class"] for row in rows] == NAMES and {row["images"] for row in rows} == {"2"}
    assert [row["good: recall"] for row in rows] == ["1", "0.5", "1", "1", "1", "1"]
    assert rows[1]["good: mostly taken for"] == "(unreadable)" and rows[0]["good: mostly taken for"] == ""
    assert rows[0]["runs/bad: recall"] == "0" and rows[0]["runs/bad: mostly taken for"] == "blue"


def test_names_that_are_alike_as_file_names_keep_their_files(tmp_path: Path) -> None:
    """Also on systems that do not tell ``A`` from ``a``."""
    models = {"runs/a": ColourModel(), "runs-A": ColourModel(confused=[("red", "blue")])}
    sets = [Labels(NAMES, name="my set"), Labels(NAMES[:2], name="my-set", classnames=NAMES[:2])]
    embeddings = Embeddings(models)
    results = evaluate(embeddings, sets)
    folders = write_set_files(tmp_path, results, embeddings, sets)
    names = [sorted(path.name.casefold() for path in folder.iterdir()) for folder in folders]
    assert [len(set(found)) for found in names] == [4, 2]
    contents = [json.loads(path.read_text()) for path in (tmp_path / "clip_benchmark").iterdir()]
    assert len({(content["model"], content["dataset"]) for content in contents}) == 4
    lengths = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "per_class").iterdir()}
    assert lengths == {"my-set.csv": 7, "my-set-2.csv": 3}


def test_where_a_model_lies_is_not_written(tmp_path: Path) -> None:
    results = evaluate({name: ColourModel() for name in "abcd"}, [Labels(NAMES)])
    sources = {"a": "RN50/openai", "b": tmp_path / "run", "c": f"local-dir:{tmp_path}/run", "d": "runs/d"}
    write_set_files(tmp_path, results, Embeddings(sources), [])
    files = sorted((tmp_path / "clip_benchmark").iterdir())
    assert [json.loads(file.read_text())["pretrained"] for file in files] == ["RN50/openai", "b", "c", "runs/d"]


def test_clip_benchmarks_schema_goes_through_its_build(tmp_path: Path) -> None:
    data = Labels(["red", "blue"], classnames=["red", "blue"])
    results = evaluate({"m": ColourModel()}, [data], [Pairs(NAMES)])
    files = write_clip_benchmark(tmp_path, results, {"m": "runs/m"})
    rows = []
    for file in files:  # what `clip_benchmark build` does with each file
        content = json.loads(file.read_text(encoding="utf-8"))
        row = {**content["metrics"], **content}
        del row["metrics"]
        rows.append({**row, "model_fullname": row["model"] + " " + row["pretrained"]})
    assert rows[0] == {
        "acc1": 1.0,
        "acc5": None,
        "mean_per_class_recall": 1.0,
        "dataset": "solid",
        "model": "m",
        "pretrained": "runs/m",
        "task": "zeroshot_classification",
        "language": "en",
        "model_fullname": "m runs/m",
    }
    assert rows[1]["task"] == "zeroshot_retrieval" and rows[1]["image_retrieval_recall@5"] == 1.0


def test_a_class_without_images_has_no_recall(tmp_path: Path) -> None:
    write_per_class(tmp_path / "a.csv", ["x,y", "z"], {"m": torch.tensor([[0, 0, 0], [1, 2, 0]])})
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert text == 'label,class,images,m: recall,m: mostly taken for\n0,"x,y",0,,\n1,z,3,0.666667,"x,y"\n'

"""The evaluation's benchmark: what it cuts off its sets, and how it sums up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloob.evaluate.sets.labelled import open_labelled


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import evaluate

    return evaluate


def test_sets_are_the_first_images_with_all_classes(benchmark: Any, tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "zeroshot"
    made = benchmark.make_sets(source, tmp_path, ("road-signs", "tuxpaint-photos"), 7)
    for folder in made:
        few, whole = open_labelled(folder), open_labelled(source / folder.name)
        assert len(few) == 7 and few.classnames == whole.classnames and few.templates == whole.templates
        assert [few.read(i) for i in range(7)] == [whole.read(i) for i in range(7)]
        assert few.labels.tolist() == whole.labels[:7].tolist()


def test_the_five_sets_of_the_fewest_classes(benchmark: Any, shared_data: Path) -> None:
    classes = {folder.name: len(open_labelled(folder).classnames) for folder in (shared_data / "zeroshot").iterdir()}
    assert set(benchmark.FEW) == set(sorted(classes, key=lambda name: classes[name])[:5])
    assert list(benchmark.FIRST) == sorted(classes)[:5]


def test_ratios_are_those_of_the_medians(benchmark: Any) -> None:
    seconds = {"cloob command": [2.0, 1.0, 4.0], "clip_benchmark command": [3.0, 3.0, 9.0], "cloob again": [0.5]}
    found = benchmark.summary(seconds)
    assert found["command"]["ratio"] == 1.5 and found["command"]["ratios"] == [1.5, 3.0, 2.25]
    assert found["again"] == {"cloob": {"median_s": 0.5, "min_s": 0.5, "all_s": [0.5]}} and "evaluation" not in found


def test_images_apart(benchmark: Any, tmp_path: Path) -> None:
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    row = {"zeroshot": {"a": {"acc1": 0.5, "n": 200}}}
    (tmp_path / "ours" / "results.json").write_text(json.dumps({"rows": [row]}))
    (tmp_path / "theirs" / "a.json").write_text(json.dumps({"metrics": {"acc1": 0.49}}))
    assert benchmark.images_apart(tmp_path / "ours", tmp_path / "theirs") == {"a": (200, 2.0)}

"""Geometry over checkpoints, similar pictures and duplicates, against hand-made features and plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cloob import cli
from cloob.evaluation.analysis import analyze, duplicate_groups, similar_pairs
from cloob.evaluation.embed import embed_pairs
from cloob.evaluation.measures.geometry import geometry
from cloob.models.folder import save_model
from cloob.models.towers import create_model
from cloob.objective import make_objective
from evaluate_fakes import COLOURS, Pairs
from support import write_pairs

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of 5 steps, with checkpoints at steps 5 and 10 that are two untrained models."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for seed, step in enumerate((5, 10)):
        place = folder / "checkpoints" / f"step-{step:08d}" / "model"
        save_model(place, create_model("tiny-convnext", seed=seed), make_objective("cloob", beta=6.0).config())
    lines = [json.dumps({"epoch": epoch, "step": 5 * epoch, "samples": 10}) for epoch in (1, 2)]
    (folder / "epochs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_every_checkpoint_of_a_run_is_measured(run: Path) -> None:
    source = Pairs([*NAMES, "red"])
    found = analyze({"mine": run, "alone": run / "checkpoints" / "step-00000005"}, source, similar=2)
    mine, alone = found["runs"]
    assert [(c["step"], c["epoch"]) for c in mine["checkpoints"]] == [(5, 1.0), (10, 2.0)]
    assert [(c["step"], c["epoch"]) for c in alone["checkpoints"]] == [(None, None)]
    pairs = embed_pairs(create_model("tiny-convnext", seed=1), source)
    expected = geometry(pairs.images.features, pairs.texts, 30.0, 6.0)
    assert mine["geometry"]["ajne_image"] == pytest.approx(expected["ajne_image"], rel=1e-4)
    assert mine["geometry"]["effective_eigenvalues_text"] == expected["effective_eigenvalues_text"]
    assert mine["checkpoints"][0]["ajne_image"] == alone["checkpoints"][0]["ajne_image"]
    assert mine["similar"][0]["keys"] == ["p0", "p6"] and mine["similar"][0]["captions"] == ["red", "red"]
    assert ["p0", "p6"] in [group[:1] + group[-1:] for group in mine["duplicates"]]
    assert len(mine["similar"]) == 2 and "failures" not in found


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_rest_is_there(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = copy / "checkpoints" / "step-00000005" / "model" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found = analyze({"copy": copy}, Pairs(NAMES))
    assert [c["step"] for c in found["runs"][0]["checkpoints"]] == [10]
    assert found["failures"][0]["model"] == "copy, step 5" and "damaged" in found["failures"][0]["error"]
    assert found["failures"][0]["error"].startswith(f"{copy}/checkpoints/step-00000005/model/")


@pytest.mark.parametrize("chunk", [3, 100])
def test_similar_pairs_against_a_loop(chunk: int) -> None:
    x = torch.nn.functional.normalize(torch.randn(11, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    x[4] = torch.nan
    cells = [(i, j) for i in range(11) for j in range(i + 1, 11) if 4 not in (i, j)]
    expected = sorted(cells, key=lambda cell: -float(x[cell[0]] @ x[cell[1]]))
    for k in (0, 1, 9, 1000):
        assert [pair[:2] for pair in similar_pairs(x, k, chunk)] == expected[:k]
    # Of pairs that are equally similar the earlier come first.
    alike = torch.eye(2)[[int(i % 3 == 0) for i in range(30)]]
    cells = [(i, j) for i in range(30) for j in range(i + 1, 30) if (i % 3 == 0) == (j % 3 == 0)]
    assert [pair[:2] for pair in similar_pairs(alike, 20, chunk)] == cells[:20]


@pytest.mark.parametrize("chunk", [2])
def test_duplicates_are_linked_through_others(chunk: int) -> None:
    angles = torch.tensor([0.0, 2.0, 0.02, 1.0, 0.04, 2.01, torch.nan])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    # cos 0.02 = 0.9998, cos 0.04 = 0.9992: 0 and 4 are linked by 2 alone.
    assert duplicate_groups(x, 0.9995, chunk) == [[0, 2, 4], [1, 5]]
    assert duplicate_groups(x, 0.99999, chunk) == []


def test_the_command_writes_its_page_and_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = {f"{i}": (COLOURS[name], f"{name}\nmore of {name}\n") for i, name in enumerate(NAMES)}
    write_pairs(tmp_path / "pairs", captions, (40, 40))
    (tmp_path / "pairs" / "6.png").write_bytes(b"no picture")
    (tmp_path / "pairs" / "6.txt").write_text("lost", encoding="utf-8")
    out = tmp_path / "out"
    words = ["analyze", str(run), "--pairs", str(tmp_path / "pairs"), "--out", str(out), "--device", "cpu"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "effective eigenvalues, images" in printed and "report.html" in printed
    found = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert len(found["runs"][0]["checkpoints"]) == 2 and found["runs"][0]["geometry"]["n"] == 6
    assert found["runs"][0]["unreadable"] == {"corrupt image": 1}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Effective eigenvalues during training" in page and page.count('class="twin-images"') == 15
    assert "1 images or captions could not be read (corrupt image × 1); they are in no measure" in page
    # From the cache: in analysis.json the last bit of a product may differ with where its factors lie in memory.
    assert cli.main(words) == 0 and (out / "report.html").read_text(encoding="utf-8") == page
    capsys.readouterr()
    assert cli.main(["analyze", f"{tmp_path}/nowhere", *words[1:]]) == 1
    line, what_next = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cloob: {tmp_path}/nowhere: no such") and line.count("nowhere") == 1
    assert what_next.startswith(f"next: cloob eval {run} --retrieval")

"""Geometry over checkpoints, similar pictures and duplicates, against hand-made features and plain loops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cloob import cli
from cloob.evaluation.analysis import analyze, similar_pairs
from cloob.evaluation.embed import embed_pairs
from cloob.evaluation.measures import geometry
from cloob.models.towers import create_model
from cloob.search.alike import partition
from evaluate_fakes import COLOURS, Pairs
from make import tiny_model, write_pairs

NAMES = list(COLOURS)
WEIGHTS = "open_clip_model.safetensors"


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}" / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of 5 steps with a checkpoint each: two untrained models, and a file that was cut."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for seed, step in enumerate((10, 15)):
        tiny_model(checkpoint(folder, step), seed=seed, beta=6.0)
    cut = shutil.copytree(checkpoint(folder, 10), checkpoint(folder, 5)) / WEIGHTS
    cut.write_bytes(cut.read_bytes()[:1000])
    lines = [json.dumps({"epoch": epoch, "step": 5 * epoch, "samples": 10}) for epoch in (1, 2, 3)]
    (folder / "epochs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_every_checkpoint_of_a_run_is_measured_and_a_damaged_one_named(run: Path) -> None:
    source = Pairs([*NAMES, "red"])
    found = analyze({"mine": run, "alone": checkpoint(run, 10).parent}, source, similar=2, groups=partition)
    mine, alone = found["runs"]
    assert [(c["step"], c["epoch"]) for c in mine["checkpoints"]] == [(10, 2.0), (15, 3.0)]
    assert [(c["step"], c["epoch"]) for c in alone["checkpoints"]] == [(None, None)]
    pairs = embed_pairs(create_model("tiny-vit", seed=1), source)
    expected = geometry(pairs.images.features, pairs.texts, 30.0, 6.0)
    assert mine["geometry"]["ajne_image"] == pytest.approx(expected["ajne_image"], rel=1e-4)
    assert mine["checkpoints"][0]["ajne_image"] == alone["checkpoints"][0]["ajne_image"]
    assert mine["similar"][0]["keys"] == ["p0", "p6"] and mine["similar"][0]["captions"] == ["red", "red"]
    assert ["p0", "p6"] in [group[:1] + group[-1:] for group in mine["duplicates"]] and len(mine["similar"]) == 2
    (failure,) = found["failures"]
    assert failure["model"] == "mine, step 5" and "cannot be read" in failure["error"]
    assert failure["error"].startswith(f"{checkpoint(run, 5)}/")


def test_similar_pairs_against_a_loop() -> None:
    x = torch.nn.functional.normalize(torch.randn(11, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    x[4] = torch.nan
    cells = [(i, j) for i in range(11) for j in range(i + 1, 11) if 4 not in (i, j)]
    expected = sorted(cells, key=lambda cell: -float(x[cell[0]] @ x[cell[1]]))
    for k in (0, 1, 9, 1000):
        assert [pair[:2] for pair in similar_pairs(x, k, chunk=3)] == expected[:k]
    alike = similar_pairs(torch.ones(6, 1), 7, chunk=2)  # of equal pairs the earlier come first
    assert [pair[:2] for pair in alike] == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3)]


def test_the_command_writes_its_page_and_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = {f"{i}": (COLOURS[name], f"{name}\nmore of {name}\n") for i, name in enumerate(NAMES)}
    write_pairs(tmp_path / "pairs", captions, (40, 40))
    (tmp_path / "pairs" / "6.png").write_bytes(b"no picture")
    (tmp_path / "pairs" / "6.txt").write_text("lost", encoding="utf-8")
    out = tmp_path / "out"
    words = ["analyze", str(run), "--pairs", str(tmp_path / "pairs"), "--out", str(out), "--device", "cpu"]
    assert cli.main(words) == 1
    printed = capsys.readouterr()
    assert "effective eigenvalues image" in printed.out and "report.html" in printed.out
    assert f"next: cloob eval {run} --retrieval" in printed.err
    assert "cloob: pairs: 1 images or captions could not be read" in printed.err
    found = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert len(found["runs"][0]["checkpoints"]) == 2 and found["runs"][0]["geometry"]["n"] == 6
    assert found["runs"][0]["unreadable"] == {"corrupt image": 1}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Effective eigenvalues during training" in page and page.count('class="twin-images"') == 15
    assert "1 images or captions could not be read (corrupt image × 1); they are in no measure" in page

"""CLIP_benchmark with our model type: its contract here, itself in an environment of its own (nightly)."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from cloob.errors import InputError
from cloob.evaluate.suite import evaluate
from cloob.evaluate.tables import write_clip_benchmark
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.towers import create_model
from cloob.objective import make_objective

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", create_model("tiny-vit", seed=0), make_objective("cloob").config())
    return tmp_path / "model"


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, imported beside the two names that it takes from CLIP_benchmark 1.6.2."""
    package, models = ModuleType("clip_benchmark"), ModuleType("clip_benchmark.models")
    models.TYPE2FUNC = {"open_clip": None, "ja_clip": None}  # type: ignore[attr-defined]
    models.MODEL_TYPES = list(models.TYPE2FUNC)  # type: ignore[attr-defined]
    package.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clip_benchmark", package)
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", models)
    monkeypatch.delitem(sys.modules, "cloob.interop.clip_benchmark", raising=False)
    import cloob.interop.clip_benchmark as adapter

    yield adapter
    sys.modules.pop("cloob.interop.clip_benchmark", None)


def test_the_import_registers_the_model_type(adapter: Any, model: Path) -> None:
    models = sys.modules["clip_benchmark.models"]
    adapter.register()
    assert models.MODEL_TYPES == ["open_clip", "ja_clip", "cloob"]
    # As load_clip of CLIP_benchmark calls it.
    load = models.TYPE2FUNC["cloob"]
    encoder, transform, tokenizer = load(model_name=str(model), pretrained="x", cache_dir=None, device="cpu")
    image = Image.new("RGB", (50, 40), (200, 30, 90))
    own = load_model(model)
    with torch.no_grad():
        images = encoder.eval().encode_image(torch.stack([transform(image)] * 2))
        assert torch.equal(images, own.encode_image([image] * 2))
        assert torch.equal(encoder.encode_text(tokenizer(["a cat"])), own.encode_text(["a cat"]))


def test_what_a_command_line_leaves_out(adapter: Any) -> None:
    words = adapter.with_defaults(["eval", "--model", "runs/demo/cloob", "--dataset", "wds/flags"])
    output = "{dataset}_cloob_{language}_{task}.json"
    assert words[5:] == ["--model_type", "cloob", "--pretrained", "cloob", "--output", output]
    given = ["eval", "--model_type=open_clip", "--model", "a", "--pretrained", "b", "--output", "c"]
    assert adapter.with_defaults(given) == given
    theirs = ["eval", "--model", "ViT-B-32", "--model_type", "open_clip", "--dataset", "x"]
    for other in ([], ["build", "x.json"], ["eval", "--help"], theirs, ["eval", "--pretrained_model", "RN50,openai"]):
        assert adapter.with_defaults(other) == other
    with pytest.raises(InputError, match="--output: name the results of 2 models yourself"):
        adapter.with_defaults(["eval", "--model", "runs/a", "runs/b", "--dataset", "x"])


@pytest.mark.parametrize("name", ["clip_benchmark", "mteb"])
def test_without_the_package_the_command_line_says_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``python -m`` runs the module."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"cloob.interop.{name}", raising=False)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(f"cloob.interop.{name}", run_name="__main__")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cloob: ") and "is not installed; pip install -e" in line


@pytest.fixture(scope="module")
def python() -> str:
    """An environment with CLIP_benchmark in it, from PyPI."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.overlay import CLIP_BENCHMARK, overlay
    finally:
        sys.path.remove(str(ROOT))
    try:
        return overlay(CLIP_BENCHMARK)
    except RuntimeError as error:
        pytest.skip(f"CLIP_benchmark cannot be installed here: {error}")


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_set_through_clip_benchmark(python: str, model: Path, shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "zeroshot" / "tuxpaint-photos"
    worker = Path(__file__).with_name("clip_benchmark_worker.py")
    subprocess.run([python, str(worker), str(model), str(data), str(tmp_path)], check=True, stderr=subprocess.PIPE)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["types"] == ["open_clip", "ja_clip", "cloob"] and not found["training"]
    assert found["cloob"]["metrics"] == pytest.approx(found["open_clip"]["metrics"], abs=1e-12)
    from cloob.evaluate.sets.labelled import open_labelled

    ours = evaluate({"m": model}, [open_labelled(data)])["rows"][0]["zeroshot"][data.name]
    assert found["cloob"]["metrics"] == pytest.approx({k: ours[k] for k in found["cloob"]["metrics"]}, abs=1e-9)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_its_build_reads_our_files(python: str, model: Path, shared_data: Path, tmp_path: Path) -> None:
    from cloob.evaluate.sets.captioned import open_captioned
    from cloob.evaluate.sets.labelled import open_labelled

    sets = [open_labelled(shared_data / "zeroshot" / name) for name in ("tuxpaint-photos", "road-signs")]
    pairs = [open_captioned(shared_data / "retrieval" / "tuxpaint-captions")]
    results = evaluate({"a": model}, sets, pairs)
    files = write_clip_benchmark(tmp_path / "clip_benchmark", results, {"a": str(model)})
    command = [python, "-m", "clip_benchmark.cli", "build", str(tmp_path / "clip_benchmark")]
    subprocess.run([*command, "--output", str(tmp_path / "all.csv")], check=True, capture_output=True)
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(files) == 3
    for name, numbers in results["rows"][0]["zeroshot"].items():
        assert float(rows[name]["acc1"]) == numbers["acc1"] and rows[name]["task"] == "zeroshot_classification"
    recall = results["rows"][0]["retrieval"]["tuxpaint-captions"]["text_to_image@5"]
    assert float(rows["tuxpaint-captions"]["image_retrieval_recall@5"]) == recall
    assert rows["road-signs"]["model_fullname"] == f"a {model}"


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_parity_to_the_last_image(python: str, model: Path, shared_data: Path) -> None:
    script = ROOT / "benchmarks" / "parity_clip_benchmark.py"
    data = shared_data / "zeroshot" / "road-signs"
    command = [sys.executable, str(script), str(model), str(data), "--python", python]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["images_apart"] == {"acc1": 0, "acc5": 0}

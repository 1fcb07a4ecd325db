"""``load_model`` of an ONNX folder: the rows of the model that it was made of, and what it cannot do."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from cloob import load_model
from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.runs import ONNX_FILE
from support import refused, run_script

TEXTS = ["a dog", "", "two cats & a bird", "long " * 100, "Tom &amp; Jerry", *(f"number {i}" for i in range(40))]


@pytest.fixture(scope="module")
def loaded(exported: Path) -> DualEncoder:
    return load_model(exported, device="cpu")


@pytest.mark.parametrize("n", [0, 1, 7, 45])
def test_rows_are_the_models(model: DualEncoder, loaded: DualEncoder, n: int) -> None:
    pixels = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    for own, wanted in (
        (loaded.encode_image(pixels), model.encode_image(pixels)),
        (loaded.encode_image(pixels.float() / 255), model.encode_image(pixels.float() / 255)),
        (loaded.encode_text(TEXTS[:n]), model.encode_text(TEXTS[:n])),
        (loaded.encode_text(TEXTS[::-1][:n]), model.encode_text(TEXTS[::-1][:n])),
    ):
        assert own.shape == wanted.shape and own.dtype == torch.float32
        torch.testing.assert_close(own, wanted, rtol=0, atol=5e-5)


def test_what_else_it_says_is_the_models(model: DualEncoder, loaded: DualEncoder, exported: Path) -> None:
    graphs = {f"onnx/{name}.onnx{end}" for name in ("vision_model", "text_model", "model") for end in ("", "_data")}
    made = {path.relative_to(exported).as_posix() for path in exported.rglob("*.*")}
    assert made >= graphs | {"tokenizer.json", "tokenizer_config.json", "config.json", "README.md"}
    assert loaded.config.kind == "onnx" and loaded.config.settings["precision"] == "float32"
    for name in ("name", "embed_dim", "context_length", "image_size", "mean", "std", "preprocess_cfg"):
        assert getattr(loaded, name) == getattr(model, name)
    objective = loaded.make_objective()
    assert float(objective.inv_tau) == pytest.approx(30) and float(objective.beta) == pytest.approx(8)


def test_a_copy_runs(loaded: DualEncoder) -> None:
    copy = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(copy.encode_text(TEXTS[:3]), loaded.encode_text(TEXTS[:3]))


def test_graphs_that_are_not_there_or_are_others_are_one_line(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "m")
    content = json.loads((folder / ONNX_FILE).read_text(encoding="utf-8"))
    (folder / ONNX_FILE).write_text(json.dumps(content | {"fingerprint": "0" * 64}), encoding="utf-8")
    with pytest.raises(InputError, match=r"onnx\.json: damaged"):
        load_model(folder)
    (folder / "onnx" / "text_model.onnx").unlink()
    with pytest.raises(InputError, match=r"text_model\.onnx"):
        load_model(folder)


def test_commands_that_need_weights_say_so(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ("train", "--data", "demo:val", "--steps", "1", "--device", "cpu", "--init", str(exported), "--out")
    for words in (train, ("convert", str(exported)), ("export", "--to", "onnx", str(exported))):
        assert "an ONNX export embeds" in refused(capsys, *words, str(tmp_path / "out"))
        assert not list(tmp_path.glob("out/*"))


def test_nothing_of_open_clip_is_imported_and_onnxruntime_is_asked_for(exported: Path) -> None:
    script = """
import sys
from PIL import Image
from cloob import load_model
model = load_model(sys.argv[1])
model.encode_text(["a dog"]); model.encode_image([Image.new("RGB", (80, 70))])
print([name for name in ("open_clip", "torchvision", "timm", "transformers", "onnx") if name in sys.modules])
sys.modules["onnxruntime"] = None
try:
    load_model(sys.argv[1]).encode_text(["a"])
except Exception as error:
    print(error)
"""
    run = run_script(script, str(exported))
    imported, said = run.stdout.splitlines()
    assert imported == "[]" and "onnxruntime is not installed" in said and "[export]" in said, run.stderr


def test_no_path_of_this_machine_is_in_the_graphs(exported: Path) -> None:
    for path in (exported / "onnx").glob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content and str(Path.home()).encode() + b"/" not in content
        assert b"stack_trace" not in content

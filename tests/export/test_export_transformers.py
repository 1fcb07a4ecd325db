"""``cloob export --to transformers``: what transformers and sentence-transformers compute of the folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import OBJECTIVE, RESNET, VISION, same_rows, write_model

from cloob import cli, load_model
from cloob.errors import InputError
from make import noise_image
from support import overlaid, refused

TEXTS = ["a dog", "", "Two  RED hearts!", "it's 3 o'clock", "naïve 日本語", "long " * 40]


def export(source: Path, target: Path) -> Path:
    assert cli.main(["export", str(source), str(target), "--to", "transformers"]) == 0
    return target


@pytest.mark.parametrize("changes", [{"quick_gelu": True}, {"text": {"act_kwargs": {"approximate": "tanh"}}}])
def test_features_are_those_of_open_clip(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    source = write_model(tmp_path / "model", **changes)
    folder = export(source, tmp_path / "out")
    encoder = load_model(source, device="cpu")
    theirs, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    cut = {"padding": True, "truncation": True, "max_length": encoder.context_length, "return_tensors": "pt"}
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = theirs.get_image_features(pixels), theirs.get_text_features(**tokenizer(TEXTS, **cut))
        own = encoder.model.encode_image(pixels), encoder.model.encode_text(encoder.tokenizer(TEXTS))
    for rows, expected in zip(found, own, strict=True):
        torch.testing.assert_close(getattr(rows, "pooler_output", rows), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.1


def test_special_tokens_have_hugging_faces_names_and_real_numbers(exported: Path) -> None:
    text = json.loads((exported / "config.json").read_text())["text_config"]
    assert (text["bos_token_id"], text["eos_token_id"], text["pad_token_id"]) == (49406, 49407, 49407)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.convert_ids_to_tokens([49406, 49407]) == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.model_max_length == 16
    assert tokenizer("<|endoftext|>")["input_ids"] == [49406, 49407, 49407]


def test_the_way_to_resize_comes_back(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    source = write_model(tmp_path / "model")
    config = json.loads((source / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5, 0.4, 0.3]}
    (source / "open_clip_config.json").write_text(json.dumps(config))
    folder, original = export(source, tmp_path / "out"), load_model(source, device="cpu")
    here = load_model(folder, device="cpu")
    assert here.preprocess_cfg["resize_mode"] == "squash" and here.preprocess_cfg["interpolation"] == "bilinear"
    same_rows(here, original)
    saved = tmp_path / "saved"  # transformers 5 puts the processor into processor_config.json alone
    CLIPModel.from_pretrained(folder).save_pretrained(saved)
    CLIPProcessor.from_pretrained(folder).save_pretrained(saved)
    again = load_model(saved, device="cpu")
    same_rows(again, original)
    assert again.objective_config == OBJECTIVE
    content = json.loads((saved / "config.json").read_text())
    for stored, said in (({}, "does not say what it was trained with"), ({"beta": -1}, "beta is -1")):
        (saved / "config.json").write_text(json.dumps(content | {"cloob": stored}))
        with pytest.raises(InputError, match=said):
            load_model(saved, device="cpu").make_objective()


@pytest.mark.nightly
def test_sentence_transformers_a_pipeline_and_the_page_read_it(exported: Path, small: Path, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "export.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    snippets = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "models/mine-hf" in code]
    assert len(snippets) == 3 or not page.is_file()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine-hf").symlink_to(exported)
    worker = Path(__file__).with_name("reading_worker.py")
    words = [str(worker), str(exported), str(small), json.dumps(snippets)]
    done = subprocess.run([sys.executable, "-W", "error", *words], cwd=tmp_path, timeout=200, check=False)
    assert done.returncode == 0


SENTENCE_TRANSFORMERS = """
import sys, numpy
from PIL import Image
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
numpy.savez(sys.argv[2], texts=model.encode(["a dog"]), pictures=model.encode([Image.open(sys.argv[3])]))
"""
INFINITY = """
import asyncio, sys, numpy
from PIL import Image
from infinity_emb import AsyncEmbeddingEngine, EngineArgs
async def main():
    folder = sys.argv[1]
    settings = EngineArgs(model_name_or_path=folder, engine="torch", device="cpu", model_warmup=False)
    engine = AsyncEmbeddingEngine.from_args(settings)
    async with engine:
        texts, _ = await engine.embed(["a dog"])
        pictures, _ = await engine.image_embed(images=[Image.open(sys.argv[3])])
    numpy.savez(sys.argv[2], texts=texts, pictures=pictures)
asyncio.run(main())
"""
# Without its requirements, of which numpy below 2 does not fit the other packages here.
OF_INFINITY = "infinity-emb==0.0.78 sentence-transformers==3.4.1 transformers==4.57.6 datasets==3.6.0"


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("code", "packages"),
    [
        (SENTENCE_TRANSFORMERS, "sentence-transformers==5.4.1"),
        (SENTENCE_TRANSFORMERS, "sentence-transformers==5.1.2 transformers<5 datasets<4"),
        (INFINITY, f"--no-deps {OF_INFINITY} huggingface_hub==0.36.2 tokenizers==0.22.2"),
    ],
    ids=["sentence-transformers 5.4", "sentence-transformers 5.1", "infinity"],
)
def test_other_readers_give_our_rows(code: str, packages: str, exported: Path, small: Path, tmp_path: Path) -> None:
    python = overlaid(*packages.split())
    noise_image(0, 32, 32).save(tmp_path / "picture.png")
    words = [str(exported), str(tmp_path / "rows.npz"), str(tmp_path / "picture.png")]
    done = subprocess.run([python, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows, model = np.load(tmp_path / "rows.npz"), load_model(small, device="cpu")
    assert np.abs(rows["texts"] - model.encode_text(["a dog"]).numpy()).max() < 1e-5
    assert np.abs(rows["pictures"] - model.encode_image([tmp_path / "picture.png"]).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_cfg": RESNET}, "its image tower is of class ModifiedResNet"),
        ({"text": {"no_causal_mask": True}}, "its text tower is not CLIP's causal one"),
        ({"text": {"ls_init_value": 0.1}}, "CLIPModel has no place for transformer.resblocks.0.ls_1.gamma"),
        ({"vision_cfg": VISION | {"pool_type": "avg"}}, "CLIPModel computes another image feature"),
        ({"init_logit_bias": -10.0}, "CLIPModel has no place for logit_bias"),
        ({"text": {"vocab_size": 50}}, "it takes tokens, not texts"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_other_towers_are_refused_in_one_line_that_says_what_takes_them(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "model", **changes)
    if changes.get("text", {}).get("vocab_size"):
        config = json.loads((source / "open_clip_config.json").read_text())
        config["tokenizer"] = {"kind": "clip", "specials": ["<a>", "<b>"], "ending": "kept"}
        (source / "open_clip_config.json").write_text(json.dumps(config))
    error = refused(capsys, "export", str(source), str(tmp_path / "out"), "--to", "transformers")
    assert said in error and "--to onnx takes it" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_targets(exported: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, overwrite = ("--to", "transformers"), ("--to", "transformers", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "exists and is no export" in refused(capsys, "export", str(small), str(tmp_path / "mine"), *words)
    assert "exists and is no export" in refused(capsys, "export", str(small), str(small), *overwrite)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    target = shutil.copytree(exported, tmp_path / "my export")
    (target / "old").write_text("")
    assert "--overwrite replaces it" in refused(capsys, "export", str(small), str(target), *words)
    assert "where the model comes from" in refused(capsys, "export", str(target), str(target), *overwrite)
    assert cli.main(["export", str(small), str(target), *overwrite, "--license", "mit"]) == 0
    assert not (target / "old").exists()
    advised = f"  or: cloob push {small} me/model --license mit --dry-run\n"  # the hub takes no space
    assert capsys.readouterr().err.endswith(advised)

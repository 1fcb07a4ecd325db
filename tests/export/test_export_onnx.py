"""``cloob export --to onnx``: towers of each kind, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_model
from torch import Tensor

from cloob import cli, load_model
from cloob.errors import InputError
from cloob.export.onnx import Tower, export_onnx, towers_of, worst_difference
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.aligned.heads import Head
from cloob.models.aligned.model import aligned_encoder
from cloob.models.encoder import DualEncoder
from cloob.models.towers import create_model
from make import noise_image, write_bert
from support import originals, run_script

pytest.importorskip("onnxscript")
PROGRAMS = ["mljku/rn_full_vocab/published_like.pt", "crowsonkb/full_vocab/slim.pkl", "rinna/bert"]
PROGRAMS += ["openai/vit/vit-jit.pt", "hf_clip/vit_gelu", "open_clip/vit_quickgelu"]


def same_rows(own: DualEncoder, wanted: DualEncoder, atol: float = 1e-5) -> None:
    """Holds the rows of pictures and tokens of two encoders against each other."""
    for n in (1, 2, 7):
        source = torch.Generator().manual_seed(n)
        size, length = wanted.image_size, wanted.context_length
        pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=source)
        tokens = wanted.tokenizer(["a red car", "the old house of a tree", "", "x", "is there", "a " * 99, "blue"][:n])
        assert tokens.shape == (n, length)
        torch.testing.assert_close(own.encode_image(pixels), wanted.encode_image(pixels), rtol=0, atol=atol)
        torch.testing.assert_close(own.encode_text(tokens), wanted.encode_text(tokens), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = {"width": 16, "heads": 2, "layers": 1}
    return write_model(tmp_path_factory.mktemp("vit") / "small", text=text)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_full_disk_is_called_so(vit: Path, tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys; from cloob import cli; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(cli.main(sys.argv[1:]))"
    )
    done = run_script(script, "export", str(vit), str(tmp_path / "out"), "--to", "onnx")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"cloob: {tmp_path / 'out'}: cannot be written (")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_torch_is_imported(vit: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['onnxscript'] = sys.modules['tokenizers'] = None; from cloob import cli;"
        "print(cli.main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    for to, package in (("onnx", "onnxscript"), ("transformers", "tokenizers")):
        done = run_script(script, "export", str(vit), str(tmp_path / "out"), "--to", to)
        assert done.stdout == "2 False\n" and f"{package} is not installed" in done.stderr, done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-convnext"])
def test_our_towers(tmp_path: Path, name: str) -> None:
    wanted = create_model(name, seed=0).eval()
    export_onnx(wanted, tmp_path)
    same_rows(load_model(tmp_path, device="cpu"), wanted)


@pytest.mark.nightly
@pytest.mark.parametrize("name", PROGRAMS)
def test_other_programs_weights(tmp_path: Path, name: str) -> None:
    wanted = load_model(str(originals(name)), device="cpu")
    export_onnx(wanted, tmp_path)
    own = load_model(tmp_path, device="cpu")
    tokens = torch.randint(1, 100, (7, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = getattr(towers_of(wanted)[1].module, "end", None) or 1  # a row without it would get it
    torch.testing.assert_close(own.encode_text(tokens), wanted.encode_text(tokens), rtol=0, atol=1e-5)


@pytest.mark.nightly
def test_heads_of_align_with_their_encoders(vit: Path, tmp_path: Path) -> None:
    words = write_bert(tmp_path / "bert")
    image, text = open_image_encoder(str(vit), load_model), open_text_encoder(f"hf:{words}", load_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = Head(image.features, 6, "mlp"), Head(text.features, 6, "linear")
    wanted = aligned_encoder(image, text, *heads, {"image_encoder": str(vit), "text_encoder": f"hf:{words}"}).eval()
    (tmp_path / "made").mkdir()
    export_onnx(wanted, tmp_path / "made")
    own = load_model(tmp_path / "made", device="cpu")
    same_rows(own, wanted)
    texts = ["a red car", "", "the old tree is there " * 9, "nothing known"]
    torch.testing.assert_close(own.encode_text(texts), wanted.encode_text(texts), rtol=0, atol=1e-5)
    assert own.config.settings["pad"] == 0


def test_a_graph_that_computes_something_else_is_refused(vit: Path) -> None:
    for tower in towers_of(load_model(vit, device="cpu")):
        assert worst_difference("m", tower, tower.module) < 1e-5

        def off(items: Tensor, tower: Tower = tower) -> Tensor:
            rows: Tensor = tower.module(items) + 2e-4 * (len(items) == 7)
            return rows

        with pytest.raises(InputError, match=r"off by 0\.0002 .*nothing is written"):
            worst_difference("m", tower, off)
        with pytest.raises(InputError, match="off by inf"):
            worst_difference("m", tower, lambda items: torch.full((len(items), 12), torch.nan))


@pytest.mark.nightly
def test_int8_is_smaller_and_close(vit: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    assert cli.main(["export", str(vit), str(target), "--to", "onnx", "--int8"]) == 0
    assert "Entries of unit rows differ" in (target / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]
    own, wanted = load_model(target, device="cpu"), load_model(vit, device="cpu")
    assert own.config.settings["precision"] == "int8"
    assert sum(path.stat().st_size for path in target.glob("onnx/text_model*")) < 0.5 * 4 * 49408 * 16
    same_rows(own, wanted, atol=0.1)


# The export read by transformers.js, where Node finds the package by NODE_PATH


pytest.importorskip("onnxscript")
SCRIPT = Path(__file__).with_name("transformers_js.cjs")
TEXTS = ["a photo of a dog", "", "far too long " * 40, "it's “quoted”, fine & WIDE", "ΟΔΥΣΣΕΥ 日本語 <x>"]


def node(*words: str) -> Any:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run(["node", *words], capture_output=True, text=True, env=os.environ, timeout=300)
    if "Cannot find module '@huggingface/transformers'" in done.stderr:
        pytest.skip("node finds no @huggingface/transformers: npm install it and set NODE_PATH")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_rows_and_scores_are_the_models(tmp_path: Path, dtype: str) -> None:
    node("-e", "require('@huggingface/transformers'); console.log(0)")  # skips before the export, which takes a while
    source, folder = write_model(tmp_path / "small"), tmp_path / "exported"
    words = ["export", str(source), str(folder), "--to", "onnx", *(["--int8"] if dtype == "q8" else [])]
    assert cli.main(words) == 0
    picture = tmp_path / "picture.png"
    noise_image(0, 32, 32).save(picture)
    own_texts, own_pictures, scores = node(str(SCRIPT), str(folder), dtype, str(picture), json.dumps(TEXTS))
    model = load_model(folder, device="cpu")
    texts, pictures = model.encode_text(TEXTS), model.encode_image([picture])
    torch.testing.assert_close(torch.tensor(own_texts), texts, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(own_pictures), pictures, rtol=0, atol=1e-4)
    wanted = (model.model.logit_scale.exp() * pictures @ texts.T).softmax(-1)[0].tolist()
    found = {row["label"]: row["score"] for row in scores}
    assert [found[text] for text in TEXTS] == pytest.approx(wanted, abs=1e-4)

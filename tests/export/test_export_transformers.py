"""``cloob export``: towers of each kind, what other programs compute of the folder, and
what is refused.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import OBJECTIVE, RESNET, VISION, same_rows, write_model

from cloob import cli, load_model
from cloob.errors import InputError
from cloob.export.onnx import export_onnx, towers_of, worst_difference
from cloob.heads.head import Head, Members
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.aligned.model import aligned_encoder
from cloob.models.tokenizer import ClipTokenizer
from cloob.models.towers import create_model
from make import noise_image, write_bert
from support import originals, overlaid, refused, run_script

TEXTS = [
    "a dog",
    "",
    "Two  RED hearts!",
    "it's 3 o'clock",
    "naïve 日本語",
    "long " * 40,
]


def _export(source, target, *words):
    return cli.main(["export", str(source), "--out", str(target), *words])


def export(source, target):
    assert _export(source, target, "--to", "transformers") == 0
    return target


@pytest.mark.parametrize(
    "changes", [{"quick_gelu": True}, {"text": {"act_kwargs": {"approximate": "tanh"}}}]
)
def test_features_are_those_of_open_clip(changes, tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    source = write_model(tmp_path / "model", **changes)
    folder = export(source, tmp_path / "out")
    encoder = load_model(source, device="cpu")
    theirs = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut = {
        "padding": True,
        "truncation": True,
        "max_length": encoder.context_length,
        "return_tensors": "pt",
    }
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = (
            theirs.get_image_features(pixels),
            theirs.get_text_features(**tokenizer(TEXTS, **cut)),
        )
        own = (
            encoder.model.encode_image(pixels),
            encoder.model.encode_text(encoder.tokenizer(TEXTS)),
        )
    for rows, expected in zip(found, own, strict=True):
        torch.testing.assert_close(
            getattr(rows, "pooler_output", rows), expected, atol=1e-5, rtol=0
        )
        assert expected.std() > 0.1


def test_special_tokens_have_hugging_faces_names_and_real_numbers(exported):
    text = json.loads((exported / "config.json").read_text())["text_config"]
    assert (text["bos_token_id"], text["eos_token_id"], text["pad_token_id"]) == (
        49406,
        49407,
        49407,
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.convert_ids_to_tokens([49406, 49407]) == [
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    assert tokenizer.model_max_length == 16
    assert tokenizer("<|endoftext|>")["input_ids"] == [49406, 49407, 49407]


def test_the_way_to_resize_comes_back(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    source = write_model(tmp_path / "model")
    config = json.loads((source / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "mean": [0.5, 0.4, 0.3],
    }
    (source / "open_clip_config.json").write_text(json.dumps(config))
    folder = export(source, tmp_path / "out")
    original = load_model(source, device="cpu")
    here = load_model(folder, device="cpu")
    assert here.preprocess_cfg["resize_mode"] == "squash"
    assert here.preprocess_cfg["interpolation"] == "bilinear"
    same_rows(here, original)
    saved = (
        tmp_path / "saved"
    )  # transformers 5 puts the processor into processor_config.json alone
    CLIPModel.from_pretrained(folder).save_pretrained(saved)
    CLIPProcessor.from_pretrained(folder).save_pretrained(saved)
    again = load_model(saved, device="cpu")
    same_rows(again, original)
    assert again.objective_config == OBJECTIVE
    content = json.loads((saved / "config.json").read_text())
    for stored, said in (
        ({}, "does not say what it was trained with"),
        ({"beta": -1}, "beta is -1"),
    ):
        (saved / "config.json").write_text(json.dumps(content | {"cloob": stored}))
        with pytest.raises(InputError, match=said):
            load_model(saved, device="cpu").make_objective()


@pytest.mark.nightly
def test_sentence_transformers_a_pipeline_and_the_page_read_it(
    exported, small, tmp_path
):
    page = Path(__file__).parents[2] / "docs" / "export.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    snippets = [
        code
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "models/mine-hf" in code
    ]
    assert len(snippets) == 3 or not page.is_file()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine-hf").symlink_to(exported)
    worker = Path(__file__).with_name("reading_worker.py")
    words = [str(worker), str(exported), str(small), json.dumps(snippets)]
    done = subprocess.run(
        [sys.executable, "-W", "error", *words], cwd=tmp_path, timeout=200, check=False
    )
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
OF_INFINITY = (
    "infinity-emb==0.0.78 sentence-transformers==3.4.1 transformers==4.57.6"
    " datasets==3.6.0"
)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("code", "packages"),
    [
        (SENTENCE_TRANSFORMERS, "sentence-transformers==5.4.1"),
        (
            SENTENCE_TRANSFORMERS,
            "sentence-transformers==5.1.2 transformers<5 datasets<4",
        ),
        (
            INFINITY,
            f"--no-deps {OF_INFINITY} huggingface_hub==0.36.2 tokenizers==0.22.2",
        ),
    ],
    ids=["sentence-transformers 5.4", "sentence-transformers 5.1", "infinity"],
)
def test_other_readers_give_our_rows(code, packages, exported, small, tmp_path):
    python = overlaid(*packages.split())
    noise_image(0, 32, 32).save(tmp_path / "picture.png")
    words = [str(exported), str(tmp_path / "rows.npz"), str(tmp_path / "picture.png")]
    done = subprocess.run(
        [python, "-c", code, *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = np.load(tmp_path / "rows.npz")
    model = load_model(small, device="cpu")
    assert np.abs(rows["texts"] - model.encode_text(["a dog"]).numpy()).max() < 1e-5
    assert (
        np.abs(
            rows["pictures"] - model.encode_image([tmp_path / "picture.png"]).numpy()
        ).max()
        < 1e-5
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_cfg": RESNET}, "its image tower is of class ModifiedResNet"),
        ({"text": {"no_causal_mask": True}}, "its text tower is not CLIP's causal one"),
        (
            {"text": {"ls_init_value": 0.1}},
            "CLIPModel has no place for transformer.resblocks.0.ls_1.gamma",
        ),
        (
            {"vision_cfg": VISION | {"pool_type": "avg"}},
            "CLIPModel computes another image feature",
        ),
        ({"init_logit_bias": -10.0}, "CLIPModel has no place for logit_bias"),
        ({"text": {"vocab_size": 50}}, "it takes tokens, not texts"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_other_towers_are_refused_in_one_line_that_says_what_takes_them(
    changes, said, tmp_path, capsys
):
    source = write_model(tmp_path / "model", **changes)
    if changes.get("text", {}).get("vocab_size"):
        config = json.loads((source / "open_clip_config.json").read_text())
        config["tokenizer"] = {
            "kind": "clip",
            "specials": ["<a>", "<b>"],
            "ending": "kept",
        }
        (source / "open_clip_config.json").write_text(json.dumps(config))
    words = ("--out", str(tmp_path / "out"), "--to", "transformers")
    error = refused(capsys, "export", str(source), *words)
    assert said in error
    assert "--to onnx takes it" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_gives_other_tokens_is_refused(
    small, tmp_path, capsys, monkeypatch
):
    encode = ClipTokenizer.encode

    def with_one_word_more(tokenizer, text, pieces):
        return encode(tokenizer, f"{text} dog", pieces)

    monkeypatch.setattr(ClipTokenizer, "encode", with_one_word_more)
    words = ("export", str(small), "--out", str(tmp_path / "out"))
    error = refused(capsys, *words, "--to", "transformers")
    assert "transformers makes other tokens of 'a photo of a dog'" in error
    assert not list(tmp_path.iterdir())


def test_a_licence_is_one_word(small, tmp_path, capsys):
    words = ("export", str(small), "--out", str(tmp_path / "x"), "--to", "transformers")
    line = refused(capsys, *words, "--license", "my own licence")
    assert "it must be one word of the hub's" in line


def test_targets(exported, small, tmp_path, capsys):
    words = ("--to", "transformers")
    overwrite = ("--to", "transformers", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "exists and is no export" in refused(
        capsys, "export", str(small), "--out", str(tmp_path / "mine"), *words
    )
    assert "exists and is no export" in refused(
        capsys, "export", str(small), "--out", str(small), *overwrite
    )
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    target = shutil.copytree(exported, tmp_path / "my export")
    (target / "old").write_text("")
    assert "--overwrite replaces it" in refused(
        capsys, "export", str(small), "--out", str(target), *words
    )
    assert "where the model comes from" in refused(
        capsys, "export", str(target), "--out", str(target), *overwrite
    )
    assert _export(small, target, *overwrite, "--license", "mit") == 0
    assert not (target / "old").exists()


# --to onnx


pytest.importorskip("onnxscript")
PROGRAMS = [
    "mljku/rn_full_vocab/published_like.pt",
    "crowsonkb/full_vocab/slim.pkl",
    "rinna/bert",
]
PROGRAMS += ["openai/vit/vit-jit.pt", "hf_clip/vit_gelu", "open_clip/vit_quickgelu"]


def same_pictures_and_tokens(own, wanted, atol=1e-5):
    """Holds the rows of pictures and tokens of two encoders against each other."""
    for n in (1, 2, 7):
        source = torch.Generator().manual_seed(n)
        size = wanted.image_size
        length = wanted.context_length
        pixels = torch.randint(
            0, 256, (n, 3, size, size), dtype=torch.uint8, generator=source
        )
        tokens = wanted.tokenizer(
            [
                "a red car",
                "the old house of a tree",
                "",
                "x",
                "is there",
                "a " * 99,
                "blue",
            ][:n]
        )
        assert tokens.shape == (n, length)
        torch.testing.assert_close(
            own.encode_image(pixels), wanted.encode_image(pixels), rtol=0, atol=atol
        )
        torch.testing.assert_close(
            own.encode_text(tokens), wanted.encode_text(tokens), rtol=0, atol=atol
        )


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    text = {"width": 16, "heads": 2, "layers": 1}
    return write_model(tmp_path_factory.mktemp("vit") / "small", text=text)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_full_disk_is_called_so(vit, tmp_path):
    script = (
        "import resource, signal, sys; from cloob import cli;"
        " signal.signal(signal.SIGXFSZ,"
        " signal.SIG_IGN);resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        " sys.exit(cli.main(sys.argv[1:]))"
    )
    done = run_script(
        script, "export", str(vit), f"--out={tmp_path / 'out'}", "--to", "onnx"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"cloob: {tmp_path / 'out'}: cannot be written (")
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-convnext"])
def test_our_towers(tmp_path, name):
    wanted = create_model(name, seed=0).eval()
    export_onnx(wanted, tmp_path)
    same_pictures_and_tokens(load_model(tmp_path, device="cpu"), wanted)


@pytest.mark.nightly
@pytest.mark.parametrize("name", PROGRAMS)
def test_other_programs_weights(tmp_path, name):
    wanted = load_model(str(originals(name)), device="cpu")
    export_onnx(wanted, tmp_path)
    own = load_model(tmp_path, device="cpu")
    tokens = torch.randint(1, 100, (7, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = (
        getattr(towers_of(wanted)[1].module, "end", None) or 1
    )  # a row without it would get it
    torch.testing.assert_close(
        own.encode_text(tokens), wanted.encode_text(tokens), rtol=0, atol=1e-5
    )


@pytest.mark.nightly
@pytest.mark.parametrize("is_joined", [False, True])
def test_heads_of_align_with_their_encoders(vit, tmp_path, is_joined):
    """Whatever heads do to columns is part of the graphs."""
    words = write_bert(tmp_path / "bert")
    image = open_image_encoder(str(vit), load_model)
    text = open_text_encoder(f"hf:{words}", load_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = [
            Head(image.features, 6, "mlp", columns="log"),
            Head(image.features, 6, standardise="column", columns="root"),
            Head(text.features, 6, "fourier", columns="ranks"),
            Head(text.features, 6),
        ]
        for head in heads:
            rows = torch.randn(100, head.options["features"])
            head.fit(rows)
            if head.kind == "fourier":
                head.draw_waves(rows, 1.0, seed=0)
    if is_joined:
        heads = [
            Members(heads[:2], side=0, rows=20),
            Members(heads[2:], side=1, rows=20),
        ]
        for head in heads:
            head.bank.copy_(torch.eye(20, 12))
    else:
        heads = heads[::2]
    wanted = aligned_encoder(
        image, text, *heads, {"image_encoder": str(vit), "text_encoder": f"hf:{words}"}
    ).eval()
    (tmp_path / "made").mkdir()
    export_onnx(wanted, tmp_path / "made")
    own = load_model(tmp_path / "made", device="cpu")
    same_pictures_and_tokens(own, wanted)
    texts = ["a red car", "", "the old tree is there " * 9, "nothing known"]
    torch.testing.assert_close(
        own.encode_text(texts), wanted.encode_text(texts), rtol=0, atol=1e-5
    )
    assert own.config.settings["pad"] == 0


def test_a_graph_that_computes_something_else_is_refused(vit):
    for tower in towers_of(load_model(vit, device="cpu")):
        assert worst_difference("m", tower, tower.module) < 1e-5

        def off(items, tower=tower):
            return tower.module(items) + 2e-4 * (len(items) == 7)

        with pytest.raises(InputError, match=r"off by 0\.0002 .*nothing is written"):
            worst_difference("m", tower, off)
        with pytest.raises(InputError, match="off by inf"):
            worst_difference(
                "m", tower, lambda items: torch.full((len(items), 12), torch.nan)
            )


# The export read by transformers.js, where Node finds the package by NODE_PATH


SCRIPT = Path(__file__).with_name("transformers_js.cjs")
ODD_TEXTS = [
    "a photo of a dog",
    "",
    "far too long " * 40,
    "it's “quoted”, fine & WIDE",
    "ΟΔΥΣΣΕΥ 日本語 <x>",
]


def node(*words):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run(
        ["node", *words], capture_output=True, text=True, env=os.environ, timeout=300
    )
    if "Cannot find module '@huggingface/transformers'" in done.stderr:
        pytest.skip(
            "node finds no @huggingface/transformers: npm install it and set NODE_PATH"
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.nightly
def test_rows_and_scores_are_the_models(tmp_path):
    node(
        "-e", "require('@huggingface/transformers'); console.log(0)"
    )  # skips before the export, which takes a while
    source = write_model(tmp_path / "small")
    folder = tmp_path / "exported"
    assert _export(source, folder, "--to", "onnx") == 0
    picture = tmp_path / "picture.png"
    noise_image(0, 32, 32).save(picture)
    own_texts, own_pictures, scores = node(
        str(SCRIPT), str(folder), "fp32", str(picture), json.dumps(ODD_TEXTS)
    )
    model = load_model(folder, device="cpu")
    texts = model.encode_text(ODD_TEXTS)
    pictures = model.encode_image([picture])
    torch.testing.assert_close(torch.tensor(own_texts), texts, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(own_pictures), pictures, rtol=0, atol=1e-4)
    wanted = (
        (model.model.logit_scale.exp() * pictures @ texts.T).softmax(-1)[0].tolist()
    )
    found = {row["label"]: row["score"] for row in scores}
    assert [found[text] for text in ODD_TEXTS] == pytest.approx(wanted, abs=1e-4)

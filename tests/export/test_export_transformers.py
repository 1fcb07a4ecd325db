"""``cloob export``: towers of each kind, what other programs compute of the folder, and
what is refused.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import OBJECTIVE, RESNET, TEXTS, VISION, same_rows, write_model
from torch.testing import assert_close

from cloob import cli, load_model
from cloob.errors import InputError
from cloob.export.onnx import export_onnx, towers_of, worst_difference
from cloob.heads.head import Head, Members
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.tokenizer import ClipTokenizer
from cloob.models.towers import create_model
from make import noise_image, write_bert
from support import originals, overlaid, raises, read_json, refused, seeded


def _export(source, target, *words):
    return cli.main(["export", str(source), "--out", str(target), *words])


def export(source, target):
    assert _export(source, target, "--to", "transformers") == 0
    return target


def features_of(model, **inputs):
    """Pictures' and texts' features by transformers."""
    pixels = model.get_image_features(inputs.pop("pixels"))
    texts = model.get_text_features(**inputs)
    return [getattr(rows, "pooler_output", rows) for rows in (pixels, texts)]


@pytest.mark.parametrize(
    "changes", [{"quick_gelu": True}, {"text": {"act_kwargs": {"approximate": "tanh"}}}]
)
def test_features_are_those_of_open_clip(changes, tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    source = write_model(tmp_path / "model", **changes)
    folder = export(source, tmp_path / "out")
    encoder = load_model(source, device="cpu")
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(folder).eval()
        images, texts = features_of(theirs, pixels=pixels, **tokens)
        own_images = encoder.model.encode_image(pixels)
        own_texts = encoder.model.encode_text(encoder.tokenizer(TEXTS))
    assert_close(images, own_images, atol=1e-5, rtol=0)
    assert_close(texts, own_texts, atol=1e-5, rtol=0)
    assert own_images.std() > 0.1
    assert own_texts.std() > 0.1


def test_special_tokens_have_hugging_faces_names_and_real_numbers(exported):
    from transformers import AutoTokenizer

    text = read_json(exported / "config.json")["text_config"]
    assert text["bos_token_id"] == 49406
    assert text["eos_token_id"] == text["pad_token_id"] == 49407
    tokenizer = AutoTokenizer.from_pretrained(exported)
    names = tokenizer.convert_ids_to_tokens([49406, 49407])
    assert names == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.model_max_length == 16
    assert tokenizer("<|endoftext|>")["input_ids"] == [49406, 49407, 49407]


def test_the_way_to_resize_comes_back(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    source = write_model(tmp_path / "model")
    path = source / "open_clip_config.json"
    resize = {"interpolation": "bilinear", "resize_mode": "squash"}
    config = read_json(path)
    config["preprocess_cfg"] = resize | {"mean": [0.5, 0.4, 0.3]}
    path.write_text(json.dumps(config))
    folder = export(source, tmp_path / "out")
    original = load_model(source, device="cpu")
    here = load_model(folder, device="cpu")
    assert resize.items() <= here.preprocess_cfg.items()
    same_rows(here, original)
    # transformers 5 puts the processor into processor_config.json alone
    saved = tmp_path / "saved"
    CLIPModel.from_pretrained(folder).save_pretrained(saved)
    CLIPProcessor.from_pretrained(folder).save_pretrained(saved)
    again = load_model(saved, device="cpu")
    same_rows(again, original)
    assert again.objective_config == OBJECTIVE
    content = read_json(saved / "config.json")
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
    snippets = []
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(snippets) == 3
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine-hf").symlink_to(exported)
    worker = Path(__file__).with_name("reading_worker.py")
    words = [str(worker), str(exported), str(small), json.dumps(snippets)]
    command = [sys.executable, "-W", "error", *words]
    done = subprocess.run(command, cwd=tmp_path, timeout=200, check=False)
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
    picture = tmp_path / "picture.png"
    rows = tmp_path / "rows.npz"
    noise_image(0, 32, 32).save(picture)
    command = [python, "-c", code, str(exported), str(rows), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(rows)
    model = load_model(small, device="cpu")
    expected = {
        "texts": model.encode_text(["a dog"]),
        "pictures": model.encode_image([picture]),
    }
    for name, own in expected.items():
        np.testing.assert_allclose(found[name], own, atol=1e-5, rtol=0)


OTHER_TOWERS = [
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
]


@pytest.mark.parametrize(
    ("changes", "said"),
    OTHER_TOWERS,
)
def test_other_towers_are_refused_in_one_line_that_says_what_takes_them(
    changes, said, tmp_path, capsys
):
    source = write_model(tmp_path / "model", **changes)
    if changes.get("text", {}).get("vocab_size"):
        path = source / "open_clip_config.json"
        tokenizer = {"kind": "clip", "specials": ["<a>", "<b>"], "ending": "kept"}
        config = read_json(path) | {"tokenizer": tokenizer}
        path.write_text(json.dumps(config))
    words = f"export {source} --out {tmp_path}/out --to transformers"
    error = refused(capsys, words)
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
    words = f"export {small} --out {tmp_path}/out --to transformers"
    error = refused(capsys, words)
    assert "transformers makes other tokens of 'a photo of a dog'" in error
    assert not list(tmp_path.iterdir())


def test_a_licence_is_one_word(small, tmp_path, capsys):
    words = f"export {small} --out {tmp_path}/x --to transformers"
    line = refused(capsys, f"{words} --license 'my own licence'")
    assert "it must be one word of the hub's" in line


def test_targets(exported, small, tmp_path, capsys):
    mine = tmp_path / "mine"
    target = tmp_path / "my export"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    shutil.copytree(exported, target)
    (target / "old").write_text("")
    new = ("--to", "transformers")
    anew = ("--to", "transformers", "--overwrite")
    for source, out, words, said in (
        (small, mine, new, "exists and is no export"),
        (small, small, anew, "exists and is no export"),
        (small, target, new, "--overwrite replaces it"),
        (target, target, anew, "where the model comes from"),
    ):
        line = refused(capsys, ["export", source, "--out", out, *words])
        assert said in line
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert _export(small, target, *anew, "--license", "mit") == 0
    assert not (target / "old").exists()


# --to onnx


pytest.importorskip("onnxscript")
PROGRAMS = [
    "mljku/rn_full_vocab/published_like.pt",
    "crowsonkb/full_vocab/slim.pkl",
    "rinna/bert",
]
PROGRAMS += ["openai/vit/vit-jit.pt", "hf_clip/vit_gelu", "open_clip/vit_quickgelu"]


WORDS = ["a red car", "the old house of a tree", "", "x", "is there", "a " * 99, "blue"]


def same_pictures_and_tokens(own, wanted, atol=1e-5):
    """Holds the rows of pictures and tokens of two encoders against each other."""
    size = wanted.image_size
    for n in (1, 2, 7):
        source = seeded(n)
        shape = (n, 3, size, size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
        tokens = wanted.tokenizer(WORDS[:n])
        assert tokens.shape == (n, wanted.context_length)
        for kind, items in (("encode_image", pixels), ("encode_text", tokens)):
            found = getattr(own, kind)(items)
            expected = getattr(wanted, kind)(items)
            assert_close(found, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    text = {"width": 16, "heads": 2, "layers": 1}
    return write_model(tmp_path_factory.mktemp("vit") / "small", text=text)


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
    tokens = torch.randint(1, 100, (7, 77), generator=seeded(0))
    expected = wanted.encode_text(tokens)
    assert_close(own.encode_text(tokens), expected, rtol=0, atol=1e-5)


def heads_of(image, text, is_joined):
    """Heads of both encoders that do all that heads do to columns."""
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
    if not is_joined:
        return heads[::2]
    members = [Members(heads[2 * i : 2 * i + 2], side=i, rows=20) for i in range(2)]
    for each in members:
        each.bank.copy_(torch.eye(20, 12))
    return members


@pytest.mark.nightly
@pytest.mark.parametrize("is_joined", [False, True])
def test_heads_of_align_with_their_encoders(vit, tmp_path, is_joined):
    """Whatever heads do to columns is part of the graphs."""
    words = f"hf:{write_bert(tmp_path / 'bert')}"
    image = open_image_encoder(str(vit), load_model)
    text = open_text_encoder(words, load_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = heads_of(image, text, is_joined)
    names = {"image_encoder": str(vit), "text_encoder": words}
    wanted = AlignedEncoder(image, text, heads, names).eval()
    folder = tmp_path / "made"
    folder.mkdir()
    export_onnx(wanted, folder)
    own = load_model(folder, device="cpu")
    same_pictures_and_tokens(own, wanted)
    texts = ["a red car", "", "the old tree is there " * 9, "nothing known"]
    expected = wanted.encode_text(texts)
    assert_close(own.encode_text(texts), expected, rtol=0, atol=1e-5)
    assert own.config.settings["pad"] == 0


def test_a_graph_that_computes_something_else_is_refused(vit):
    for tower in towers_of(load_model(vit, device="cpu")):
        assert worst_difference("m", tower, tower.module) < 1e-5

        def off(items, tower=tower):
            return tower.module(items) + 2e-4 * (len(items) == 7)

        def spoilt(items):
            return torch.full((len(items), 12), torch.nan)

        raises(
            InputError, r"off by 0\.0002 .*nothing", worst_difference, "m", tower, off
        )
        raises(InputError, "off by inf", worst_difference, "m", tower, spoilt)

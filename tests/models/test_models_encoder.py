"""DualEncoder and create_model: what goes in (names, seeds, pixels, files, texts), and
the rows that come out.

Pixels by Pillow alone and tokens are those of open_clip, also of the tokenizer in an
ONNX folder.
"""

import copy
import functools
import json
import pickle
from pathlib import Path

import ftfy
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pyarrow import parquet
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode

from cloob.errors import InputError
from cloob.export.exported import tokenizer_note
from cloob.models.aligned.encoders import fold_norms
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.folder import save_model
from cloob.models.importing import open_clip
from cloob.models.load import load_model
from cloob.models.pixels import EvalTransform
from cloob.models.source import TINY_MODELS
from cloob.models.tokenizer import (
    CLIP_VOCABULARY,
    ClipTokenizer,
    clip_tokenizer,
    read_tokenizer,
    store_tokenizer,
)
from cloob.models.towers import create_model
from cloob.objective import make_objective
from make import noise_image, tiny_model
from support import (
    fill_hub_cache,
    free_port,
    raises,
    read_json,
    run_cloob,
    seeded,
    use_hub,
)

TEXTS = ["a red apple", "bus", "two dogs in the rain"]


@pytest.fixture(scope="module", params=TINY_MODELS)
def encoder(request, lively):
    return lively(request.param)


def test_pictures_and_texts_in_every_form_are_the_same_unit_rows(encoder, tmp_path):
    sizes = (64, 64), (100, 80), (40, 90)
    images = [noise_image(seed, 8, 6).resize(size) for seed, size in enumerate(sizes)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    mean = torch.tensor(encoder.mean).view(3, 1, 1)
    std = torch.tensor(encoder.std).view(3, 1, 1)
    tokens = encoder.tokenizer(TEXTS)
    close = functools.partial(assert_close, rtol=0)
    with torch.no_grad():
        rows = encoder.encode_image(pixels), encoder.encode_text(TEXTS)
        for inputs in (images, [*map(str, paths)], (pixels / 255 - mean) / std):
            close(encoder.encode_image(inputs), rows[0], atol=1e-6)
        close(encoder.encode_image(pixels, batch_size=2), rows[0], atol=3e-5)
        close(encoder.encode_text(TEXTS, batch_size=1), rows[1], atol=1e-5)
        assert_close(encoder.encode_text(tokens), rows[1])
        assert_close(encoder(pixels, tokens), rows)
        with torch.autocast("cpu", torch.bfloat16):
            low = encoder(pixels, tokens)
    for features in (*rows, *low):
        assert features.shape == (3, 256)
        assert features.dtype == torch.float32
        assert_close(features.norm(dim=1), torch.ones(3))
    # and different pictures differ
    assert (rows[0] @ rows[0].T).fill_diagonal_(0).max() < 0.999


def test_no_graph_is_kept_unless_asked_for(lively):
    """A row that holds its graph holds every activation on the way to it."""
    resnet = lively("tiny-resnet")
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    for encode, inputs in ((resnet.encode_image, pixels), (resnet.encode_text, TEXTS)):
        rows = encode(inputs)
        assert rows.grad_fn is None
        assert not rows.requires_grad
        recorded = encode(inputs, grad=True)
        assert torch.equal(recorded, rows)
        assert recorded.requires_grad
        recorded.sum().backward()
        with torch.no_grad():
            assert not encode(inputs, grad=True).requires_grad
    for p in (resnet.model.visual.conv1.weight, resnet.model.text_projection):
        assert p.grad is not None


def test_a_loaded_model_makes_the_objective_that_it_was_trained_with(tmp_path):
    trained = make_objective("infonce-hopfield", inv_tau=20.0, beta=15.0)
    save_model(
        tmp_path / "m",
        create_model("tiny-vit", seed=0),
        trained.config() | {"gather": True},
    )
    encoder = load_model(tmp_path / "m")
    objective = encoder.make_objective()
    assert objective.name == "infonce-hopfield"
    assert not objective.gather
    assert float(objective.inv_tau) == 20.0
    assert float(objective.beta) == 15.0
    assert float(encoder.make_objective(beta=3.0).beta) == 3.0
    without_beta = {"contrast": "infoloob", "hopfield": True, "inv_tau": 30.0}
    unknown = {"contrast": "triplet", "hopfield": False}
    for config, said in (
        ({}, "does not say what it was trained with"),
        (without_beta, r"which β .*; give make_objective\(beta=…\)"),
        (unknown, "cannot be used"),
    ):
        encoder.objective_config = config
        raises(InputError, said, encoder.make_objective)


def test_embed_takes_texts_from_lines_and_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(Path("model"))
    Path("texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    parquet.write_table(pa.table({"caption": TEXTS}), "texts.parquet")
    for source, out in (
        ("texts.txt", "lines.npy"),
        ("texts.parquet:caption", "column.npy"),
    ):
        run_cloob(f"embed model --texts {source} --out {out}")
        assert_close(
            torch.from_numpy(np.load(out)),
            load_model("model", "cpu").encode_text(TEXTS),
        )


def test_another_models_tokenizer_is_one_line():
    encoder = create_model("tiny-vit", seed=0)
    encoder.model.token_embedding = nn.Embedding(
        32, encoder.model.token_embedding.embedding_dim
    )
    raises(
        InputError,
        "tiny-vit: tokens of another model's tokenizer",
        encoder.encode_text,
        ["a"],
    )


def test_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    first = create_model("tiny-resnet", seed=0).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = create_model("tiny-resnet", seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key])
    other = create_model("tiny-resnet", seed=1).state_dict()
    name = "model.token_embedding.weight"
    assert not torch.equal(first[name], other[name])


def test_a_file_of_open_clips_training_with_siglip(tmp_path):
    trained = create_model("tiny-vit", seed=0)
    weights = trained.model.state_dict() | {"logit_bias": torch.tensor(-3.0)}
    weights["logit_scale"] = torch.tensor(10.0).log()
    state = {f"module.{key}": value.contiguous() for key, value in weights.items()}
    file = tmp_path / "run" / "checkpoints" / "epoch_3.pt"
    file.parent.mkdir(parents=True)
    (tmp_path / "run" / "params.txt").write_text("epochs: 3\nmodel: tiny-vit\n")
    optimizer = torch.optim.AdamW(trained.model.parameters()).state_dict()
    torch.save(
        {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer}, file
    )
    encoder = create_model("tiny-vit", pretrained=str(file), seed=1)
    assert encoder.objective_config["bias"] == -3.0
    assert encoder.objective_config["inv_tau"] == pytest.approx(10.0)
    assert encoder.config == trained.config
    assert not encoder.model.logit_scale.requires_grad
    assert encoder.model.visual.proj.requires_grad
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    by_its_path = load_model(file)  # ../params.txt names its towers
    assert by_its_path.name == "tiny-vit"
    assert by_its_path.objective_config == encoder.objective_config
    assert torch.equal(by_its_path.model.visual.proj, weights["visual.proj"])


def test_a_tag_brings_its_weights_activation_and_pixels(tower, tmp_path, monkeypatch):
    """From the hub's cache.

    OpenAI's weights were trained with QuickGELU; ViT-B-32's configuration alone says
    GELU.
    """
    fill_hub_cache(tmp_path, "some/tiny", tower)
    use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path)
    tag = {
        "hf_hub": "some/tiny/",
        "quick_gelu": True,
        "mean": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
    }
    monkeypatch.setitem(open_clip().pretrained._PRETRAINED, "tiny-vit", {"mine": tag})
    encoder = load_model("tiny-vit/mine")
    assert type(encoder.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert encoder.config.settings["quick_gelu"] is True
    assert encoder.mean == (0.5, 0.5, 0.5)
    assert encoder.preprocess_cfg["interpolation"] == "bilinear"
    assert torch.equal(encoder.model.visual.proj, load_model(tower).model.visual.proj)


# Short texts at their own length: the towers' own answer, its gradient, and the towers
# as they were


PADDED = [
    "a",
    "a photo of a cat.",
    "a picture of " + "very " * 12 + "small bird",
    "",
    "word " * 200,
]


@pytest.mark.parametrize(
    "custom", [False, True], ids=["", "a text tower that is a module"]
)
def test_the_padding_has_no_part_in_an_embedding_nor_in_a_gradient(custom):
    encoder = create_model("tiny-vit", seed=0).eval()
    library = open_clip()
    if custom:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = library.create_model("tiny-vit", force_custom_text=True)
        config = EncoderConfig.open_clip(library.get_model_config("tiny-vit"))
        encoder = DualEncoder(
            "custom", model, library.get_tokenizer("tiny-vit"), config
        ).eval()
    for texts in (PADDED[:4], PADDED):
        with torch.no_grad():
            short = encoder.encode_text(texts)
            padded = encoder.model.encode_text(encoder.tokenizer(texts))
        assert_close(short, F.normalize(padded, dim=1), rtol=0, atol=2e-6)
    weights = torch.randn(2, encoder.embed_dim, generator=seeded(0))

    def gradients(rows):
        encoder.zero_grad()
        (rows * weights).sum().backward()
        return {
            name: p.grad.clone()
            for name, p in encoder.named_parameters()
            if p.grad is not None
        }

    padded = encoder.model.encode_text(encoder.tokenizer(PADDED[:2]))
    cut = gradients(encoder.encode_text(PADDED[:2], grad=True))
    whole = gradients(F.normalize(padded, dim=1))
    encoder.zero_grad()
    assert cut.keys() == whole.keys()
    assert any("positional" in name for name in cut)
    for name, gradient in whole.items():
        assert_close(
            cut[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())
        )


def test_towers_that_look_at_the_padding_get_it():
    encoder = create_model("tiny-vit", seed=0).eval()
    model = encoder.model
    mask = encoder.model.attn_mask
    model.attn_mask = torch.zeros_like(mask)  # every token sees every other
    assert encoder.trims_texts
    assert not DualEncoder("all", model, encoder.tokenizer, encoder.config).trims_texts
    model.attn_mask = mask
    setattr(
        model,
        "text_pool_type" if hasattr(model, "text_pool_type") else "pool_type",
        "last",
    )
    looking = DualEncoder("last", model, encoder.tokenizer, encoder.config).eval()
    assert looking.encode_text(["a"]).shape == (1, encoder.embed_dim)
    raises(
        ValueError,
        r"\(1, 8\), where",
        looking.encode_text,
        torch.zeros(1, 8, dtype=torch.int64),
    )


# Pixels and tokens


SIZE = 24


def theirs(image, config):
    """open_clip's pixels; lanczos, which it does not have, by its bicubic transform
    with another filter.
    """
    lanczos = config["interpolation"] == "lanczos"
    known = config | ({"interpolation": "bicubic"} if lanczos else {})
    transform = image_transform_v2(
        PreprocessCfg(**known, mean=(0, 0, 0), std=(1, 1, 1)), is_train=False
    )
    if lanczos:
        transform.transforms[0].interpolation = InterpolationMode.LANCZOS
    return (transform(image) * 255).round().byte()


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@settings(max_examples=40)
@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 9))
def test_pixels_are_open_clips(mode, interpolation, width, height, seed):
    noise = torch.randint(
        0,
        256,
        (height, width, 3),
        dtype=torch.uint8,
        generator=seeded(seed),
    )
    image = Image.fromarray(noise.numpy())
    config = {"size": SIZE, "interpolation": interpolation, "resize_mode": mode}
    own = pickle.loads(pickle.dumps(EvalTransform(config)))(image)
    assert own.dtype == torch.uint8
    assert torch.equal(own, theirs(image, config))


def test_a_way_that_open_clip_does_not_have_is_one_line():
    raises(
        InputError,
        "resize_mode 'tall'",
        EvalTransform,
        {"size": SIZE, "resize_mode": "tall"},
    )


ORIGINAL = SimpleTokenizer()
FAST = ClipTokenizer.of(ORIGINAL)

# ``parts`` is what captions of the web are made of, and what each step of the cleaning
# looks for.
CAPTIONS = read_json(Path(__file__).with_name("texts.json"))
SAME = CAPTIONS["same"]
OTHER = CAPTIONS["other"]
parts = st.sampled_from(CAPTIONS["parts"]) | st.just(" ")
texts = st.one_of(
    st.lists(parts, max_size=50).map("".join),
    st.text(max_size=80),
    st.text(st.characters(max_codepoint=127), max_size=80),
)


@settings(max_examples=100)
@given(st.lists(texts, max_size=4), st.integers(2, 12))
def test_every_text_has_open_clips_tokens_cut_and_filled(some, length):
    expected = [ORIGINAL.encode(text) for text in some]
    assert [FAST.encode(text) for text in some] == expected
    assert torch.equal(FAST(some), ORIGINAL(some))
    short = copy.copy(FAST)
    short.context_length = length
    ours = short(some)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, ORIGINAL(some, length))
    assert torch.equal(short("one text"), ORIGINAL("one text", length))


def test_it_travels_without_open_clip():
    FAST(["a cat"])
    stored = pickle.dumps(FAST)
    assert len(stored) < 2_000_000
    # a worker that loads it need not import that
    assert b"open_clip" not in stored
    assert pickle.loads(stored).encode("a cat &amp; a dog") == ORIGINAL.encode(
        "a cat & a dog"
    )


# The tokenizer of an ONNX folder: read back it gives the model's tokens; alone, what
# the card says


LENGTH = 24


@pytest.fixture(scope="module")
def slow():
    return open_clip().tokenizer.SimpleTokenizer(context_length=LENGTH)


@pytest.fixture(scope="module")
def alone(slow, tmp_path_factory):
    """What the package ``tokenizers`` makes of the folder's file."""
    folder = tmp_path_factory.mktemp("words")
    store_tokenizer(ClipTokenizer.of(slow), folder, LENGTH)
    return pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(folder / "tokenizer.json")
    )


def test_the_file_alone_gives_open_clips_tokens_but_where_the_card_says(alone, slow):
    differ = []
    for text in (*SAME, *OTHER):
        (expected,) = slow(text).tolist()
        if alone.encode(text).ids != expected:
            differ.append(text)
    assert differ == OTHER


# Latin, Cyrillic, punctuation and kana, without what begins an entity of HTML.
CODES = [*range(32, 127), *range(0x410, 0x450)]
CODES += [*range(0x2010, 0x2050), *range(0x3041, 0x3097)]
CODES.remove(ord("&"))
LETTERS = st.sampled_from([chr(code) for code in CODES])


@given(st.text(LETTERS, max_size=40))
@settings(max_examples=200)
def test_any_plain_text(alone, slow, text):
    assume(
        ftfy.fix_encoding(text) == text
    )  # what looks as if it was decoded wrongly is what differs
    assert alone.encode(text).ids == slow(text)[0].tolist()


@pytest.mark.parametrize(
    ("specials", "ending"),
    [
        (("<start_of_text>", "<end_of_text>"), "cut"),
        (("<|startoftext|>", "<|endoftext|>"), "kept"),
    ],
)
def test_read_back_the_tokens_are_the_models(tmp_path, specials, ending):
    pytest.importorskip("tokenizers")
    texts = [*SAME, *OTHER, "<|startoftext|> a <|endoftext|>"]
    own = clip_tokenizer(tmp_path, CLIP_VOCABULARY, LENGTH, specials, ending)
    settings_ = store_tokenizer(own, tmp_path, LENGTH)
    back = read_tokenizer(
        tmp_path / "onnx.json", json.loads(json.dumps(settings_)), LENGTH
    )
    assert torch.equal(back(texts), own(texts))
    assert ("lack" in tokenizer_note(settings_)) == (ending == "cut")


def test_states_of_tokens_pool_to_the_rows_of_texts(encoder):
    encoder = copy.deepcopy(encoder)
    states, is_text = encoder.encode_text_tokens(TEXTS)
    tokens = encoder.tokenizer(TEXTS)
    ends = tokens.argmax(dim=1)
    assert states.shape[:2] == is_text.shape == tokens.shape
    assert is_text.sum(dim=1).tolist() == (ends + 1).tolist()
    tower = encoder.model.get_submodule(encoder._causal_tower)
    pooled = states[torch.arange(3), ends] @ tower.text_projection
    rows = encoder.encode_text(TEXTS)
    assert_close(F.normalize(pooled, dim=1), rows, atol=1e-5, rtol=0)
    assert_close(encoder.encode_text_tokens(tokens)[0], states)
    assert not states.requires_grad
    encoder.encode_text_tokens(TEXTS, grad=True)[0].sum().backward()
    assert tower.positional_embedding.grad.abs().sum() > 0
    raises(TypeError, "one string", encoder.encode_text_tokens, "a bus")


def test_folded_norms_leave_features_as_they_are():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # as if they had been trained
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias, std=0.1)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        fold_norms(network)
        difference = network(images) - expected
    assert norms
    assert difference.norm() < 1e-4 * expected.norm()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())

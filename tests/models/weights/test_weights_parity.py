"""Each family's features, pixels, tokens and scales equal what the original program
computes.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from cloob import ContrastiveObjective, cli, load_model
from support import originals, raises, run_cloob

ML_JKU = [
    ("mljku/rn", "epoch_2.pt"),
    ("mljku/rn", "published_like.pt"),
    ("mljku/rn", "fp16.pt"),
]
ML_JKU += [("mljku/vit", "no_config.pt"), ("mljku/rn_full_vocab", "published_like.pt")]
CROWSONKB = [
    ("crowsonkb/tiny", f"{name}.pkl")
    for name in ("slim", "slim_flatmapping", "slim_jax_array", "train")
]
CROWSONKB += [
    ("crowsonkb/tiny", "slim_numpy2.pkl"),
    ("crowsonkb/tiny", "slim_numpy2_protocol5.pkl"),
]
CROWSONKB += [("crowsonkb/tiny", "slim.pkl:port"), ("crowsonkb/full_vocab", "slim.pkl")]
CROWSONKB += [("crowsonkb/full_vocab", "slim.pkl:port")]
OPENAI = [
    ("openai/vit", "vit-jit.pt"),
    ("openai/vit", "vit-state-dict.pt"),
    ("openai/rn", "rn-jit.pt"),
]
FOLDERS = [("rinna/bert", ""), ("rinna/roberta", "")]
FOLDERS += [
    (f"{kind}/{name}", "")
    for kind in ("open_clip", "hf_clip")
    for name in ("vit_gelu", "vit_quickgelu")
]
ALL = ML_JKU + CROWSONKB + OPENAI + FOLDERS
WITHOUT_BETA = ("epoch_2.pt", "fp16.pt", "no_config.pt")
WITH_LOSS = [*ML_JKU, *CROWSONKB, *FOLDERS[:2], *OPENAI]
INPUTS = ("images", "tokens", "extra_tokens")
FULL_VOCABULARY = [
    ("mljku/rn_full_vocab", "published_like.pt"),
    ("crowsonkb/full_vocab", "slim.pkl"),
    *FOLDERS[2:],
]


def read(folder, file):
    """The inputs, and what the original makes of them; of crowsonkb's port under the
    same names as of the original.
    """
    inputs = dict(np.load(folder / "inputs.npz", allow_pickle=False))
    name = "expected_fp16.npz" if file == "fp16.pt" else "expected.npz"
    expected = dict(np.load(folder / name, allow_pickle=False))
    if file.endswith(":port"):
        expected |= {
            key.removeprefix("port_"): value
            for key, value in expected.items()
            if key.startswith("port_")
        }
        for side in ("image", "text"):
            expected[f"{side}_unit"] = expected[f"{side}_features"]
    return inputs, expected


def open_both(folder, file):
    source = originals(f"{folder}/{file}" if file else folder)
    return load_model(source), *read(source.parent if file else source, file)


@pytest.mark.parametrize(("folder", "file"), ALL)
def test_features_are_the_originals(folder, file):
    encoder, inputs, expected = open_both(folder, file)
    given = {name: torch.from_numpy(inputs[name]) for name in INPUTS}
    images, tokens, extra = given.values()
    bound = 3e-5 if "/rn" in folder else 1e-5
    with torch.no_grad():
        found = {
            "image_features": encoder.model.encode_image(images),
            "text_features": encoder.model.encode_text(tokens),
            "extra_text_features": encoder.model.encode_text(extra),
            "image_unit": encoder.encode_image(images),
            "text_unit": encoder.encode_text(tokens),
        }
    for key, rows in found.items():
        atol = bound if key.startswith("image") else 1e-5
        wanted = torch.from_numpy(expected[key])
        assert_close(rows, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(("folder", "file"), [ALL[4], ALL[12], ALL[14], *FOLDERS[:4:2]])
def test_pixels_are_the_originals(folder, file):
    encoder, inputs, _ = open_both(folder, file)
    pixels = torch.stack(
        [encoder.preprocess(Image.fromarray(picture)) for picture in inputs["pictures"]]
    )
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (encoder.mean, encoder.std)
    )
    normalised = (pixels / 255 - mean) / std
    assert_close(normalised, torch.from_numpy(inputs["images"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("folder", "file"), [*FULL_VOCABULARY, *FOLDERS[:2]])
def test_tokens_are_the_originals_also_of_what_is_converted(folder, file, tmp_path):
    source = originals(f"{folder}/{file}" if file else folder)
    inputs, expected = read(source.parent if file else source, file)
    if folder.startswith("rinna"):
        pytest.importorskip("sentencepiece")
        source = shutil.copytree(source, tmp_path / "r")
        shutil.copy(originals("rinna/tokenizer/spiece.model"), source)
    encoder = load_model(source)
    for key in ("texts", "extra_texts"):
        wanted = inputs[key.replace("texts", "tokens")]
        assert encoder.tokenizer(inputs[key].tolist()).tolist() == wanted.tolist()
    texts = inputs["texts"].tolist()
    with torch.no_grad():
        rows = encoder.encode_text(texts)
    wanted = torch.from_numpy(expected["text_unit"])
    assert_close(rows, wanted, rtol=0, atol=1e-5)
    target = tmp_path / "m"
    run_cloob(f"export {source} --to=cloob --out={target}")
    assert load_model(target).tokenizer(texts).tolist() == inputs["tokens"].tolist()


def test_tokens_of_openai():
    from cloob.models.tokenizer import CLIP_VOCABULARY, clip_tokenizer

    inputs, _ = read(originals("openai/vit"), "vit-jit.pt")
    tokenizer = clip_tokenizer(
        Path(), CLIP_VOCABULARY, 77, ("<|startoftext|>", "<|endoftext|>"), "kept"
    )
    for key in ("tokens", "extra_tokens"):
        texts = inputs[key.replace("tokens", "texts")].tolist()
        expected = inputs[f"{key}_clip_bpe"].tolist()
        assert tokenizer(texts).tolist() == expected


@pytest.mark.parametrize(("folder", "file"), WITH_LOSS)
def test_the_objective_comes_along(folder, file):
    encoder, _, expected = open_both(folder, file)
    settings = encoder.objective_config
    loss = expected["loss"]
    if folder.startswith("openai"):
        loss = expected["clip_loss"]
        assert settings["contrast"] == "infonce"
        assert not settings["hopfield"]
    else:
        assert ("beta" in settings) == (file not in WITHOUT_BETA)
        settings = {"beta": float(expected["scale_hopfield"])} | settings
    image = torch.from_numpy(expected["image_unit"])
    text = torch.from_numpy(expected["text_unit"])
    found = ContrastiveObjective(**settings)(image, text).detach()
    assert float(found) == pytest.approx(float(loss), rel=0, abs=1e-5)


def test_texts_of_a_small_vocabulary_are_refused():
    encoder = load_model(originals("mljku/rn/published_like.pt"))
    raises(ValueError, "128 words", encoder.encode_text, ["a dog"])


SOURCES = [
    "mljku/rn/published_like.pt",
    "crowsonkb/full_vocab/slim.pkl:port",
    "rinna/roberta",
    "openai/vit/vit-jit.pt",
    "hf_clip/vit_gelu",
    "open_clip/vit_quickgelu",
]


@pytest.mark.parametrize("source", SOURCES)
def test_an_export_keeps_every_bit(tmp_path, capsys, source):
    target = tmp_path / "converted"
    folder = originals(source)
    words = ["export", str(folder), "--to=cloob", f"--out={target}"]
    assert cli.main(words) == 0, capsys.readouterr().err
    place = folder if folder.is_dir() else folder.parent
    inputs = np.load(place / "inputs.npz", allow_pickle=False)
    images = torch.from_numpy(inputs["images"])
    tokens = torch.from_numpy(inputs["extra_tokens"])
    first = load_model(folder)
    second = load_model(target)
    with torch.no_grad():
        assert torch.equal(first.encode_image(images), second.encode_image(images))
        assert torch.equal(first.encode_text(tokens), second.encode_text(tokens))
    assert second.objective_config == first.objective_config
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


@pytest.mark.parametrize(
    ("folder", "file"),
    [("crowsonkb/tiny", "slim.pkl"), ("rinna/bert", ""), ("rinna/roberta", "")],
)
def test_states_of_tokens_pool_to_the_originals_features(folder, file):
    source = originals(f"{folder}/{file}" if file else folder)
    encoder = load_model(source)
    inputs, expected = read(originals(folder), file)
    tokens = torch.from_numpy(inputs["tokens"])
    states, is_text = encoder.encode_text_tokens(tokens)
    pooled = F.normalize(encoder.model.text.proj(states[:, 0]), dim=1).detach()
    assert_close(pooled, torch.from_numpy(expected["text_unit"]), atol=1e-5, rtol=0)
    assert is_text.shape == tokens.shape == states.shape[:2]
    assert is_text[:, 0].all()
    assert not is_text.all()
    assert (is_text.long().diff(dim=1) <= 0).all()  # padding is at the end alone

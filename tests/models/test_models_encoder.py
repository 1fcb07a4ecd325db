"""DualEncoder: what goes in (pixels, files, strings, tensors) and the unit rows that come out."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.towers import TINY_MODELS, create_model
from cloob.objective import make_objective

TEXTS = ["a red apple", "bus", "two dogs in the rain"]


@pytest.fixture(scope="module", params=TINY_MODELS)
def encoder(request: pytest.FixtureRequest, lively: Callable[..., DualEncoder]) -> DualEncoder:
    return lively(request.param)


@pytest.fixture(scope="module")
def resnet(lively: Callable[..., DualEncoder]) -> DualEncoder:
    return lively("tiny-resnet")


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (6, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height)).convert(mode)


def normalised(encoder: DualEncoder, images: Tensor) -> Tensor:
    mean, std = torch.tensor(encoder.mean).view(3, 1, 1), torch.tensor(encoder.std).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def test_image_as_pil_path_and_tensor_agree(encoder: DualEncoder, tmp_path: Path) -> None:
    images = [picture(64, 64), picture(100, 80, seed=1), picture(40, 90, seed=2)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    assert pixels.shape == (3, 3, 64, 64) and pixels.dtype == torch.uint8
    with torch.no_grad():
        expected = encoder.encode_image(pixels)
        assert expected.shape == (3, 256) and expected.dtype == torch.float32
        torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
        for given in (images, paths, [str(path) for path in paths], normalised(encoder, pixels)):
            torch.testing.assert_close(encoder.encode_image(given), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(encoder.encode_image(pixels, batch_size=2), expected, atol=1e-5, rtol=0)
    assert (expected @ expected.T).fill_diagonal_(0).max() < 0.999  # and different pictures differ


def test_text_as_strings_and_tokens_agree(encoder: DualEncoder) -> None:
    with torch.no_grad():
        expected = encoder.encode_text(TEXTS)
        assert expected.shape == (3, 256) and expected.dtype == torch.float32
        torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(encoder.encode_text(encoder.tokenizer(TEXTS)), expected)
        torch.testing.assert_close(encoder.encode_text(TEXTS, batch_size=1), expected, atol=1e-5, rtol=0)


class Unknown:
    """A tokenizer that gives the same tokens for any texts."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, texts: list[str]) -> Tensor:
        return self.tokens


@pytest.mark.parametrize("token", [49408, 10**6, -1])
def test_a_token_that_the_text_tower_does_not_know(
    token: int, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = encoder.tokenizer(TEXTS)
    tokens[1, 1] = token
    monkeypatch.setattr(encoder, "tokenizer", Unknown(tokens))
    said = f"token {token} found, and its text tower knows 0 to 49407; another model's tokenizer makes such"
    for texts in (TEXTS, tokens):
        with pytest.raises(InputError, match=said):
            encoder.encode_text(texts)
    with pytest.raises(InputError, match=said):
        pickle.loads(pickle.dumps(encoder.loader_tokenizer))(TEXTS)


def test_forward_is_both_encoders(encoder: DualEncoder) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        image_features, text_features = encoder(images, encoder.tokenizer(TEXTS))
        torch.testing.assert_close(image_features, encoder.encode_image(images))
        torch.testing.assert_close(text_features, encoder.encode_text(TEXTS))


def test_rows_are_unit_float32_under_autocast(encoder: DualEncoder) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = encoder(images, encoder.tokenizer(TEXTS))
    for rows in features:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_no_graph_is_kept_unless_asked_for(resnet: DualEncoder) -> None:
    """A row that holds its graph holds every activation on the way to it."""
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    for encode, given in ((resnet.encode_image, pixels), (resnet.encode_text, TEXTS)):
        rows = encode(given)
        assert rows.grad_fn is None and not rows.requires_grad
        assert rows.numpy().shape == (3, 256)
        recorded = encode(given, grad=True)
        assert torch.equal(recorded, rows) and recorded.requires_grad
        recorded.sum().backward()
        with torch.no_grad():
            assert not encode(given, grad=True).requires_grad
    assert all(p.grad is not None for p in (resnet.model.visual.conv1.weight, resnet.model.text_projection))
    resnet.zero_grad()


def test_no_activation_outlives_its_batch(resnet: DualEncoder) -> None:
    """Memory stays flat over any number of pictures: nothing that a batch made is alive in the next one."""
    alive: list[weakref.ref[Tensor]] = []
    counts = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(sum(seen() is not None for seen in alive))
        alive.append(weakref.ref(output))

    handle = resnet.model.visual.conv1.register_forward_hook(count)
    try:
        resnet.encode_image(torch.zeros(6, 3, 64, 64, dtype=torch.uint8), batch_size=1)
        assert counts == [0] * 6
    finally:
        handle.remove()


@pytest.mark.parametrize(("width", "height", "mode"), [(64, 64, "RGB"), (200, 90, "RGB"), (31, 77, "L"), (70, 70, "P")])
def test_preprocess_is_open_clips(resnet: DualEncoder, width: int, height: int, mode: str) -> None:
    import open_clip

    image = picture(width, height, mode)
    transform = open_clip.image_transform(64, is_train=False, mean=resnet.mean, std=resnet.std)
    torch.testing.assert_close(normalised(resnet, resnet.preprocess(image)), transform(image))


def test_normalisation_uses_mean_and_std_by_hand(resnet: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.ones(len(x), 256)

    monkeypatch.setattr(resnet.model, "encode_image", record)
    resnet.encode_image(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    for channel, mean, std in zip(
        seen[0][0], (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), strict=True
    ):
        torch.testing.assert_close(channel, torch.full((64, 64), (1 - mean) / std))


def test_nothing_in_nothing_out(resnet: DualEncoder) -> None:
    assert resnet.encode_image([]).shape == (0, 256)
    assert resnet.encode_text([]).shape == (0, 256)


def test_one_thing_instead_of_a_list(resnet: DualEncoder) -> None:
    with pytest.raises(TypeError, match="list"):
        resnet.encode_text("a dog")
    with pytest.raises(TypeError, match="list"):
        resnet.encode_image("a.png")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="list"):
        resnet.encode_image(picture(64, 64))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing(resnet: DualEncoder, size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {size}; 1 or more"):
        resnet.encode_image([picture(64, 64)], batch_size=size)
    with pytest.raises(ValueError, match=f"batch_size is {size}; 1 or more"):
        resnet.encode_text(["a dog"], batch_size=size)


def test_wrong_tensors(resnet: DualEncoder) -> None:
    with pytest.raises(ValueError, match=r"int64.*uint8 or float"):
        resnet.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) found.*\(n, 3, 64, 64\)"):
        resnet.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(1, 77\) found.*\(n, 24\)"):
        resnet.encode_text(torch.zeros(1, 77, dtype=torch.int64))


def test_wrong_files(resnet: DualEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        resnet.encode_image([tmp_path / "none.png"])
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(InputError, match=r"text\.png: not a readable image"):
        resnet.encode_image([tmp_path / "text.png"])
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"cut\.png: not a readable image"):
        resnet.encode_image([tmp_path / "cut.png"])


def test_a_loaded_model_makes_the_objective_that_it_was_trained_with(tmp_path: Path) -> None:
    trained = make_objective("infonce-hopfield", inv_tau=20.0, beta=15.0)
    save_model(tmp_path / "m", create_model("tiny-vit", seed=0), trained.config() | {"gather": True})
    encoder = load_model(tmp_path / "m")
    objective = encoder.make_objective()
    assert objective.name == "infonce-hopfield" and not objective.gather
    assert (float(objective.inv_tau), float(objective.beta)) == (20.0, 15.0)
    assert float(encoder.make_objective(beta=3.0).beta) == 3.0
    rows = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    assert torch.equal(objective(*rows), trained(*rows))


def test_what_a_model_does_not_say_of_its_objective_is_not_guessed() -> None:
    encoder = create_model("tiny-vit", seed=0)
    with pytest.raises(InputError, match="does not say what it was trained with"):
        encoder.make_objective()
    encoder.objective_config = {"contrast": "infoloob", "hopfield": True, "inv_tau": 30.0}  # as ml-jku's later files
    with pytest.raises(InputError, match=r"which β it was trained with; give make_objective\(beta=…\)"):
        encoder.make_objective()
    assert float(encoder.make_objective(beta=14.3).beta) == 14.3
    encoder.objective_config = {"contrast": "triplet", "hopfield": False}
    with pytest.raises(InputError, match="cannot be used"):
        encoder.make_objective()


def test_a_config_says_what_the_encoder_is() -> None:
    config = create_model("tiny-vit", seed=0).config
    assert (config.kind, config.embed_dim, config.context_length) == ("open_clip", 256, 24)
    assert config.settings["vision_cfg"]["image_size"] == 64

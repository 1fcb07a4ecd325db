"""DualEncoder: what goes in (pixels, files, strings, tensors) and the unit rows that come out."""

from __future__ import annotations

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
        torch.testing.assert_close(encoder.encode_image(pixels, batch_size=2), expected, atol=3e-5, rtol=0)
    assert (expected @ expected.T).fill_diagonal_(0).max() < 0.999  # and different pictures differ


def test_text_as_strings_and_tokens_agree(encoder: DualEncoder) -> None:
    with torch.no_grad():
        expected = encoder.encode_text(TEXTS)
        assert expected.shape == (3, 256) and expected.dtype == torch.float32
        torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(encoder.encode_text(encoder.tokenizer(TEXTS)), expected)
        torch.testing.assert_close(encoder.encode_text(TEXTS, batch_size=1), expected, atol=1e-5, rtol=0)


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


def test_another_models_tokenizer_is_one_line() -> None:
    encoder = create_model("tiny-vit", seed=0)
    encoder.model.token_embedding = nn.Embedding(32, encoder.model.token_embedding.embedding_dim)
    with pytest.raises(InputError, match="tiny-vit: tokens of another model's tokenizer"):
        encoder.encode_text(["a"])

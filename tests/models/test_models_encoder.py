"""DualEncoder: what goes in (pixels, files, strings, tensors) and the unit rows that come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import nn

from cloob import cli
from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.towers import TINY_MODELS, create_model
from cloob.objective import make_objective
from make import noise_image, tiny_model

TEXTS = ["a red apple", "bus", "two dogs in the rain"]


@pytest.fixture(scope="module", params=TINY_MODELS)
def encoder(request: pytest.FixtureRequest, lively: Callable[..., DualEncoder]) -> DualEncoder:
    return lively(request.param)


def test_pictures_and_texts_in_every_form_are_the_same_unit_rows(encoder: DualEncoder, tmp_path: Path) -> None:
    sizes = (64, 64), (100, 80), (40, 90)
    images = [noise_image(seed, 8, 6).resize(size) for seed, size in enumerate(sizes)]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    tokens = encoder.tokenizer(TEXTS)
    assert pixels.shape == (3, 3, 64, 64) and pixels.dtype == torch.uint8
    with torch.no_grad():
        rows = encoder.encode_image(pixels), encoder.encode_text(TEXTS)
        for given in (images, [str(path) for path in paths], (pixels / 255 - mean) / std):
            torch.testing.assert_close(encoder.encode_image(given), rows[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(encoder.encode_image(pixels, batch_size=2), rows[0], atol=3e-5, rtol=0)
        torch.testing.assert_close(encoder.encode_text(tokens), rows[1])
        torch.testing.assert_close(encoder.encode_text(TEXTS, batch_size=1), rows[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder(pixels, tokens), rows)
        with torch.autocast("cpu", torch.bfloat16):
            low = encoder(pixels, tokens)
    for features in (*rows, *low):
        assert features.shape == (3, 256) and features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert (rows[0] @ rows[0].T).fill_diagonal_(0).max() < 0.999  # and different pictures differ


def test_no_graph_is_kept_unless_asked_for(lively: Callable[..., DualEncoder]) -> None:
    """A row that holds its graph holds every activation on the way to it."""
    resnet = lively("tiny-resnet")
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    for encode, given in ((resnet.encode_image, pixels), (resnet.encode_text, TEXTS)):
        rows = encode(given)
        assert rows.grad_fn is None and not rows.requires_grad
        recorded = encode(given, grad=True)
        assert torch.equal(recorded, rows) and recorded.requires_grad
        recorded.sum().backward()
        with torch.no_grad():
            assert not encode(given, grad=True).requires_grad
    assert all(p.grad is not None for p in (resnet.model.visual.conv1.weight, resnet.model.text_projection))


def test_a_loaded_model_makes_the_objective_that_it_was_trained_with(tmp_path: Path) -> None:
    trained = make_objective("infonce-hopfield", inv_tau=20.0, beta=15.0)
    save_model(tmp_path / "m", create_model("tiny-vit", seed=0), trained.config() | {"gather": True})
    encoder = load_model(tmp_path / "m")
    objective = encoder.make_objective()
    assert objective.name == "infonce-hopfield" and not objective.gather
    assert (float(objective.inv_tau), float(objective.beta)) == (20.0, 15.0)
    assert float(encoder.make_objective(beta=3.0).beta) == 3.0
    for settings, said in (
        ({}, "does not say what it was trained with"),
        ({"contrast": "infoloob", "hopfield": True, "inv_tau": 30.0}, r"which β .*; give make_objective\(beta=…\)"),
        ({"contrast": "triplet", "hopfield": False}, "cannot be used"),
    ):
        encoder.objective_config = settings
        with pytest.raises(InputError, match=said):
            encoder.make_objective()


def test_embed_takes_texts_from_lines_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(Path("model"))
    Path("texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    parquet.write_table(pa.table({"caption": TEXTS}), "texts.parquet")
    for source, out in (("texts.txt", "lines.npy"), ("texts.parquet:caption", "column.npy")):
        assert cli.main(["embed", "model", "--texts", source, "--out", out]) == 0
        torch.testing.assert_close(torch.from_numpy(np.load(out)), load_model("model", "cpu").encode_text(TEXTS))


def test_another_models_tokenizer_is_one_line() -> None:
    encoder = create_model("tiny-vit", seed=0)
    encoder.model.token_embedding = nn.Embedding(32, encoder.model.token_embedding.embedding_dim)
    with pytest.raises(InputError, match="tiny-vit: tokens of another model's tokenizer"):
        encoder.encode_text(["a"])

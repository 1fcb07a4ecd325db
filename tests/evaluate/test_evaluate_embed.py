"""Embedding in order, whatever the batches and workers; unreadable images keep their place."""

from __future__ import annotations

import warnings

import pytest
import torch

from cloob.evaluate.embed import EmbedOptions, embed_images, embed_pairs, embed_texts, evaluating
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs

NAMES = list(COLOURS)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_rows_are_the_single_images_in_order(batch_size: int, workers: int) -> None:
    data = Labels([*NAMES, "blue"])
    features, keys, bad = embed_images(ColourModel(), data, EmbedOptions(batch_size=batch_size, workers=workers))
    expected = torch.tensor([COLOURS[c] for c in data.colours]).float() - 127.5
    assert torch.allclose(features, expected / expected.norm(dim=1, keepdim=True))
    assert features.dtype == torch.float32
    assert keys == tuple(f"s{i}" for i in range(7)) and bad == []


def test_batches_are_full_and_progress_counts_images() -> None:
    model, seen = ColourModel(), []
    embed_images(model, Labels(["red"] * 7, broken=[1]), EmbedOptions(batch_size=3), progress=lambda *x: seen.append(x))
    assert model.image_batches == [3, 3]
    assert seen == [(4, 7), (7, 7)]
    embed_images(model, Labels(["red"] * 3, broken=[2]), EmbedOptions(batch_size=2), progress=lambda *x: seen.append(x))
    assert model.image_batches[2:] == [2] and seen[2:] == [(2, 3), (3, 3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_keeps_its_row_as_nan(workers: int) -> None:
    features, keys, bad = embed_images(
        ColourModel(), Labels(NAMES, broken=[0, 5]), EmbedOptions(batch_size=2, workers=workers)
    )
    assert torch.isnan(features).all(1).tolist() == [True, False, False, False, False, True]
    assert not torch.isnan(features[1:5]).any()
    assert len(keys) == 6
    assert [(skip.key, skip.reason) for skip in bad] == [("s0", "corrupt image"), ("s5", "corrupt image")]


def test_pairs_are_read_once_and_unreadable_ones_are_nan() -> None:
    source = Pairs(NAMES, broken=[1], missing=[2])
    reads: list[int] = []
    original = source.read
    source.read = lambda index: (reads.append(index), original(index))[1]  # type: ignore[method-assign]
    images, texts, captions, image_of_text = embed_pairs(ColourModel(), source, EmbedOptions(batch_size=2))
    assert reads == list(range(6))
    assert torch.isnan(images.features).all(1).tolist() == [False, True, True, False, False, False]
    assert torch.isnan(texts).all(1).tolist() == [False, False, True, False, False, False]
    assert captions == ("red", "green", "", "yellow", "cyan", "magenta")
    assert image_of_text.tolist() == list(range(6))
    assert [skip.reason for skip in images.bad] == ["corrupt image", "missing image"]
    assert torch.equal(texts[5], embedded("magenta"))


def embedded(text: str) -> torch.Tensor:
    with torch.no_grad():
        return ColourModel().encode_text([text])[0]


def test_equal_texts_go_through_the_tower_once() -> None:
    model = ColourModel()
    texts = ["red", "blue", "red", "green", "blue"]
    features = embed_texts(model, texts, batch_size=2)
    assert model.text_batches == [["red", "blue"], ["green"]]
    assert torch.equal(features, torch.stack([embedded(text) for text in texts]))


def test_threads_leave_the_warning_filters_alone() -> None:
    before = list(warnings.filters)
    embed_images(ColourModel(), Labels(["red"] * 60, broken=range(0, 60, 7)), EmbedOptions(batch_size=8, workers=4))
    assert warnings.filters == before


def test_a_module_is_evaluated_in_eval_mode_and_put_back() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    module[1].eval()
    with evaluating(module):  # type: ignore[arg-type]
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in module.modules()] == [True, True, False, False]
    with pytest.raises(RuntimeError, match="boom"), evaluating(module):  # type: ignore[arg-type]
        raise RuntimeError("boom")
    assert module.training and torch.is_grad_enabled()

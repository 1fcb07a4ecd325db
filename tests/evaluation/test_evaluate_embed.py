"""Embedding in order, whatever the batches and workers; unreadable images keep their place."""

from __future__ import annotations

import pytest
import torch

from cloob.evaluation.embed import EmbedOptions, embed_images, embed_pairs
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs

NAMES = list(COLOURS)


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (2, 3), (100, 3)])
def test_rows_are_the_single_images_in_order_and_unreadable_ones_nan(batch_size: int, workers: int) -> None:
    data = Labels([*NAMES, "blue"], broken=[0, 5])
    features, keys, bad, *_ = embed_images(ColourModel(), data, EmbedOptions(batch_size=batch_size, workers=workers))
    expected = torch.tensor([COLOURS[colour] for colour in data.colours]).float() - 127.5
    expected /= expected.norm(dim=1, keepdim=True)
    expected[[0, 5]] = torch.nan
    torch.testing.assert_close(features, expected, equal_nan=True)
    assert keys == tuple(f"s{i}" for i in range(7))
    assert [(skip.key, skip.reason) for skip in bad] == [("s0", "corrupt image"), ("s5", "corrupt image")]


def test_pairs_are_read_once_and_unreadable_ones_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    source, reads, original = Pairs(NAMES, broken=[1], missing=[2]), [], Pairs.read
    monkeypatch.setattr(Pairs, "read", lambda self, index: (reads.append(index), original(self, index))[1])
    pairs = embed_pairs(ColourModel(), source, EmbedOptions(batch_size=2))
    assert reads == list(range(6))
    assert torch.isnan(pairs.images.features).all(1).nonzero()[:, 0].tolist() == [1, 2]
    assert torch.isnan(pairs.texts).all(1).nonzero()[:, 0].tolist() == [2]
    assert pairs.captions == ("red", "green", "", "yellow", "cyan", "magenta")
    assert pairs.image_of_text.tolist() == list(range(6))
    assert pairs.unreadable == {"corrupt image": 1, "missing image": 1}

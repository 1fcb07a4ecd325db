"""Retrieval against a loop over sorted scores, with several captions an image and captions that repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloob.evaluation.measures.retrieval import RetrievalRanks, by_picture, retrieval_ranks, summarise
from cloob.functional.bootstrap import bootstrap_interval


def retrieval(
    images: Tensor,
    texts: Tensor,
    image_of_text: Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
    chunk: int = 4096,
) -> dict[str, Any]:
    return summarise(retrieval_ranks(images, texts, image_of_text, captions, chunk=chunk), image_of_text)


def unit(n: int, d: int, seed: int) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def correct_loop(image_of_text: list[int], captions: list[str]) -> set[tuple[int, int]]:
    plain = [" ".join(caption.lower().split()) or str(i) for i, caption in enumerate(captions)]
    return {
        (t, image)
        for t, caption in enumerate(plain)
        for other, image in zip(plain, image_of_text, strict=True)
        if caption == other
    }


def recall_loop(queries: Tensor, gallery: Tensor, correct: set[tuple[int, int]], k: int) -> float:
    hits = 0
    for q in range(len(queries)):
        nearest = sorted(range(len(gallery)), key=lambda g: -float(queries[q] @ gallery[g]))[:k]
        hits += any((q, g) in correct for g in nearest)
    return hits / len(queries)


@settings(max_examples=20)
@given(data=st.data(), n_images=st.integers(1, 6), more=st.integers(0, 6), seed=st.integers(0, 999))
def test_recall_is_the_loop(data: st.DataObject, n_images: int, more: int, seed: int) -> None:
    extra = data.draw(st.lists(st.integers(0, n_images - 1), min_size=more, max_size=more))
    image_of_text = data.draw(st.permutations([*range(n_images), *extra]))
    words = st.sampled_from(["a dog", "A  Dog", "cat", "bird", ""])
    captions = [data.draw(words) for _ in image_of_text]
    images, texts = unit(n_images, 4, seed), unit(len(image_of_text), 4, seed + 1)
    correct = correct_loop(image_of_text, captions)
    result = retrieval(images, texts, image_of_text, captions, chunk=data.draw(st.integers(1, 9)))
    for k in (1, 5, 10):
        flipped = {(i, t) for t, i in correct}
        assert result[f"text_to_image@{k}"] == pytest.approx(recall_loop(texts, images, correct, k))
        assert result[f"image_to_text@{k}"] == pytest.approx(recall_loop(images, texts, flipped, k))


def test_unreadable_rows_count_as_not_found_and_a_constant_tower_finds_nothing() -> None:
    images, texts = torch.eye(4), torch.eye(4)
    images[0] = float("nan")
    texts[1] = float("nan")
    result = retrieval(images, texts, captions=["a", "", "c", "d"])
    assert result["image_to_text@1"] == result["image_to_text@10"] == 0.5  # image 0, and 1 without text
    assert result["text_to_image@1"] == result["text_to_image@10"] == 0.5
    features = unit(1, 8, 0).repeat(40, 1)
    result = retrieval(features, features)
    assert result["image_to_text@10"] == 0.0 and result["text_to_image_median_rank"] == 40


@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 3, 2]])
def test_captions_of_a_picture_are_resampled_together(counts: list[int]) -> None:
    """As close to the bootstrap of Σ hits / Σ captions over pictures as its linear form is."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(len(counts) * 50).repeat_interleave(torch.tensor(counts * 50))
    hits = torch.rand(len(counts) * 50, generator=generator)[image] > 0.6  # a picture's captions all hit or none does
    values = by_picture(hits, image)
    assert values.mean().item() == pytest.approx(hits.double().mean().item())
    drawn = torch.randint(0, len(values), (2000, len(values)), generator=generator)
    captions = torch.bincount(image)
    right = torch.zeros(len(values)).index_add_(0, image, hits.float())
    recalls = right[drawn].sum(1) / captions[drawn].sum(1)
    expected = torch.quantile(recalls, torch.tensor([0.025, 0.975]))
    found = bootstrap_interval(values)
    ranks = RetrievalRanks(torch.zeros(len(values), dtype=torch.int64), torch.where(hits, 0, 20))
    assert summarise(ranks, image)["text_to_image@1_interval"] == list(found)
    assert found == pytest.approx(expected.tolist(), abs=0.015)
    alone = bootstrap_interval(hits)
    assert found[1] - found[0] > 1.2 * (alone[1] - alone[0])  # captions by themselves would claim to know more

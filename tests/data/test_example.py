"""The pairs that come with the package."""

import numpy as np

from cloob import ContrastiveHeads, example_pairs


def test_pairs_are_distinct_and_belong_together():
    pairs = example_pairs()
    images = np.concatenate([pairs.images, pairs.test_images])
    texts = np.concatenate([pairs.texts, pairs.test_texts])
    assert len(np.unique(images, axis=0)) == len(np.unique(texts, axis=0)) == 2100
    assert np.isfinite(images).all()
    assert np.isfinite(texts).all()
    heads = ContrastiveHeads("cca").fit(pairs.images, pairs.texts)
    found = heads.score(pairs.test_images, pairs.test_texts)
    shuffled = heads.score(pairs.test_images, pairs.test_texts[::-1])
    assert found > 0.04
    assert shuffled < 0.02  # chance is 1 of 500

"""The measures and the linear probe by hand and against loops, and which features a
probe takes of real towers.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from cloob.evaluation import measures as m
from cloob.evaluation.embed import EmbedOptions, embed_images
from cloob.evaluation.probe import fit_probe, probe_ranks
from cloob.functional import geometry as shape
from cloob.functional.bootstrap import bootstrap_interval
from cloob.models.towers import create_model
from evaluate_fakes import COLOURS, ColourModel, Labels
from paper_loops import unit
from support import seeded


def test_class_embeddings_are_the_renormalised_mean_over_templates():
    model = ColourModel()
    templates = ("{c}", "a picture of {c}", "{c}")
    found = m.class_embeddings(model, ("red", "blue"), templates, batch_size=3)
    sizes = [len(batch) for batch in model.text_batches]
    assert sizes == [3, 1]  # each distinct text once
    with torch.no_grad():
        for row, name in zip(found, ("red", "blue"), strict=True):
            short, long = model.encode_text([name, f"a picture of {name}"])
            mean = (short + long + short) / 3
            assert torch.allclose(row, mean / mean.norm(), atol=1e-6)


def test_zeroshot_by_hand():
    # Scores are the coordinates: classes are the axes.
    images = torch.tensor(
        [[0.9, 0.3, 0.1], [0.2, 0.8, 0.1], [0.5, 0.6, 0.4], [0.1, 0.2, 0.9]]
    )
    labels = torch.tensor([0, 1, 0, 2])  # the third image is taken for class 1
    ranks = m.zeroshot_ranks(images, labels, torch.eye(3))
    result = m.accuracies(ranks, labels, 3)
    low, high = result.pop("acc1_interval")
    assert 0 <= low < 0.75 < high <= 1
    interval_of_all = [0.025 ** (1 / 4), 1.0]
    assert result.pop("acc5_interval") == pytest.approx(interval_of_all)
    mean = (0.5 + 1 + 1) / 3
    assert result.pop("mean_per_class_recall") == pytest.approx(mean)
    assert result == {"acc1": 0.75, "acc5": 1.0, "n": 4, "n_classes": 3}
    recalls = m.class_recalls(ranks, labels, ("a", "b", "a"))
    assert recalls == {"a [0]": 0.5, "b": 1.0, "a [2]": 1.0}


def test_classes_of_equal_score_are_never_told_apart():
    rows = torch.tensor([[1.0, 2, 3], [1, 2, 3], [3, -1, 0]])
    classes = F.normalize(rows)
    ranks = m.zeroshot_ranks(classes, torch.arange(3), classes)
    assert ranks.tolist() == [1, 1, 0]


def retrieval(images, texts, image_of_text=None, captions=None):
    ranks = m.retrieval_ranks(images, texts, image_of_text, captions)
    if image_of_text is not None:
        image_of_text = torch.tensor(image_of_text)
    return m.retrieval_numbers(ranks, image_of_text)


def recall_loop(queries, gallery, correct, k):
    hits = 0
    for q, query in enumerate(queries):
        scores = gallery @ query
        nearest = scores.argsort(descending=True).tolist()
        hits += any((q, g) in correct for g in nearest[:k])
    return hits / len(queries)


@settings(max_examples=20)
@given(data=st.data(), n_images=st.integers(1, 6), seed=st.integers(0, 999))
def test_recall_is_the_loop(data, n_images, seed):
    more = data.draw(st.lists(st.integers(0, n_images - 1), max_size=6))
    image_of_text = data.draw(st.permutations([*range(n_images), *more]))
    words = st.sampled_from(["a dog", "A  Dog", "cat", "bird", ""])
    captions = [data.draw(words) for _ in image_of_text]
    images = unit(n_images, 4, seed)
    texts = unit(len(captions), 4, seed + 1)
    plain = [" ".join(text.lower().split()) or i for i, text in enumerate(captions)]
    correct = set()
    for text, caption in enumerate(plain):
        for other, image in zip(plain, image_of_text, strict=True):
            if caption == other:
                correct.add((text, image))
    flipped = {(image, text) for text, image in correct}
    result = retrieval(images, texts, image_of_text, captions)
    for k in (1, 5, 10):
        expected = recall_loop(texts, images, correct, k)
        assert result[f"text_to_image@{k}"] == pytest.approx(expected)
        expected = recall_loop(images, texts, flipped, k)
        assert result[f"image_to_text@{k}"] == pytest.approx(expected)


def test_unreadable_rows_count_as_not_found():
    images = torch.eye(4)
    texts = torch.eye(4)
    images[0] = torch.nan
    texts[1] = torch.nan
    result = retrieval(images, texts, captions=["a", "", "c", "d"])
    for way in ("image_to_text", "text_to_image"):
        assert result[f"{way}@1"] == 0.5
        assert result[f"{way}@10"] == 0.5


def test_a_constant_tower_finds_nothing():
    features = unit(1, 8).repeat(40, 1)
    result = retrieval(features, features)
    assert result["image_to_text@10"] == 0.0
    assert result["text_to_image_median_rank"] == 40


def test_captions_of_a_picture_are_resampled_together():
    """As close to the bootstrap of Σ hits / Σ captions over pictures as its linear form
    is.
    """
    generator = seeded(0)
    counts = torch.tensor([1, 3, 2] * 50)
    n = len(counts)
    image = torch.arange(n).repeat_interleave(counts)
    # a picture's captions all hit or none does
    is_hit = torch.rand(n, generator=generator) > 0.6
    drawn = torch.randint(0, n, (2000, n), generator=generator)
    right = counts * is_hit
    recalls = right[drawn].sum(1) / counts[drawn].sum(1)
    expected = torch.quantile(recalls, torch.tensor([0.025, 0.975])).tolist()
    hits = is_hit[image]
    ranks = m.RetrievalRanks(torch.zeros(n, dtype=torch.int64), 20 * ~hits)
    low, high = m.retrieval_numbers(ranks, image)["text_to_image@1_interval"]
    assert [low, high] == pytest.approx(expected, abs=0.015)
    # captions by themselves would claim to know more
    low_alone, high_alone = bootstrap_interval(hits)
    assert high - low > 1.2 * (high_alone - low_alone)


def test_geometry_of_retrievals_without_unreadable_pairs():
    rows = torch.randn(2, 30, 6, generator=seeded(0))
    image, text = F.normalize(rows, dim=2)
    result = m.geometry(image, text, inv_tau=20.0, beta=4.0)
    for name, x in (("image", image), ("text", text)):
        weights = torch.softmax(4 * x @ x.T, 1)
        retrieved = F.normalize(weights @ x)
        spectrum = shape.covariance_spectrum(retrieved).tolist()
        found = result[f"spectrum_{name}_retrieved"]
        assert found == pytest.approx(spectrum, rel=1e-3)
        ajne = float(shape.ajne(x))
        assert result[f"ajne_{name}"] == pytest.approx(ajne)
    logits = 20 * image @ text.T
    of_images = logits.softmax(1).diagonal()
    of_texts = logits.softmax(0).diagonal()
    mean = float((of_images + of_texts).mean()) / 2
    assert result["saturation"] == pytest.approx(1 - mean)
    broken = torch.full((1, 6), torch.nan)
    image = torch.cat([image[:9], broken, image[9:]])
    text = torch.cat([text[:9], text[:1], text[9:]])
    assert m.geometry(image, text, inv_tau=20.0, beta=4.0) == result
    assert result["n"] == 30


NAMES = list(COLOURS)


def clouds(n, spread=0.5, seed=0):
    """n points around each of three corners, far from the origin and in odd units."""
    generator = seeded(seed)
    labels = torch.arange(3).repeat(n)
    corners = 3 * torch.eye(3)[labels]
    noise = torch.randn(3 * n, 3, generator=generator)
    return 40 * (corners + spread * noise) + 7, labels


def test_a_probe_is_scikit_learns_fit_at_the_strength_it_chose():
    x, y = clouds(20, spread=1.5)
    probe = fit_probe(x, y, 3)
    assert probe.n_train == 60
    assert 1e-6 <= probe.strength <= 1e6
    mean = x.double().mean(0)
    scale = (x.double() - mean).square().mean().sqrt()

    def standardised(rows):
        return ((rows - mean) / scale).numpy()

    model = LogisticRegression(C=probe.strength, max_iter=1000)
    model.fit(standardised(x), y.numpy())
    test, labels = clouds(50, spread=1.5, seed=5)
    right = model.predict(standardised(test)) == labels.numpy()
    first = probe_ranks(probe.weight, test, labels) == 0
    assert np.array_equal(first.numpy(), right)
    assert 0.6 < right.mean() < 1.0


def test_two_classes_a_missing_class_and_unreadable_images():
    x, y = clouds(12)
    x[0] = torch.nan
    probe = fit_probe(x[y != 1], y[y != 1], 4)
    assert probe.n_train == 23
    unknown = torch.isnan(probe.weight).all(1)
    assert unknown.tolist() == [False, True, False, True]
    ranks = probe_ranks(probe.weight, x, y)
    # not readable, never learnt: not even among the last
    assert ranks[0] > 3
    assert ranks[y == 1].min() > 3
    readable = ranks[1:]
    assert not readable[y[1:] != 1].any()


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_tower_features_of_real_towers(name):
    """The same embeddings as without, and features that the tower's own last step maps
    to them.
    """
    encoder = create_model(name, seed=0).eval()
    data = Labels(NAMES[:3], broken=[1])
    options = EmbedOptions(batch_size=2)
    plain = embed_images(encoder, data, options).features
    images = embed_images(encoder, data, options, tower=True)
    tower = images.tower
    assert torch.equal(images.features.nan_to_num(), plain.nan_to_num())
    assert torch.isnan(tower[1]).all()
    if name == "tiny-vit":
        tower = (tower @ encoder.model.visual.proj).detach()
    np.testing.assert_allclose(F.normalize(tower), plain, atol=1e-5)

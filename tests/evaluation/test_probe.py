"""The linear probe against hand-made clouds, its splits, its errors, and which features it takes of real towers."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cloob.evaluation.embed import EmbedOptions, embed_images
from cloob.evaluation.probe import ProbeOptions, fit_probe, probe_ranks
from cloob.evaluation.suite import evaluate
from cloob.models.towers import create_model
from evaluate_fakes import COLOURS, ColourModel, Labels

NAMES = list(COLOURS)


def clouds(n, spread=0.5, seed=0):
    """n points around each of three corners, far from the origin and in odd units."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    labels = torch.arange(3).repeat(n)
    return 40 * (corners[labels] + spread * torch.randn(3 * n, 3, generator=generator)) + 7, labels


def test_a_probe_is_scikit_learns_fit_at_the_strength_it_chose():
    x, y = clouds(20, spread=1.5)
    probe = fit_probe(x, y, 3, seed=1)
    assert probe.n_train == 60 and 1e-6 <= probe.strength <= 1e6
    mean = x.double().mean(0)
    scale = (x.double() - mean).square().mean().sqrt()
    model = LogisticRegression(C=probe.strength, max_iter=1000).fit(((x - mean) / scale).numpy(), y.numpy())
    test, labels = clouds(50, spread=1.5, seed=5)
    predicted = torch.from_numpy(model.predict(((test - mean) / scale).numpy()))
    assert torch.equal(probe_ranks(probe.weight, test, labels) == 0, predicted == labels)
    assert 0.6 < float((predicted == labels).float().mean()) < 1.0


def test_two_classes_a_missing_class_and_unreadable_images():
    x, y = clouds(12)
    two = y != 1
    x[0] = torch.nan
    probe = fit_probe(x[two], y[two], 4)
    assert probe.n_train == 23
    assert torch.isnan(probe.weight).all(1).tolist() == [False, True, False, True]
    ranks = probe_ranks(probe.weight, x, y)
    assert (ranks[(y == 2)] == 0).all() and (ranks[y == 0][1:] == 0).all()
    assert (ranks[y == 1] > 3).all() and ranks[0] > 3  # never learnt, not readable: not even among the last


def test_a_probe_in_the_suite_with_shots_and_seeds():
    test, train = Labels(NAMES * 2, broken=[0]), Labels(NAMES * 6)
    options = ProbeOptions(shots=2, seeds=(0, 1, 2))
    models = {"a": ColourModel("a"), "b": ColourModel("b")}
    results = evaluate(models, [test, Labels(NAMES, name="none")], training={"solid": train}, probe=options)
    assert "failures" not in results
    found = results["rows"][0]["probe"]
    assert list(found) == ["solid"]
    assert found["solid"]["acc1"] == pytest.approx(11 / 12) and found["solid"]["n_train"] == 12
    assert found["solid"]["shots"] == 2 and len(found["solid"]["strength"]) == 3 and found["solid"]["acc1_sd"] == 0.0
    assert [e["difference"] for e in results["differences"] if e["metric"] == "probe_acc1"] == [0.0]
    assert "probe" not in evaluate(models, [test])["rows"][0]


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_tower_features_of_real_towers(name):
    """The same embeddings as without, and features that the tower's own last step maps to them."""
    encoder = create_model(name, seed=0).eval()
    data = Labels(NAMES[:3], broken=[1])
    plain = embed_images(encoder, data, EmbedOptions(batch_size=2)).features
    images = embed_images(encoder, data, EmbedOptions(batch_size=2), tower=True)
    tower = images.tower
    assert tower is not None
    assert torch.equal(images.features.nan_to_num(), plain.nan_to_num())
    assert torch.isnan(tower[1]).all() and torch.isfinite(tower[[0, 2]]).all()
    visual = encoder.model.visual
    with torch.no_grad():
        if isinstance(getattr(visual, "proj", None), torch.nn.Parameter):
            tower = tower @ visual.proj
        elif hasattr(visual, "trunk"):
            tower = visual.head(tower)
    np.testing.assert_allclose(torch.nn.functional.normalize(tower, dim=1)[[0, 2]], plain[[0, 2]], atol=1e-5)

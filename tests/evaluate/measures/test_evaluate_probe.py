"""The linear probe against hand-made clouds, its splits, its errors, and which features it takes of real towers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cloob.errors import InputError
from cloob.evaluate.embed import EmbedOptions, embed_images, embed_images_and_tower
from cloob.evaluate.measures.probe import ProbeOptions, _search, _split, fit_probe, probe_ranks
from cloob.evaluate.suite import evaluate
from cloob.evaluate.tower import capture_tower
from cloob.models.towers import create_model
from evaluate_fakes import COLOURS, ColourModel, Labels

NAMES = list(COLOURS)


def clouds(n: int, spread: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n points around each of three corners, far from the origin and in odd units."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    labels = torch.arange(3).repeat(n)
    return 40 * (corners[labels] + spread * torch.randn(3 * n, 3, generator=generator)) + 7, labels


def test_a_probe_is_scikit_learns_fit_at_the_strength_it_chose() -> None:
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


def test_two_classes_a_missing_class_and_unreadable_images() -> None:
    x, y = clouds(12)
    two = y != 1
    x[0] = torch.nan
    probe = fit_probe(x[two], y[two], 4)
    assert (
        probe.n_train == 23 and torch.isnan(probe.weight[[1, 3]]).all() and torch.isfinite(probe.weight[[0, 2]]).all()
    )
    ranks = probe_ranks(probe.weight, x, y)
    assert (ranks[(y == 2)] == 0).all() and (ranks[y == 0][1:] == 0).all()
    assert (ranks[y == 1] > 3).all() and ranks[0] > 3  # never learnt, not readable: not even among the last


def test_the_split_is_by_class_seeded_and_whole() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    rows = torch.arange(16)
    fitted, held_out = _split(rows, labels, ProbeOptions(), 0)
    assert sorted([*fitted.tolist(), *held_out.tolist()]) == list(range(16))
    assert [int((labels[held_out] == c).sum()) for c in range(3)] == [2, 1, 0]
    again = _split(rows, labels, ProbeOptions(), 0)
    assert torch.equal(again[0], fitted) and torch.equal(again[1], held_out)
    assert not torch.equal(_split(rows, labels, ProbeOptions(), 1)[1], held_out)
    fitted, held_out = _split(rows, labels, ProbeOptions(shots=4), 0)
    assert [int((labels[fitted] == c).sum()) for c in range(3)] == [4, 4, 1]
    assert [int((labels[held_out] == c).sum()) for c in range(3)] == [4, 1, 0]


@pytest.mark.parametrize("peak", [-6.0, -2.375, 0.0, 3.5, 6.0])
def test_the_search_finds_a_single_peak_to_an_eighth_of_a_decade(peak: float) -> None:
    tried: list[float] = []

    def score(exponent: float) -> float:
        tried.append(exponent)
        return -abs(exponent - peak)

    assert _search(score) == (peak, 0.0)
    assert len(tried) == len(set(tried)) <= 15 and all(-6 <= exponent <= 6 for exponent in tried)


def test_ties_go_to_the_stronger_penalty() -> None:
    assert _search(lambda exponent: 1.0)[0] == -6.0


def test_a_probe_in_the_suite_with_shots_and_seeds() -> None:
    test, train = Labels(NAMES * 2, broken=[0]), Labels(NAMES * 6)
    with pytest.raises(InputError, match=r"numbers from 0 to below 2\^63"):
        ProbeOptions(seeds=(2**64,))
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


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-convnext"])
def test_tower_features_of_real_towers(name: str) -> None:
    """The same embeddings as without, and features that the tower's own last step maps to them."""
    encoder = create_model(name, seed=0).eval()
    data = Labels(NAMES[:3], broken=[1])
    plain = embed_images(encoder, data, EmbedOptions(batch_size=2)).features
    images, tower = embed_images_and_tower(encoder, data, EmbedOptions(batch_size=2))
    assert torch.equal(images.features.nan_to_num(), plain.nan_to_num())
    assert torch.isnan(tower[1]).all() and torch.isfinite(tower[[0, 2]]).all()
    visual = encoder.model.visual
    with torch.no_grad():
        if isinstance(getattr(visual, "proj", None), torch.nn.Parameter):
            projected = tower @ visual.proj
        elif hasattr(visual, "trunk"):
            projected = visual.head(tower)
        else:
            projected = tower
    projected = torch.nn.functional.normalize(projected, dim=1)
    np.testing.assert_allclose(projected[[0, 2]], plain[[0, 2]], atol=1e-5)


def test_a_tower_that_fails_is_put_back_as_it_was() -> None:
    encoder = create_model("tiny-vit", seed=0).eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    visual = encoder.model.visual
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in visual.modules()]
    with pytest.raises(RuntimeError, match="stop"), capture_tower(encoder):
        raise RuntimeError("stop")
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in visual.modules()] == hooks
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

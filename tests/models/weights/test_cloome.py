"""CLOOME's checkpoints: files of its format, made here, against its formulas written
out with torch's functions.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from cloob import load_model
from cloob.errors import InputError
from cloob.models.folder import save_model
from cloob.models.weights.cloome import MEANS, CellTower, MoleculeTower, eight_bits
from support import raises, run_cloob


@pytest.fixture
def checkpoint(tmp_path):
    """A file as its training writes it, over several GPUs, and the tensors in it."""
    torch.manual_seed(0)
    made = {
        "visual": CellTower(5, [2, 1, 1, 1], 16),
        "transformer": MoleculeTower([32, 24, 24, 16]),
    }
    state = nn.ModuleDict(made).state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_(0.3, 0.3)
    state["logit_inv_tau"] = torch.tensor(math.log(30.0))
    path = tmp_path / "cloome.pt"
    named = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "name": "a run", "state_dict": named}, path)
    return path, state


def norm(x, w, name):
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(w[f"{name}.{part}"] for part in names))


def cells(x, w):
    """Their ResNet, block by block."""
    x = F.conv2d(x, w["visual.conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(norm(x, w, "visual.bn1")), 3, 2, 1)
    for stage, depth in enumerate((2, 1, 1, 1), 1):
        for block in range(depth):
            name = f"visual.layer{stage}.{block}"
            halve = stage > 1 and block == 0
            y = F.relu(norm(F.conv2d(x, w[f"{name}.conv1.weight"]), w, f"{name}.bn1"))
            y = F.conv2d(y, w[f"{name}.conv2.weight"], padding=1)
            y = F.relu(norm(y, w, f"{name}.bn2"))
            y = F.avg_pool2d(y, 2) if halve else y
            y = norm(F.conv2d(y, w[f"{name}.conv3.weight"]), w, f"{name}.bn3")
            if f"{name}.downsample.0.weight" in w:
                x = F.avg_pool2d(x, 2) if halve else x
                x = F.conv2d(x, w[f"{name}.downsample.0.weight"])
                x = norm(x, w, f"{name}.downsample.1")
            x = F.relu(x + y)
    x = F.avg_pool2d(x, 7, stride=1)
    x = F.avg_pool2d(x, x.shape[2:]).flatten(1)
    return x @ w["visual.fc.weight"].T + w["visual.fc.bias"]


def molecules(x, w):
    for layer in range(2):
        name = f"transformer.layers.{layer}"
        x = x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]
        x = F.relu(norm(x, w, f"{name}.1"))
    return x @ w["transformer.layers.2.0.weight"].T + w["transformer.layers.2.0.bias"]


def test_both_sides_are_the_originals_formulas(checkpoint, tmp_path):
    path, w = checkpoint
    encoder = load_model(path, device="cpu")
    images = torch.randint(0, 256, (2, 5, 520, 696), dtype=torch.uint8)
    means = torch.tensor(MEANS)[:, None, None]
    expected = F.normalize(cells((images / 255 - means) / means, w), dim=1)
    found = encoder.encode_a(images.flatten(1))
    assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.shape == (2, 16)
    assert not found.requires_grad
    bits = torch.randint(0, 2, (3, 32))
    expected = F.normalize(molecules(bits.float(), w), dim=1)
    assert_close(encoder.encode_b(bits), expected)
    objective = encoder.make_objective(beta=8.0)
    assert objective.name == "cloob"
    assert float(objective.inv_tau) == pytest.approx(30.0, rel=1e-6)
    raises(InputError, "which β it was trained with", encoder.make_objective)
    raises(InputError, r"\(n, 1809600\)", encoder.encode_a, images[0, :3])
    raises(
        InputError,
        "not trained or stored anew",
        save_model,
        tmp_path / "new",
        encoder,
        {},
    )


def test_commands_take_its_rows(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bits = np.random.default_rng(0).integers(0, 2, (3, 32), np.uint8)
    np.save("bits.npy", bits)
    encoder = load_model(checkpoint[0], device="cpu")
    words = "embed cloome.pt --b bits.npy --out b.npy"
    run_cloob(words)
    np.testing.assert_array_equal(np.load("b.npy"), encoder.encode_b(bits))


def test_a_channel_becomes_eight_bits_by_its_brightest_pixels():
    channel = np.arange(40_000, dtype=np.uint16).reshape(200, 200)
    found = eight_bits(channel)
    white = 40_000 - 4  # the least of the four brightest, 0.01 %
    expected = [min(int(value * 255 / white), 255) for value in range(40_000)]
    assert found.dtype == np.uint8
    assert found.ravel().tolist() == expected
    raises(ValueError, "no 0.01 %", eight_bits, channel[:2])
    raises(ValueError, "pixels of a channel are 0", eight_bits, 0 * channel)


def test_damaged_files_are_refused(checkpoint, tmp_path):
    _, state = checkpoint
    other = tmp_path / "other.pt"
    state["visual.bn1.weight"] = torch.full((64,), torch.nan)
    torch.save({"state_dict": state}, other)
    raises(InputError, r"visual\.bn1\.weight", load_model, other)
    del state["visual.bn1.weight"]
    torch.save({"state_dict": state}, other)
    raises(InputError, r"visual\.bn1\.weight is missing", load_model, other)

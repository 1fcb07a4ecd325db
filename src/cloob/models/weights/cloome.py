"""CLOOME's checkpoints (Sanchez-Fernandez et al. 2023, github.com/ml-jku/cloome): a
ResNet of five fluorescence channels and a perceptron of molecular fingerprints.

The file has no sizes: they follow from the shapes. Its quirks are kept: strides are
average pools, the last map is pooled by windows of 7 before its mean is taken, and
pixels in [0, 1] are normalised by means of pixels in [0, 255].
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.models.encoder import cloob_objective
from cloob.models.importing import import_open_clip
from cloob.models.weights.containers import TorchFile
from cloob.models.weights.keymap import fill

CHANNELS = ("Mito", "ERSyto", "ERSytoBleed", "Ph_golgi", "Hoechst")
MEANS = (47.1314, 40.8138, 53.7692, 46.2656, 28.7243)
SIDES = (520, 696)  # of a picture
WINDOW = 7  # of the last pool
N_PICTURES = 16  # that go through the tower at once
BRIGHTEST = 1e-4  # share of a channel's pixels that are white
TENSORS = {
    "logit_inv_tau",
    "visual.conv1.weight",
    "visual.fc.weight",
    "transformer.layers.0.0.weight",
}
"""Names of tensors that CLOOME's files have, and no other program's."""


class CellTower(nn.Module):
    """Pictures of C channels to rows: a ResNet whose first convolution takes C."""

    def __init__(self, n_channels: int, depths: list[int], embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        n_in = 64
        make = import_open_clip(".modified_resnet").Bottleneck
        for stage, depth in enumerate(depths):
            width = 64 << stage
            blocks = [make(n_in, width, 2 if stage else 1)]
            n_in = 4 * width
            blocks += [make(n_in, width) for _ in range(depth - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.n_stages = len(depths)
        self.fc = nn.Linear(n_in, embed_dim)
        width = n_channels * SIDES[0] * SIDES[1]
        self.options = {"features": width, "embed_dim": embed_dim}

    def forward(self, rows: Tensor) -> Tensor:
        """(n, C · 520 · 696) pixels, 0 to 255, to (n, D)."""
        return torch.cat([self._embed(part) for part in torch.split(rows, N_PICTURES)])

    def _embed(self, rows: Tensor) -> Tensor:
        means = torch.tensor(MEANS, device=rows.device)[:, None, None]
        pixels = (rows.reshape(len(rows), -1, *SIDES) / 255 - means) / means
        maps = F.relu(self.bn1(self.conv1(pixels)))
        maps = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)
        for stage in range(self.n_stages):
            maps = self.get_submodule(f"layer{stage + 1}")(maps)
        windows = F.avg_pool2d(maps, WINDOW, stride=1)
        embedded: Tensor = self.fc(windows.mean(dim=(2, 3)))
        return embedded


class MoleculeTower(nn.Module):
    """Fingerprints to rows: layers of Linear, BatchNorm and ReLU, then a Linear."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        *hidden, last = itertools.pairwise(widths)
        layers: list[nn.Module] = [
            nn.Sequential(nn.Linear(*sizes), nn.BatchNorm1d(sizes[1]), nn.ReLU())
            for sizes in hidden
        ]
        self.layers = nn.Sequential(*layers, nn.Sequential(nn.Linear(*last)))
        self.options = {"features": widths[0], "embed_dim": widths[-1]}

    def forward(self, bits: Tensor) -> Tensor:
        """(n, F) to (n, D): in the original 1,024 bits of Morgan's with radius 3 and
        chirality.
        """
        rows: Tensor = self.layers(bits)
        return rows


def eight_bits(channel: np.ndarray) -> np.ndarray:
    """A 16-bit channel (H, W) as uint8: 0 stays 0, the brightest 0.01 % are white."""
    n_brightest = round(BRIGHTEST * channel.size)
    if n_brightest < 1:
        raise ValueError(f"a channel of {channel.size} pixels has no 0.01 %")
    white = np.partition(channel, -n_brightest, axis=None)[-n_brightest]
    if white <= 0:
        raise ValueError("the brightest pixels of a channel are 0")
    return np.minimum(channel.astype(float) * (255 / float(white)), 255).astype(
        np.uint8
    )


def load(
    path: Path, file: TorchFile
) -> tuple[CellTower, MoleculeTower, dict[str, object]]:
    """Both towers with a file's weights, and the settings of their objective, whose β
    it does not hold.

    Raises:
        InputError: They are not those of CLOOME's ResNet and perceptron.
    """
    tensors = file.weights
    log_inv_tau = tensors.pop("logit_inv_tau")
    blocks = {
        tuple(key.split(".")[1:3]) for key in tensors if key.startswith("visual.layer")
    }
    depths = Counter(stage for stage, _ in sorted(blocks))
    linear = [
        weight
        for key, weight in tensors.items()
        if key.startswith("transformer.layers.") and weight.ndim == 2
    ]
    n_channels = tensors["visual.conv1.weight"].shape[1]
    embed_dim = linear[-1].shape[0]
    cells = CellTower(n_channels, list(depths.values()), embed_dim)
    molecules = MoleculeTower([*(weight.shape[1] for weight in linear), embed_dim])
    towers = nn.ModuleDict({"visual": cells, "transformer": molecules})
    fill(towers, path, tensors)
    inv_tau = float(log_inv_tau.double().exp())
    return cells, molecules, cloob_objective(inv_tau, None, "paper")

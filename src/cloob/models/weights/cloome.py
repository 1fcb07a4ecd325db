"""CLOOME's checkpoints (Sanchez-Fernandez et al. 2023, github.com/ml-jku/cloome): a
ResNet of five fluorescence channels and a perceptron of molecular fingerprints.

The file has no sizes: they follow from the shapes. Its quirks are kept: strides are
average pools, the last map is pooled by windows of 7 before its mean is taken, and
pixels in [0, 1] are normalised by means of pixels in [0, 255].
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.encoder import cloob_objective
from cloob.models.weights.containers import read_torch
from cloob.models.weights.keymap import Origin, fill
from cloob.objective import ContrastiveObjective

CHANNELS = ("Mito", "ERSyto", "ERSytoBleed", "Ph_golgi", "Hoechst")
MEANS = (47.1314, 40.8138, 53.7692, 46.2656, 28.7243)
WINDOW = 7  # of the last pool
BRIGHTEST = 1e-4  # share of a channel's pixels that are white


class Bottleneck(nn.Module):
    """A residual block whose stride is an average pool."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * width
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            parts: list[tuple[str, nn.Module]] = [
                ("0", nn.Conv2d(n_in, n_out, 1, bias=False)),
                ("1", nn.BatchNorm2d(n_out)),
            ]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, maps: Tensor) -> Tensor:
        """(n, C, H, W) to (n, 4 · width, H / stride, W / stride)."""
        inner = F.relu(self.bn1(self.conv1(maps)))
        inner = self.pool(F.relu(self.bn2(self.conv2(inner))))
        shortcut = maps
        if not isinstance(self.downsample, nn.Identity):
            shortcut = self.downsample(self.pool(maps))
        return F.relu(self.bn3(self.conv3(inner)) + shortcut)


class CellTower(nn.Module):
    """Pictures of C channels to rows: a ResNet whose first convolution takes C."""

    def __init__(self, n_channels: int, depths: list[int], embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        n_in = 64
        for stage, depth in enumerate(depths):
            width = 64 << stage
            blocks = []
            for place in range(depth):
                stride = 2 if stage and not place else 1
                blocks.append(Bottleneck(n_in, width, stride))
                n_in = 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.n_stages = len(depths)
        self.fc = nn.Linear(n_in, embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W) to (n, D)."""
        maps = F.relu(self.bn1(self.conv1(pixels)))
        maps = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)
        for stage in range(self.n_stages):
            maps = self.get_submodule(f"layer{stage + 1}")(maps)
        windows = F.avg_pool2d(maps, WINDOW, stride=1)
        rows: Tensor = self.fc(windows.mean(dim=(2, 3)))
        return rows


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

    def forward(self, bits: Tensor) -> Tensor:
        """(n, F) to (n, D)."""
        rows: Tensor = self.layers(bits)
        return rows


class CloomeEncoder(nn.Module):
    """Pictures of cells and fingerprints of molecules as unit rows of one space.

    Attributes:
        visual: The tower of pictures; ``transformer``: that of molecules, as the file
            calls it.
        objective_config: Settings of the loss that it was trained with: CLOOB's, at the
            file's τ⁻¹; the file has no β.
    """

    def __init__(
        self, n_channels: int, depths: list[int], widths: list[int], embed_dim: int
    ) -> None:
        super().__init__()
        self.visual = CellTower(n_channels, depths, embed_dim)
        self.transformer = MoleculeTower([*widths, embed_dim])
        self.objective_config: dict[str, Any] = {}

    def encode_image(self, images: Tensor, *, grad: bool = False) -> Tensor:
        """(n, D) unit rows of (n, C, H, W) pictures: uint8 as of ``eight_bits``, or
        floats that are normalised already.

        Sides of 221 or more; the original takes (520, 696).
        """
        n_channels = self.visual.conv1.in_channels
        if images.ndim != 4 or images.shape[1] != n_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; (n, {n_channels}, H, W) is"
                " expected"
            )
        if images.dtype == torch.uint8:
            means = torch.tensor(MEANS, device=images.device)[:, None, None]
            images = (images.float() / 255 - means) / means
        with torch.set_grad_enabled(grad):
            return F.normalize(self.visual(images), dim=1)

    def encode_molecule(self, bits: Tensor, *, grad: bool = False) -> Tensor:
        """(n, D) unit rows of (n, F) fingerprints: in the original 1,024 bits of
        Morgan's with radius 3 and chirality.
        """
        with torch.set_grad_enabled(grad):
            return F.normalize(self.transformer(bits.float()), dim=1)

    def make_objective(self, **overrides: Any) -> ContrastiveObjective:
        """The loss that it was trained with; ``beta=`` has to be given."""
        if "beta" not in overrides:
            raise InputError("CLOOME's files have no β; give make_objective(beta=…)")
        return ContrastiveObjective(**self.objective_config | overrides)


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


def load_cloome(path: str | Path) -> CloomeEncoder:
    """The encoder in a file of CLOOME's, in evaluation mode, read as data.

    Raises:
        InputError: The file cannot be read, or its weights are not CLOOME's ResNet and
            perceptron.
    """
    path = Path(path)
    stored = read_torch(path).tensors
    tensors = {key.removeprefix("module."): value for key, value in stored.items()}
    if not is_cloome(tensors):
        raise InputError(f"{path}: no weights of CLOOME's ResNet and perceptron")
    stages = [key.split(".")[1] for key in tensors if key.startswith("visual.layer")]
    depths = [
        len(
            {key.split(".")[2] for key in tensors if key.startswith(f"visual.{stage}.")}
        )
        for stage in sorted(set(stages))
    ]
    layers = {
        int(key.split(".")[2])
        for key in tensors
        if key.startswith("transformer.layers.")
    }
    linear = [
        tensors[f"transformer.layers.{place}.0.weight"] for place in sorted(layers)
    ]
    log_inv_tau = tensors.pop("logit_inv_tau")
    encoder = CloomeEncoder(
        n_channels=tensors["visual.conv1.weight"].shape[1],
        depths=depths,
        widths=[weight.shape[1] for weight in linear],
        embed_dim=linear[-1].shape[0],
    )
    fill(encoder, path, tensors, {key: Origin((key,)) for key in encoder.state_dict()})
    inv_tau = float(log_inv_tau.double().exp())
    encoder.objective_config = cloob_objective(inv_tau, None, "paper")
    return encoder.eval()


def is_cloome(names: Any) -> bool:
    """Whether tensors of these names are CLOOME's."""
    needed = (
        "visual.conv1.weight",
        "visual.fc.weight",
        "transformer.layers.0.0.weight",
    )
    return all(name in names for name in needed)

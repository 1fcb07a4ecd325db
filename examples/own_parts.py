"""Your Dataset, your towers, your loss and your optimiser in cloob's loop: python
examples/own_parts.py OUT.

Kill it at any moment, with -9 too, and start it again: it ends with the same bits.
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import cloob


class Views(Dataset):
    """Two views of hidden causes, with other noise in each epoch."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.causes = torch.randn(n, 6, generator=generator)
        self.a, self.b = torch.randn(
            2, 6, 20, generator=torch.Generator().manual_seed(0)
        )

    def __len__(self) -> int:
        return len(self.causes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        cause = self.causes[index] + 0.1 * torch.randn(6)
        return cause @ self.a, torch.tanh(cause @ self.b)


class Towers(nn.Module):
    """Two linear towers: Muon takes matrices alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(20, 16, bias=False), nn.Linear(20, 16, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices of rows, of any length."""
        return self.a(a), self.b(b)


class Margin(nn.Module):
    """InfoNCE of unit rows, in which a match counts for less by a margin."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of unit rows, of which row i of x belongs to row i of y."""
        logits, right = 10 * (x @ y.T - 0.1 * torch.eye(len(x))), torch.arange(len(x))
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


if __name__ == "__main__":
    config = cloob.TrainConfig().override(
        epochs=6, batch_size=64, save_every=5, best="val_recall", resume="auto"
    )
    config = config.override(device="cpu", workers=0, out=sys.argv[1])
    parts = {
        "towers": Towers(),
        "objective": Margin(),
        "optimizer": partial(torch.optim.Muon, lr=0.02),
    }
    result = cloob.train(
        config, pairs=Views(1000, seed=1), held_out=Views(200, seed=2), **parts
    )
    print(result.steps, "steps, loss", result.loss)

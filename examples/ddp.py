"""A step over several ranks: torchrun --nproc-per-node 2 ddp.py."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cloob import cached_backward, make_objective


class Model(nn.Module):
    """Your towers, and the objective."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(64, 32), nn.Linear(48, 32)
        self.objective = make_objective(name, gather=True)

    def forward(
        self, images: torch.Tensor, texts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit rows of both sides."""
        return F.normalize(self.image(images), dim=1), F.normalize(
            self.text(texts), dim=1
        )


dist.init_process_group("gloo")  # "nccl" on GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = Model(*sys.argv[1:] or ["cloob"])
ddp = DistributedDataParallel(model)  # device_ids=[local_rank] on GPUs
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

for step in range(3):
    images, texts = (
        torch.randn(16, 64)[rank::ranks],
        torch.randn(16, 48)[rank::ranks],
    )  # this rank's part
    optimizer.zero_grad()
    if step < 2:
        loss = model.objective(*ddp(images, texts))
        loss.backward()
    else:  # the same with gradient caching: gradients travel once, after the last part
        parts = list(zip(images.split(4), texts.split(4), strict=True))
        loss = cached_backward(
            lambda part: ddp(*part),
            model.objective,
            parts,
            towers=ddp,
        )
    optimizer.step()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.6f}")
dist.destroy_process_group()

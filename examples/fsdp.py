"""The same with shards: torchrun --nproc-per-node 2 fsdp.py."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from cloob import make_objective


class Towers(nn.Module):
    """Your towers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(64, 32), nn.Linear(48, 32)

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
towers, objective = Towers(), make_objective(*sys.argv[1:] or ["clip"], gather=True)
fully_shard(towers)
optimizer = torch.optim.SGD([*towers.parameters(), *objective.parameters()], lr=0.1)

for step in range(3):
    images, texts = (
        torch.randn(16, 64)[rank::ranks],
        torch.randn(16, 48)[rank::ranks],
    )  # this rank's part
    optimizer.zero_grad()
    loss = objective(*towers(images, texts))
    loss.backward()
    for parameter in objective.parameters():  # after cached_backward, too
        dist.all_reduce(parameter.grad)
        parameter.grad /= ranks
    optimizer.step()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.6f}")
dist.destroy_process_group()

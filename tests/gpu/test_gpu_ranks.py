"""Ranks on GPUs: DDP, FSDP2 and synchronised batch norm over NCCL, one rank at least and as many as there are."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from cloob.distributed import Layout, process_group
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.train.config import TrainConfig
from cloob.train.optim import make_optimizer
from cloob.train.step import Stepper, TowersWithLoss
from cloob.train.towers.build import prepare_towers

pytestmark = pytest.mark.gpu
STEPS, PAIRS = 3, 8
KINDS = {"ddp": {}, "fsdp": {"fsdp": True}, "sync-bn": {"sync_bn": True}}


def steps(rank: int, ranks: int, device: torch.device, kind: str) -> list[tuple[float, float]]:
    """Losses and gradient norms of some steps; with several ranks each has its part of the batch."""
    config = TrainConfig().override(lr=1e-3, device=str(device), **KINDS[kind])
    encoder = create_model("tiny-vit" if kind != "sync-bn" else "tiny-resnet", seed=0).train().to(device)
    objective = make_objective("cloob", gather=ranks > 1).to(device)
    if ranks > 1:
        prepare_towers(encoder, config, device)
    optimizer = make_optimizer(encoder, objective, config.optim, device)
    take = Stepper(TowersWithLoss(encoder, objective).train(), optimizer, 1.0, late=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (PAIRS, 3, 64, 64), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 400, (PAIRS, 24), generator=generator)
    tokens[:, -1] = 49407
    part = slice(rank * PAIRS // ranks, (rank + 1) * PAIRS // ranks)
    layout = Layout(tuple((r + 1) * PAIRS // ranks - r * PAIRS // ranks for r in range(ranks)))
    found = []
    for _ in range(STEPS):
        launched = take.launch(images[part].to(device), tokens[part].to(device), None, 1e-3, layout=layout)
        done = launched.result(launched.numbers.tolist())
        found.append((done.loss, done.grad_norm))
    return found


def worker(rank: int, ranks: int, port: int, kind: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    device = torch.device("cuda", rank)
    with process_group(device):
        torch.save(steps(rank, ranks, device, kind), Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_take_the_steps_of_one_process(kind: str, tmp_path: Path, cuda: torch.device) -> None:
    ranks = min(torch.cuda.device_count(), 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (ranks, port, kind, str(tmp_path)), nprocs=ranks)
    found: list[Any] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    alone = steps(0, 1, cuda, kind)
    for of_rank in found:
        assert of_rank == found[0]
        for one, other in zip(of_rank, alone, strict=True):
            assert one == pytest.approx(other, rel=1e-2)


def test_one_rank_over_nccl_talks_of_small_numbers_on_the_host(tmp_path: Path, cuda: torch.device) -> None:
    from cloob.distributed import host

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        with process_group(cuda):
            assert host(cuda) == torch.device("cpu")
            number = torch.ones(1, device=cuda)
            torch.distributed.all_reduce(number)
            there = torch.ones(1)
            torch.distributed.all_reduce(there)
            assert number.item() == there.item() == 1.0

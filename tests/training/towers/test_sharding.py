"""FSDP2 over two gloo processes against DDP and against one process; checkpoints in
shards.
"""

import copy
import os
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
from device_reads import reads
from torch import nn
from torch.distributed.tensor import DTensor
from train_helpers import lines

from cloob.distributed import Layout
from cloob.errors import InputError
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training import checkpoint, sharding
from cloob.training.build import prepare_towers
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.optim import make_optimizer
from cloob.training.step import Stepper, TowersWithLoss
from support import fork, on_ranks

CPU = torch.device("cpu")
RANKS = 2
# The gradient of a key's bias is rounding alone, of which AdamW's default eps would
# make a step of full length.
CONFIG = TrainConfig().override(lr=1e-2, device="cpu", weight_decay=0.1, eps=1e-4)
SETTINGS = {
    "sgd": {},
    "adamw": {"clip": 0.3},
    "bf16": {"precision": "bf16"},
    # Without the padding that a rank's batch shares: another length on each.
    "short captions": {"short": 3},
}


def batch(rank, size, context):
    """Ranks have different data, and different numbers of them."""
    generator = torch.Generator().manual_seed(rank)
    n = 5 - rank
    images = torch.randint(
        0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8
    )
    tokens = torch.randint(1, 400, (n, context), generator=generator)
    tokens[:, -1] = 49407
    return images, tokens


def run(setting, fsdp, steps=3):
    leaves = SETTINGS[setting]
    encoder = create_model("nano-resnet", seed=0).train()
    objective = make_objective(
        "clip", gather=True
    )  # learns its τ⁻¹, a scalar that is not sharded
    config = CONFIG.override(fsdp=fsdp)
    prepare_towers(encoder, config, CPU)
    if setting == "sgd":
        parameters = [
            p for m in (encoder, objective) for p in m.parameters() if p.requires_grad
        ]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
    else:
        optimizer = make_optimizer(encoder, objective, config, CPU)
    module = TowersWithLoss(encoder, objective, leaves.get("precision", "fp32")).train()
    stepper, read = Stepper(module, optimizer, leaves.get("clip", 0.0)), {}

    def take(*arguments):
        with reads() as noted:
            launched = stepper.launch(*arguments, layout=Layout((5, 4)))
        read.update(noted)
        return launched.result(launched.numbers.tolist())

    short = max(0, leaves.get("short", 0) - dist.get_rank())
    images, tokens = batch(
        dist.get_rank(), encoder.image_size, encoder.context_length - short
    )
    results = [take((images, tokens), None, 0.01) for _ in range(steps)]
    bad = images.clone().float()
    bad[0, 0, 0, 0] = torch.nan
    refused = take((bad if dist.get_rank() else images.float(), tokens), None, 0.01)
    sharded = [p for p in encoder.parameters() if isinstance(p, DTensor)]
    weights = {
        n: v.full_tensor() if isinstance(v, DTensor) else v
        for n, v in encoder.state_dict().items()
    }
    moments = optimizer.state_dict()
    return {
        "numbers": [(r.loss, r.grad_norm) for r in results],
        "refused": not refused.finite,
        "weights": weights,
        "inv_tau": float(objective.inv_tau.detach()),
        "groups": moments["param_groups"],
        "shapes": {
            i: {key: tuple(x.shape) for key, x in state.items()}
            for i, state in moments["state"].items()
        },
        "sharded": sum(p.numel() for p in sharded),
        "held": sum(p.to_local().numel() for p in sharded),
        "all": sum(p.numel() for p in encoder.parameters() if p.ndim),
        "read": read,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory, nano_configs):
    """What each rank has found in each setting, by DDP and by FSDP."""
    work = lambda _: {  # noqa: E731
        name: [run(name, fsdp) for fsdp in (False, True)] for name in SETTINGS
    }
    return on_ranks(tmp_path_factory.mktemp("sharding"), RANKS, work, 400)


@pytest.mark.nightly
@pytest.mark.parametrize("setting", SETTINGS)
def test_fsdp_takes_the_steps_of_ddp_and_reads_nothing(found, setting):
    ddp, fsdp = found[0][setting]
    assert (
        setting == "sgd" or fsdp["read"] == ddp["read"] == {}
    )  # SGD is told by the host to leave a step out
    tolerance = 2e-2 if setting == "bf16" else 2e-5
    torch.testing.assert_close(
        torch.tensor(fsdp["numbers"]),
        torch.tensor(ddp["numbers"]),
        rtol=tolerance,
        atol=0.0,
    )
    assert found[1][setting][1]["numbers"] == fsdp["numbers"], "ranks disagree"
    assert fsdp["inv_tau"] == pytest.approx(ddp["inv_tau"], rel=1e-5) and fsdp[
        "inv_tau"
    ] != pytest.approx(1 / 0.07)
    assert fsdp["refused"] and ddp["refused"]
    assert fsdp["weights"].keys() == ddp["weights"].keys()
    close = (
        {"rtol": 1e-2, "atol": 1e-2}
        if setting == "bf16"
        else {"rtol": 1e-4, "atol": 5e-5}
    )
    for name, value in ddp["weights"].items():
        torch.testing.assert_close(fsdp["weights"][name], value, **close, msg=name)
    assert (fsdp["groups"], fsdp["shapes"]) == (ddp["groups"], ddp["shapes"])


def test_a_kill_while_shards_are_written_leaves_the_last_checkpoint_which_any_number_resumes(
    base, tmp_path
):
    """By two processes, by one without shards, and by two again: together the run of
    one that was left alone.
    """
    config = base.override(
        model="nano-vit",
        learnable_inv_tau=True,
        schedule="constant",
        save_every=2,
        keep=0,
    )
    config = config.override(eps=1e-4, steps=7, fsdp=True, out=tmp_path / "run")

    def work():
        save, calls = checkpoint.save_model, iter(range(9))

        def dies(*arguments):
            if next(calls) == 1:  # of rank 0, in the background
                os.kill(os.getpid(), signal.SIGKILL)
            save(*arguments)

        checkpoint.save_model = dies  # type: ignore[attr-defined] # in a process of its own
        train(config)

    ranks = fork(tmp_path / "ranks", RANKS, work)
    assert -9 in ranks.wait(together=True), ranks.told()
    (kept,) = list_checkpoints(config.out)
    assert kept.name == "step-00000002" and list(kept.parent.glob(".tmp-step-00000004"))
    assert len(list((kept / "shards").glob("*.safetensors"))) == RANKS
    assert not torch.load(kept / "trainer.pt", weights_only=True)["optimizer"]["state"]

    plain = config.override(fsdp=False)
    assert train(plain.override(resume="auto", steps=5)).steps == 5
    ranks = fork(
        tmp_path / "again",
        RANKS,
        lambda: train(config.override(resume="auto")) and None,
    )
    assert set(ranks.wait()) == {0}, ranks.told()
    assert list_checkpoints(config.out)[-1].name == "step-00000007"
    train(plain.override(out=tmp_path / "plain", save_every=0))
    runs = [lines(tmp_path / name / "metrics.jsonl") for name in ("run", "plain")]
    for found, wanted in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "inv_tau"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4), (
                found["step"],
                key,
            )
    first, second = (
        load_model(tmp_path / name).state_dict() for name in ("run", "plain")
    )
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4, msg=name)

    alone = tmp_path / "alone" / "checkpoints" / kept.name
    shutil.copytree(kept, alone)
    shard = next((alone / "shards").glob("*"))
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(InputError, match="shards: damaged, its digest is not the one"):
        train(plain.override(resume="auto", out=tmp_path / "alone"))


def test_moments_take_the_layout_of_their_weights():
    """Fused AdamW pairs numbers by their place in memory, so a channels-first moment
    would belong to other weights.
    """
    after = []
    assert sharding.total_norm([]) == 0
    for layout in (torch.channels_last, torch.contiguous_format):
        weight = nn.Parameter(
            torch.arange(24.0)
            .view(2, 3, 2, 2)
            .contiguous(memory_format=torch.channels_last)
        )
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for step in range(2):
            weight.grad = (
                torch.cos(step + torch.arange(24.0))
                .view(2, 3, 2, 2)
                .to(memory_format=torch.channels_last)
            )
            optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
            for key in ("exp_avg", "exp_avg_sq"):
                state["state"][0][key] = state["state"][0][key].contiguous(
                    memory_format=layout
                )
            sharding.load_whole_optimizer(optimizer, state)
        after.append(weight.detach().clone())
    assert torch.equal(*after)

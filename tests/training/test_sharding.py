"""FSDP2 over two gloo processes against DDP and against one process; its
checkpoints.
"""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from train_helpers import assert_close_runs, on_two_ranks

from cloob.distributed import Layout
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training import checkpoint, sharding
from cloob.training.build import prepare_towers
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.optim import make_optimizer
from cloob.training.step import StepBatch, Stepper, TowersWithLoss
from support import fork, on_ranks, seeded

CPU = torch.device("cpu")
RANKS = 2
# The gradient of a key's bias is rounding alone, of which AdamW's default eps would
# make a step of full length.
CONFIG = TrainConfig().override(lr=1e-2, device="cpu", weight_decay=0.1, eps=1e-4)
SETTINGS = {
    "adamw, clipped": {},
    "bf16": {"precision": "bf16"},
    # Without the padding that a rank's batch shares: another length on each.
    "short captions": {"short": 3},
}


def batch(rank, size, context):
    """Ranks have different data, and different numbers of them."""
    generator = seeded(rank)
    n = 5 - rank
    images = torch.randint(
        0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8
    )
    tokens = torch.randint(1, 400, (n, context), generator=generator)
    tokens[:, -1] = 49407
    return images, tokens


def run(fsdp, precision="fp32", short=0):
    """The numbers of three steps and of one with a NaN; weights and moments after
    them.
    """
    encoder = create_model("nano-resnet", seed=0).train()
    # learns its τ⁻¹, a scalar that is not sharded
    objective = make_objective("clip", gather=True)
    config = CONFIG.override(fsdp=fsdp)
    prepare_towers(encoder, config, CPU)
    optimizer = make_optimizer(encoder, objective, config, CPU)
    module = TowersWithLoss(encoder, objective, precision).train()
    stepper = Stepper(module, optimizer, clip_grad_norm=0.3)

    def take(images):
        return stepper.launch(StepBatch((images, tokens), Layout((5, 4))), 0.01).read()

    length = encoder.context_length - max(0, short - dist.get_rank())
    images, tokens = batch(dist.get_rank(), encoder.image_size, length)
    results = [take(images) for _ in range(3)]
    bad = images.float()
    bad[0, 0, 0, 0] = torch.nan if dist.get_rank() else 0.0
    sharded = [p for p in encoder.parameters() if isinstance(p, DTensor)]
    moments = optimizer.state_dict()
    return {
        "numbers": [[r.loss, r.grad_norm] for r in results],
        "refused": not take(bad).finite,
        "weights": {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in encoder.state_dict().items()
        },
        "inv_tau": float(objective.inv_tau.detach()),
        "groups": moments["param_groups"],
        "shapes": {
            (number, key): tuple(value.shape)
            for number, state in moments["state"].items()
            for key, value in state.items()
        },
        "sharded": sum(p.numel() for p in sharded),
        "held": sum(p.to_local().numel() for p in sharded),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory, nano_configs):
    """What each rank has found in each setting, by DDP and by FSDP."""
    work = lambda _: {  # noqa: E731
        name: [run(fsdp, **options) for fsdp in (False, True)]
        for name, options in SETTINGS.items()
    }
    return on_ranks(tmp_path_factory.mktemp("sharding"), RANKS, work, 400)


@pytest.mark.nightly
@pytest.mark.parametrize("setting", SETTINGS)
def test_fsdp_takes_the_steps_of_ddp(found, setting):
    ddp, fsdp = found[0][setting]
    assert found[1][setting][1]["numbers"] == fsdp["numbers"], "ranks disagree"
    assert fsdp["refused"]
    assert ddp["refused"]
    assert fsdp["sharded"] > 0
    assert fsdp["held"] < 0.6 * fsdp["sharded"]
    assert fsdp["inv_tau"] == pytest.approx(ddp["inv_tau"], rel=1e-5)
    assert fsdp["inv_tau"] != pytest.approx(1 / 0.07)
    assert fsdp["groups"] == ddp["groups"]
    assert fsdp["shapes"] == ddp["shapes"]
    numbers = {"rtol": 2e-5, "atol": 0.0}
    weights = {"rtol": 1e-4, "atol": 5e-5}
    if setting == "bf16":
        numbers = {"rtol": 2e-2, "atol": 0.0}
        weights = {"rtol": 1e-2, "atol": 1e-2}
    assert_close(fsdp["numbers"], ddp["numbers"], **numbers)
    assert_close(fsdp["weights"], ddp["weights"], **weights)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(base, tmp_path):
    """By two processes with shards, by one without, and by two again: together the run
    of one that was left alone.
    """
    config = base.override(model="nano-vit", learnable_inv_tau=True, keep=0, steps=7)
    config = config.override(schedule="constant", eps=1e-4, fsdp=True)
    config = config.override(out=tmp_path / "run")

    def work():
        save = checkpoint.save_model
        calls = iter(range(9))

        def dies(*arguments):
            save(*arguments)
            if next(calls) == 1:  # of rank 0
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save_model = dies  # type: ignore[attr-defined] # in a process of its own
        train(config)

    ranks = fork(tmp_path / "ranks", RANKS, work)
    assert -9 in ranks.wait(together=True), ranks.told()
    (kept,) = list_checkpoints(config.out)
    assert kept.name == "step-00000002"
    assert list(kept.parent.glob(".tmp-step-00000004"))

    plain = config.override(fsdp=False)
    assert train(plain.override(resume="auto", steps=5)).steps == 5
    on_two_ranks(tmp_path / "again", lambda: train(config.override(resume="auto")))
    assert list_checkpoints(config.out)[-1].name == "step-00000007"
    whole = train(plain.override(out=tmp_path / "plain", save_every=0)).run
    assert_close_runs(config.out, whole, 1e-4, ("loss", "grad_norm", "inv_tau"))
    weights = [load_model(each).state_dict() for each in (config.out, whole)]
    assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_moments_take_the_layout_of_their_weights():
    """Fused AdamW pairs numbers by their place in memory, so a channels-first moment
    would belong to other weights.
    """
    channels_last = {"memory_format": torch.channels_last}

    def numbers():
        return torch.arange(24.0).view(2, 3, 2, 2).contiguous(**channels_last)

    after = []
    for layout in (torch.channels_last, torch.contiguous_format):
        weight = nn.Parameter(numbers())
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for step in range(2):
            weight.grad = torch.cos(step + numbers())
            optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
            for key in ("exp_avg", "exp_avg_sq"):
                moment = state["state"][0][key]
                state["state"][0][key] = moment.contiguous(memory_format=layout)
            sharding.load_whole_optimizer(optimizer, state)
        after.append(weight.detach().clone())
    assert torch.equal(*after)

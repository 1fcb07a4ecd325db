"""Groups of parameters and their learning rates; frozen towers; towers readied for
training against the plain ones.
"""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from train_helpers import equal

from cloob.data.open import open_source
from cloob.distributed import Layout
from cloob.errors import InputError
from cloob.models.load import load_model
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training.build import prepare_towers
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.optim import (
    make_optimizer,
    make_schedule,
    parameter_groups,
    tower_of,
    warmup_steps,
)
from cloob.training.pairs import make_loader
from cloob.training.step import StepBatch, Stepper, TowersWithLoss
from support import raises, seeded

CPU = torch.device("cpu")


@pytest.fixture
def few(base, tmp_path):
    return base.override(
        model="nano-resnet", epochs=1, warmup=0, save_every=0, out=tmp_path / "run"
    )


@pytest.mark.parametrize("micro", [pytest.param(0, marks=pytest.mark.nightly), 4])
def test_a_frozen_image_tower_keeps_weights_and_statistics(few, micro):
    result = train(few.override(freeze="image", micro_batch_size=micro))
    start = create_model("nano-resnet", seed=0).model
    end = load_model(result.run).model
    assert equal(start.visual.state_dict(), end.visual.state_dict())
    trained = {
        name: not torch.equal(value, end.get_parameter(name))
        for name, value in start.named_parameters()
        if tower_of(name) == "text" and name != "logit_scale"
    }
    assert all(trained.values())
    state = torch.load(result.checkpoint / "trainer.pt", weights_only=True)["optimizer"]
    held = [number for group in state["param_groups"] for number in group["params"]]
    assert len(state["state"]) == len(held) == len(trained)


def test_a_run_does_not_overwrite_what_it_starts_from(few):
    first = train(few)
    config = few.override(model=None, overwrite=True)
    for start in (first.run, first.checkpoint):
        match = f"^init '{start}' lies in {first.run}, which --overwrite would remove"
        raises(InputError, match, train, config.override(init=str(start)))
    assert first.checkpoint.is_dir()


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.tokens = nn.Embedding(5, 4)
        self.positions = nn.Parameter(torch.zeros(7, 4))
        self.attention = nn.MultiheadAttention(4, 1)
        self.wide_norm = nn.LayerNorm((2, 4))
        self.gain = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.tied = self.conv


def test_groups_follow_clips_rule():
    towers = Towers()
    objective = make_objective("siglip")
    named = [*towers.named_parameters(), *objective.named_parameters()]
    names = {p: name for name, p in named}
    decaying, plain = parameter_groups(towers, objective, 0.3)
    assert decaying["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert [names[p] for p in decaying["params"]] == [
        "positions",
        "conv.weight",
        "tokens.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    learned = {name for name, p in named if p.requires_grad}
    found = [names[p] for p in (*decaying["params"], *plain["params"])]
    assert sorted(found) == sorted(learned)  # each once


def cosine(steps):
    return [(1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]


WARM_UP = [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 8),
        # progress 0, 1/8, …, 7/8
        ("cosine", cosine(8)),
        # two cycles of four steps: progress 0, 1/4, 1/2, 3/4, and again
        ("cosine-restarts", 2 * cosine(4)),
    ],
)
def test_schedules_by_hand(schedule, expected):
    config = TrainConfig(lr=2.0, warmup=4, schedule=schedule, restarts=2)
    rate = make_schedule(config, 12)
    wanted = [2.0 * value for value in WARM_UP + expected]
    found = [rate(step) for step in range(12)]
    assert found == pytest.approx(wanted, abs=1e-12)
    assert rate(12) == rate(20) == (2.0 if schedule == "constant" else 0.0)


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
def test_an_optimiser_of_timm_learns_and_has_our_groups(name):
    """No decay of norms and biases, and embeddings are left to Muon's AdamW."""
    towers = Towers()
    objective = make_objective("clip")
    config = TrainConfig(optimizer=name, lr=0.1, weight_decay=0.3)
    optimizer = make_optimizer(towers, objective, config, CPU)
    assert type(optimizer).__name__.lower() == name
    of = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert of[towers.conv.weight]["weight_decay"] == 0.3
    assert of[towers.conv.bias]["weight_decay"] == 0.0
    assert of[objective.log_inv_tau]["lr"] == 0.1
    assert bool(of[towers.tokens.weight].get("use_fallback")) == (name == "muon")
    assert "use_fallback" not in of[towers.conv.weight]
    trained = [p for p in towers.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    sum(p.square().sum() + p.sum() for p in trained).backward()
    optimizer.step()
    assert not any(map(torch.equal, before, trained))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moun", r"optimizer is 'moun': timm has no such; did you mean .*muon"),
        ("fusedadam", "CUDA required"),
    ],
)
def test_an_optimiser_that_cannot_be_had_is_one_line(name, message):
    config = TrainConfig(optimizer=name)
    parts = Towers(), make_objective("cloob"), config, CPU
    raises(InputError, message, make_optimizer, *parts)


def test_default_warmup():
    assert warmup_steps(TrainConfig(), 450) == 45
    assert warmup_steps(TrainConfig(), 10**6) == 2000
    assert make_schedule(TrainConfig(lr=1.0, warmup=0), 5)(0) == 1.0
    assert warmup_steps(TrainConfig().override(warmup=0), 450) == 0


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "micro"),
    # the two passes of gradient caching must draw the same
    [("nano-vit", 0), ("nano-resnet", 0), ("nano-dropout", 2)],
)
def test_generated_code_takes_the_same_steps(few, name, micro):
    config = few.override(compile=True, micro_batch_size=micro)
    numbers, weights = two_steps(name, micro, config)
    plain_numbers, plain_weights = two_steps(name, micro)
    assert_close(numbers, plain_numbers, rtol=1e-4, atol=0.0)
    assert weights.keys() == plain_weights.keys()
    for key, value in plain_weights.items():
        near = 1e-4 * max(1e-3, float(value.abs().max()))
        assert_close(weights[key], value, rtol=0.0, atol=near, msg=key)


def two_steps(name, micro, config=None):
    """Losses and gradient norms of two steps, and the weights and statistics after
    plain gradient descent.
    """
    encoder = create_model(name, seed=0).train()
    if config is not None:
        prepare_towers(encoder, config, CPU)
    module = TowersWithLoss(encoder, make_objective("cloob")).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    stepper = Stepper(module, torch.optim.SGD(trained, lr=1.0), 0.0, micro)
    generator = seeded(5)
    shape = 6, 3, encoder.image_size, encoder.image_size
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tokens = encoder.tokenizer([f"number {i}" for i in range(6)])
    torch.manual_seed(9)
    batch = StepBatch((images, tokens), Layout((6,)))
    results = [stepper.launch(batch, 0.05).read() for _ in range(2)]
    assert all(result.finite for result in results)
    numbers = torch.tensor([(result.loss, result.grad_norm) for result in results])
    return numbers, dict(encoder.state_dict())


def test_loaders_leave_shared_padding_out_but_for_compiled_towers(few, pairs_folder):
    encoder = create_model("tiny-vit", seed=0)
    source = open_source(str(pairs_folder))
    lengths = [
        next(loader.epoch(0)).tokens.shape[1]
        for loader in (
            make_loader(source, encoder, few, CPU),
            make_loader(source, encoder, few.override(compile=True), CPU),
        )
    ]
    assert lengths == [8, 24]

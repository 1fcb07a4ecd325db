"""Groups of parameters and their learning rates; frozen towers; towers readied for
training against the plain ones.
"""

import math

import pytest
import torch
from torch import nn

from cloob.data.open import open_source
from cloob.errors import InputError
from cloob.models.load import load_model
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training.build import prepare_towers
from cloob.training.config import TrainConfig
from cloob.training.given import make_loader
from cloob.training.loop import train
from cloob.training.optim import (
    make_optimizer,
    make_schedule,
    parameter_groups,
    tower_of,
    warmup_steps,
)
from cloob.training.step import Stepper, TowersWithLoss


def weights(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same(a, b, tower):
    ignored = ("logit_scale", "num_batches_tracked")
    return {
        n: torch.equal(a[n], b[n])
        for n in a
        if tower_of(n) == tower and not n.endswith(ignored)
    }


@pytest.fixture
def few(base, tmp_path):
    return base.override(
        model="nano-resnet", epochs=1, warmup=0, save_every=0, out=tmp_path / "run"
    )


@pytest.mark.parametrize("micro", [pytest.param(0, marks=pytest.mark.nightly), 4])
def test_a_frozen_image_tower_keeps_weights_and_statistics(few, micro):
    result = train(few.override(freeze="image", micro_batch_size=micro))
    start, end = (
        weights(create_model("nano-resnet", seed=0)),
        weights(load_model(result.run)),
    )
    assert all(same(start, end, "image").values())
    assert torch.equal(
        start["visual.bn1.num_batches_tracked"], end["visual.bn1.num_batches_tracked"]
    )
    assert not any(same(start, end, "text").values())
    state = torch.load(result.checkpoint / "trainer.pt", weights_only=True)["optimizer"]
    text = [
        name
        for name in start
        if tower_of(name) == "text"
        and name != "logit_scale"
        and "attn_mask" not in name
    ]
    assert (
        len(state["state"])
        == sum(len(group["params"]) for group in state["param_groups"])
        == len(text)
    )


def test_a_run_does_not_overwrite_what_it_starts_from(few):
    first = train(few)
    config = few.override(model=None, overwrite=True)
    for start in (first.run, first.checkpoint):
        with pytest.raises(
            InputError,
            match=(
                f"^init '{start}' lies in {first.run}, which --overwrite would remove"
            ),
        ):
            train(config.override(init=str(start)))
    assert first.checkpoint is not None and first.checkpoint.is_dir()


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
    names = {
        id(p): name
        for name, p in [*towers.named_parameters(), *objective.named_parameters()]
    }
    groups = parameter_groups(towers, objective, 0.3)
    found = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in groups
    }
    decay = (
        "conv.weight tokens.weight positions attention.in_proj_weight"
        " attention.out_proj.weight"
    )
    plain = """conv.bias norm.weight norm.bias attention.in_proj_bias attention.out_proj.bias wide_norm.weight
    wide_norm.bias gain log_inv_tau bias"""
    assert found == {0.3: set(decay.split()), 0.0: set(plain.split())}
    assert sum(len(group["params"]) for group in groups) == 15  # type: ignore[arg-type] # each once
    by_name = parameter_groups(
        towers, objective, 0.3, by_name=True
    )  # as the authors' program
    plain = next(group["params"] for group in by_name if group["weight_decay"] == 0.0)
    assert {names[id(p)] for p in plain} == {
        name for name in names.values() if "bias" in name and "." in name
    }


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # progress 0, 1/8, …, 7/8
        (
            "cosine",
            [0.25, 0.5, 0.75, 1.0]
            + [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)],
        ),
        # two cycles of four steps: progress 0, 1/4, 1/2, 3/4, and again
        (
            "cosine-restarts",
            [
                0.25,
                0.5,
                0.75,
                1.0,
                *2 * [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4],
            ],
        ),
    ],
)
def test_schedules_by_hand(schedule, expected):
    config = TrainConfig(lr=2.0, warmup=4, schedule=schedule, restarts=2)
    rate = make_schedule(config, 12)
    assert [rate(step) for step in range(12)] == pytest.approx(
        [2.0 * value for value in expected], abs=1e-12
    )
    assert rate(12) == rate(20) == (2.0 if schedule == "constant" else 0.0)
    theirs = make_schedule(
        TrainConfig(lr=2.0, warmup=4, schedule=schedule, restarts=2, like_ml_jku=True),
        12,
    )
    assert [theirs(step) for step in range(5)] == [0.0, 0.5, 1.0, 1.5, rate(4)]


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
def test_an_optimiser_of_timm_learns_and_has_our_groups(name):
    """No decay of norms and biases, and embeddings are left to Muon's AdamW."""
    towers, objective = Towers(), make_objective("clip")
    config = TrainConfig(optimizer=name, lr=0.1, weight_decay=0.3)
    optimizer = make_optimizer(towers, objective, config, torch.device("cpu"))
    assert type(optimizer).__name__.lower() == name
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert [
        of[id(p)]["weight_decay"]
        for p in (towers.conv.weight, towers.conv.bias, towers.gain)
    ] == [0.3, 0.0, 0.0]
    assert bool(of[id(towers.tokens.weight)].get("use_fallback")) == (name == "muon")
    assert (
        "use_fallback" not in of[id(towers.conv.weight)]
        and of[id(objective.log_inv_tau)]["lr"] == 0.1
    )
    before = {
        key: p.detach().clone()
        for key, p in towers.named_parameters()
        if p.requires_grad
    }
    sum(p.square().sum() + p.sum() for p in towers.parameters()).backward()
    optimizer.step()
    assert not any(
        torch.equal(before[key], towers.get_parameter(key)) for key in before
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moun", r"optimizer is 'moun': timm has no such; did you mean .*muon"),
        ("fusedadam", "CUDA required"),
    ],
)
def test_an_optimiser_that_cannot_be_had_is_one_line(name, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(
            Towers(),
            make_objective("cloob"),
            TrainConfig(optimizer=name),
            torch.device("cpu"),
        )


def test_default_warmup():
    assert warmup_steps(TrainConfig(), 450) == 45
    assert warmup_steps(TrainConfig(), 10**6) == 2000
    assert make_schedule(TrainConfig(lr=1.0, warmup=0), 5)(0) == 1.0
    assert warmup_steps(TrainConfig().override(warmup=0), 450) == 0


# How towers are readied for training: layout, recomputation, compilation


CPU = torch.device("cpu")


def steps(encoder, precision="fp32", micro=0, number=2):
    """Losses and gradient norms; weights and buffers after SGD."""
    module = TowersWithLoss(encoder, make_objective("cloob"), precision).train()
    take = Stepper(
        module,
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0),
        0.0,
        micro,
    )
    generator, size = torch.Generator().manual_seed(5), encoder.image_size
    images = torch.randint(
        0, 256, (6, 3, size, size), generator=generator, dtype=torch.uint8
    )
    tokens = encoder.tokenizer([f"number {i}" for i in range(6)])
    torch.manual_seed(9)
    results = [take((images, tokens), None, 0.05) for _ in range(number)]
    assert all(result.finite for result in results)
    numbers = [(result.loss, result.grad_norm) for result in results]
    return [numbers, dict(encoder.state_dict())]


def assert_same(found, wanted, tolerance):
    torch.testing.assert_close(
        torch.tensor(found[0]), torch.tensor(wanted[0]), rtol=tolerance, atol=0.0
    )
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        scale = max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(
            found[1][name], value, rtol=0.0, atol=tolerance * scale, msg=name
        )


def prepared(name, **leaves):
    encoder = create_model(name, seed=0).train()
    prepare_towers(encoder, TrainConfig().override(device="cpu", **leaves), CPU)
    return encoder


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("nano-vit", {}),
        ("nano-resnet", {}),
        ("nano-dropout", {"micro_batch_size": 2}),  # both passes must draw the same
    ],
    ids=str,
)
def test_generated_code_takes_the_same_steps(nano_configs, name, leaves):
    micro = leaves.get("micro_batch_size", 0)
    plain = create_model(name, seed=0).train()
    assert_same(
        steps(prepared(name, compile=True, **leaves), micro=micro),
        steps(plain, micro=micro),
        1e-4,
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_loaders_leave_shared_padding_out_but_for_compiled_towers(
    pairs_folder, tmp_path, compiled
):
    encoder = create_model("tiny-vit", seed=0).train()
    config = TrainConfig().override(
        data=[str(pairs_folder)], batch_size=8, workers=0, device="cpu", out=tmp_path
    )
    config = config.override(compile=compiled)
    source = open_source(str(pairs_folder))
    given = next(
        iter(make_loader(source, encoder, config, torch.device("cpu")).epoch(0))
    )
    assert given.tokens.shape[1] == (24 if compiled else 8)

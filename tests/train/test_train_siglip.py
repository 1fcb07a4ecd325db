"""Training with SigLIP's loss: the loop written out; its bias in log, checkpoint, open_clip's folder and resumption."""

from __future__ import annotations

import math
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from train_helpers import exact, lines

from cloob.errors import InputError
from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint
from cloob.objective import make_objective
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.optim import learning_rate
from cloob.train.towers import build

STEPS = 10


def sigmoid_loss(x: Tensor, y: Tensor, log_inv_tau: Tensor, bias: Tensor) -> Tensor:
    """Zhai et al. 2023, Algorithm 1."""
    logits = log_inv_tau.exp() * x @ y.T + bias
    signs = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)


def test_a_run_is_the_loop_written_out(base: TrainConfig, tmp_path: Path) -> None:
    config = base.override(objective="siglip", model="nano-vit", lr=3e-3, steps=STEPS, bias=-8.0, out=tmp_path / "run")
    train(config)
    encoder = build.make_encoder(config).train()
    log_inv_tau, bias = torch.tensor(math.log(10.0)).requires_grad_(), torch.tensor(-8.0).requires_grad_()
    decays = [p for n, p in encoder.named_parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in encoder.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": decays, "weight_decay": config.optim.weight_decay},
        {"params": [*others, log_inv_tau, bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    source, _ = build.open_both(config)
    loader = build.make_loader(source, encoder, config, torch.device("cpu"))
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)][:STEPS]
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    for step, (batch, line) in enumerate(zip(batches, logged, strict=True)):
        loss = sigmoid_loss(*encoder(batch.images, batch.tokens), log_inv_tau, bias)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=3e-3, total=STEPS, warmup=3, schedule="cosine")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert line["bias"] == pytest.approx(bias.item(), rel=1e-6)
        assert line["inv_tau"] == pytest.approx(log_inv_tau.exp().item(), rel=1e-5)
        assert line["beta"] is None
        assert "saturation" not in line  # of a softmax, which there is none of
    assert bias.item() != pytest.approx(-8.0, abs=1e-3)
    assert "effective_eigenvalues_text" in logged[3]


@pytest.mark.parametrize("objective", ["siglip", "siglip-hopfield"])
def test_the_bias_goes_through_checkpoint_folder_and_resumption(
    objective: str, base: TrainConfig, tmp_path: Path
) -> None:
    whole, cut = (base.override(objective=objective, out=tmp_path / name, epochs=2) for name in ("whole", "cut"))
    train(whole)
    train(cut.override(epochs=1))
    train(cut.override(resume="auto"))
    assert exact(tmp_path / "cut")[:5] != exact(tmp_path / "whole")[:5]  # another schedule: it was another length
    train(whole.override(out=tmp_path / "again", save_every=5))
    for late in (tmp_path / "again" / "checkpoints").iterdir():
        if late.name != "step-00000005":
            for path in sorted(late.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            late.rmdir()
    train(whole.override(out=tmp_path / "again", save_every=5, resume="auto"))
    one, other = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "again"))
    assert [line["bias"] for line in one] == [line["bias"] for line in other]
    assert exact(tmp_path / "whole") == exact(tmp_path / "again")
    config = TrainConfig.from_json(tmp_path / "again" / "config.json")
    assert (config.loss.bias, config.loss.inv_tau, config.loss.scale) == (-10.0, 10.0, "unit")

    encoder = load_model(tmp_path / "again")
    trained = encoder.make_objective()
    assert trained.name == objective and trained.bias is not None
    assert trained.bias.item() == pytest.approx(one[-1]["bias"], rel=1e-6) and trained.bias.item() != -10.0
    folder = latest_checkpoint(tmp_path / "again") / "model"
    theirs = open_clip.create_model(f"local-dir:{folder}")
    assert theirs.logit_bias.item() == pytest.approx(one[-1]["bias"], rel=1e-6)
    assert theirs.logit_scale.exp().item() == pytest.approx(one[-1]["inv_tau"], rel=1e-6)

    started = base.override(
        objective=objective, model=None, init=str(tmp_path / "again"), init_scales=True, steps=1, epochs=None
    )
    train(started.override(out=tmp_path / "on"))
    assert TrainConfig.from_json(tmp_path / "on" / "config.json").loss.bias == pytest.approx(trained.bias.item())
    train(started.override(objective="clip", init_scales=False, out=tmp_path / "clip"))
    assert not any("bias" in line for line in lines(tmp_path / "clip" / "metrics.jsonl"))
    left = open_clip.create_model(f"local-dir:{latest_checkpoint(tmp_path / 'clip') / 'model'}")
    assert left.logit_bias is None  # in a softmax it cancels


def test_a_resumption_with_another_start_of_the_bias_is_another_objective(base: TrainConfig, tmp_path: Path) -> None:
    config = base.override(objective="siglip", out=tmp_path, epochs=1, save_every=0)
    train(config)
    with pytest.raises(InputError, match=r"was trained with loss\.bias = -10\.0, not -3\.0"):
        train(config.override(bias=-3.0, epochs=2, resume="auto"))


def test_every_member_can_be_named_in_a_configuration() -> None:
    for name in ("siglip", "siglip-hopfield"):
        loss = TrainConfig().override(objective=name, bias=-7.0, **({"beta": 4.0} if "hop" in name else {})).loss
        objective = make_objective(loss.objective, **loss.overrides())
        assert objective.name == name and objective.config()["bias"] == -7.0

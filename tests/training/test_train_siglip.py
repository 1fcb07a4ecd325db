"""Training with SigLIP's loss: the loop written out; its bias in log, checkpoint, open_clip's folder and resumption."""

from __future__ import annotations

import math
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from train_helpers import lines

from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint
from cloob.training import build
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.optim import make_schedule

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
            group["lr"] = make_schedule(config.optim, STEPS)(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert line["bias"] == pytest.approx(bias.item(), rel=1e-6)
        assert line["inv_tau"] == pytest.approx(log_inv_tau.exp().item(), rel=1e-5)
        assert line["beta"] is None
        assert "saturation" not in line  # of a softmax, which there is none of
    assert bias.item() != pytest.approx(-8.0, abs=1e-3)
    assert "effective_eigenvalues_text" in logged[3]


def test_the_bias_goes_into_the_folder_and_another_run(base: TrainConfig, tmp_path: Path) -> None:
    train(base.override(objective="siglip", out=tmp_path / "run", epochs=1))
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    config = TrainConfig.from_json(tmp_path / "run" / "config.json")
    assert (config.loss.bias, config.loss.inv_tau, config.loss.scale) == (-10.0, 10.0, "unit")
    trained = load_model(tmp_path / "run").make_objective()
    assert trained.name == "siglip" and trained.bias is not None
    assert trained.bias.item() == pytest.approx(last["bias"], rel=1e-6) and trained.bias.item() != -10.0
    theirs = open_clip.create_model(f"local-dir:{latest_checkpoint(tmp_path / 'run') / 'model'}")
    assert theirs.logit_bias.item() == pytest.approx(last["bias"], rel=1e-6)
    assert theirs.logit_scale.exp().item() == pytest.approx(last["inv_tau"], rel=1e-6)

    clip = base.override(objective="clip", model=None, init=str(tmp_path / "run"), steps=1, out=tmp_path / "clip")
    left = open_clip.create_model(f"local-dir:{train(clip).checkpoint}/model")
    assert left.logit_bias is None  # in a softmax it cancels

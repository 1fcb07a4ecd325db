"""Whole runs on the GPU: the demo's pairs, interrupted and resumed, profiled, in each precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cloob.models.load import load_model
from cloob.train.callbacks import Callback
from cloob.train.config import TrainConfig
from cloob.train.loop import train

pytestmark = pytest.mark.gpu


def config(device: torch.device, out: Path, **leaves: Any) -> TrainConfig:
    small = {"steps": 8, "batch_size": 16, "epochs": None, "model": "tiny-vit", "workers": 0, "log_every": 3}
    start = TrainConfig().override(data=["demo"], device=str(device), tensorboard=False, out=out, lr=1e-3)
    return start.override(**(small | leaves))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Stops(Callback):
    """Breaks the run off."""

    def on_checkpoint(self, path: Path) -> None:
        raise RuntimeError("broken off")


@pytest.mark.parametrize(
    "leaves",
    [
        {"precision": "auto", "ema": 0.9},
        {"precision": "bf16", "objective": "siglip"},
        {"precision": "fp16", "micro_batch_size": 8, "model": "tiny-resnet"},
    ],
    ids=["auto", "bf16", "fp16"],
)
def test_a_run_goes_on_where_it_was(leaves: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu" and leaves["precision"] == "fp16":
        pytest.skip("float16 takes minutes on a CPU")
    whole = config(device, tmp_path / "whole", **leaves)
    train(whole)
    part = config(device, tmp_path / "part", save_every=4, **leaves)
    with pytest.raises(RuntimeError, match="broken off"):
        train(part, callbacks=[Stops()])
    train(part.override(resume="auto"))
    one, other = lines(tmp_path / "whole"), lines(tmp_path / "part")
    assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(1, 9))
    for here, there in zip(one, other, strict=True):
        # Sums on a GPU are not of one order each time.
        assert (here["loss"] is None) == (there["loss"] is None)
        if here["loss"] is not None:
            assert there["loss"] == pytest.approx(here["loss"], rel=2e-2, abs=2e-3)
    encoder = load_model(tmp_path / "part", device=device)
    assert encoder.make_objective().name == whole.loss.objective
    assert encoder.encode_text(["a red heart"]).isfinite().all()
    if device.type == "cuda":
        assert all(0 <= line["device_wait"] <= 1 for line in one)
        saved = TrainConfig.from_json(tmp_path / "whole" / "config.json").run
        assert saved.tf32 == (leaves["precision"] == "auto") and saved.precision != "auto"


def test_a_profile(device: torch.device, tmp_path: Path) -> None:
    train(config(device, tmp_path / "run", steps=20, profile=True))
    told = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert "waited for:" in told and "forward" in told
    assert ("on the device" in told) == (device.type == "cuda")
    assert (tmp_path / "run" / "profile" / "trace.json.gz").stat().st_size > 1000

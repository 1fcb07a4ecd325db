from __future__ import annotations

import json
from pathlib import Path

import tyro

from cloob.training.config import TrainConfig
from cloob.training.config.strict import hints, leaf_homes


def test_json_round_trip(tmp_path: Path) -> None:
    config = TrainConfig().override(
        data=["a.csv", "b"], lr=3, crop_scale=[0.5, 1], warmup=None, out="runs/x", inv_tau=20, learnable_beta=True
    )
    assert config.optim.lr == 3.0 and isinstance(config.optim.lr, float)
    assert config.pairs.data == ("a.csv", "b") and config.save.out == Path("runs/x")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig.from_json(path) == config


def test_scales_go_with_their_objective() -> None:
    config = TrainConfig().override(inv_tau=8.0, beta=16.0, scale="paper", lr=3.0)
    assert config.override(lr=1.0, objective="cloob").loss == config.loss
    other = config.override(objective="infoloob", inv_tau=15.0)
    assert other.loss.overrides() == {"inv_tau": 15.0} and other.optim.lr == 3.0


def test_what_is_left_out_takes_its_default() -> None:
    assert TrainConfig.from_dict({"optim": {"lr": 0.5}}) == TrainConfig().override(lr=0.5)


def test_leaf_names_are_unique() -> None:
    leaves = [leaf for part in hints(TrainConfig).values() for leaf in hints(part)]
    assert len(leaves) == len(set(leaves)) == len(leaf_homes(TrainConfig))
    assert json.dumps(TrainConfig().to_dict())


def test_command_line_is_flat() -> None:
    arguments = ["--data", "a", "b", "--lr", "0.1", "--objective", "infonce-hopfield", "--resume", "auto"]
    arguments += ["--out", "k", "--beta", "4", "--beta2", "0.98", "--warmup", "7"]
    config = tyro.cli(tyro.conf.OmitArgPrefixes[TrainConfig], args=arguments)
    wanted = {"data": ("a", "b"), "lr": 0.1, "objective": "infonce-hopfield", "resume": "auto", "out": "k", "warmup": 7}
    assert config == TrainConfig().override(**wanted, beta=4.0, beta2=0.98)

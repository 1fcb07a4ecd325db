from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from cloob.errors import InputError
from cloob.train.config import TrainConfig
from cloob.train.config.strict import hints, leaf_homes


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


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optim": {"lrr": 1}}, r"unknown key 'optim\.lrr'; did you mean lr"),
        ({"lr": 1}, r"unknown key 'lr'; it belongs in 'optim'"),
        ({"optimm": {}}, r"unknown key 'optimm'; did you mean optim"),
        ({"optim": {"lr": -1.0}}, r"lr is -1\.0; it must be a positive number"),
        ({"optim": {"lr": float("nan")}}, r"lr is nan"),
        ({"optim": {"lr": "big"}}, r"optim\.lr is 'big'; it must be a number"),
        ({"optim": {"lr": True}}, r"optim\.lr is True; it must be a number"),
        ({"optim": {"beta2": 1}}, r"beta2 is 1\.0; it must be in \[0, 1\)"),
        (
            {"optim": {"schedule": "linear"}},
            r"schedule is 'linear'; it must be one of constant, cosine, cosine-restarts",
        ),
        ({"run": {"batch_size": 1}}, r"batch_size is 1; it must be 2 or more"),
        ({"run": {"epochs": 0}}, r"epochs is 0; it must be 1 or more"),
        ({"run": {"epochs": 1.5}}, r"epochs is 1\.5; it must be a whole number"),
        ({"run": {"device": "tpu"}}, r"device is 'tpu'; it must be auto, cpu, cuda, cuda:N or mps"),
        ({"run": {"device": "cuda:x"}}, r"device is 'cuda:x'"),
        ({"pairs": {"data": "a.csv"}}, r"pairs\.data is 'a\.csv'; it must be a list"),
        ({"pairs": {"crop_scale": [0.9]}}, r"crop_scale is \[0\.9\]; it must be a list of 2"),
        ({"pairs": {"crop_scale": [0.9, 0.5]}}, r"crop_scale is \(0\.9, 0\.5\)"),
        ({"pairs": {"max_bad_fraction": 5}}, r"max_bad_fraction is 5\.0; it must be between 0 and 1"),
        ({"loss": {"objective": "cloop"}}, r"loss\.objective is 'cloop'; it must be one of clip"),
        ({"loss": {"inv_tau": 0}}, r"inv_tau is 0\.0; it must be a positive number"),
        ({"loss": {"objective": "infoloob", "beta": 4}}, r"beta is 4\.0; it must be left out with infoloob"),
        ({"loss": {"learnable_inv_tau": True, "scale": "paper"}}, r"learnable_inv_tau is True; it must be left out"),
        ({"save": {"overwrite": True, "resume": "auto"}}, r"overwrite is True; it must be left out with --resume auto"),
        ({"optim": 3}, r"optim is 3; it must be an object"),
        ([], r"the whole is \[\]"),
    ],
)
def test_bad_values_are_named_in_one_line(values: object, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        TrainConfig.from_dict(values, source="my.json")  # type: ignore[arg-type]
    assert str(caught.value).startswith("my.json: ") and "\n" not in str(caught.value)


def test_override_names_unknown_leaves() -> None:
    with pytest.raises(InputError, match="unknown key 'epoch'; did you mean epochs"):
        TrainConfig().override(epoch=3)


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file"):
        TrainConfig.from_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json: not readable as JSON"):
        TrainConfig.from_json(tmp_path / "bad.json")


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


def test_importing_config_and_recipes_imports_no_torch() -> None:
    code = "import sys, cloob.train.config, cloob.recipes; print('torch' in sys.modules or 'open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""Every setting, at every door of the training of towers: another value than the
default changes what a run does, or is refused in one line.
"""

import dataclasses
from functools import partial

import pytest
import torch
from own_items import DictTowers, Learned, Named
from train_helpers import exact

import cloob
from cloob import TrainConfig
from cloob.errors import InputError
from make import write_forty
from support import read_json, read_lines

# Another value of every setting, whose effect shows in a run of a few steps.
VALUES = {
    "image_column": "picture",
    "caption_column": "caption",
    "shuffle_buffer": 4,
    "crop_scale": (0.3, 0.4),
    "flip": True,
    "max_bad_fraction": 0.0,
    "init": "nano-vit",
    "image_size": 40,
    "freeze": "image",
    "inv_tau": 5.0,
    "beta": 2.0,
    "bias": -1.0,
    "retrieval_from": 0.5,
    "learnable_inv_tau": True,
    "learnable_beta": True,
    "scale": "unit",
    "exclude_above": -0.01,
    "mask_duplicates": True,
    "lr": 5e-4,
    "weight_decay": 3.0,
    "beta1": 0.3,
    "beta2": 0.3,
    "eps": 1e-2,
    "clip_grad_norm": 1e-3,
    "schedule": "constant",
    "warmup": 3,
    "restarts": 2,
    "ema": 0.5,
    "epochs": 3,
    "steps": 2,
    "batch_size": 5,
    "micro_batch_size": 3,
    "precision": "bf16",
    "fsdp": True,
    "seed": 1,
    "save_every": 1,
    "keep": 1,
    "best": "val_recall",
}
# What no number of a run shows on this machine, and where it does.
ELSEWHERE = {
    "workers": "how many processes decode; the batches are the same",
    "device": "auto is the CPU here",
    "compile": "the time that a step takes",
    "patience": "validations that get no better",
    "out": "the folder",
    "resume": "a folder that holds a run",
    "overwrite": "a folder that holds a run",
}
# A given part takes the place of what the configuration names.
NAMES = {"data", "val_data", "val_split", "model", "objective", "optimizer"}


def door_of_files(folder):
    """Pairs, towers, loss and optimiser as the configuration names them."""
    pictures = write_forty(folder / "pictures")
    (pictures / "03.png").write_bytes(b"this is no picture")
    rows = [f"pictures/{i:02d}.png\tcaption {i % 5}" for i in range(24)]
    for name, part in (("train", rows[:16]), ("val", rows[16:])):
        text = "\n".join(["filepath\ttitle", *part]) + "\n"
        (folder / f"{name}.csv").write_text(text)
    return {
        "data": [str(folder / "train.csv")],
        "val_data": [str(folder / "val.csv")],
        "model": "nano-dropout",
        "max_bad_fraction": 0.2,
    }, dict


def door_of_parts(folder):
    """All parts given."""

    def parts():
        torch.manual_seed(0)
        return {
            "pairs": Named(20),
            "held_out": Named(10),
            "towers": DictTowers(),
            "objective": Learned(),
            "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.5),
        }

    return {"max_bad_fraction": 0.2}, parts


def done(config, parts):
    """All that a run says of itself but for times, or that it was refused."""
    try:
        run = cloob.train(config, **parts()).run
    except InputError:
        return "refused"
    epochs = [{**line, "seconds": 0} for line in read_lines(run / "epochs.jsonl")]
    metrics = [line.keys() for line in read_lines(run / "metrics.jsonl")]
    files = sorted(
        str(path.relative_to(run)).partition(".out")[0] for path in run.rglob("*")
    )
    judged = [read_json(file) for file in run.rglob("validation.json")]
    return exact(run), metrics, epochs, files, judged


@pytest.mark.parametrize("door", [door_of_files, door_of_parts])
def test_every_setting_has_an_effect_or_is_refused(door, nano_configs, tmp_path):
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    names = {name for name in names if not name.startswith("given_")}
    assert names == VALUES.keys() | ELSEWHERE.keys() | NAMES
    settings, parts = door(tmp_path)
    start = TrainConfig().override(
        epochs=2, batch_size=8, warmup=2, workers=0, device="cpu"
    )
    start = start.override(**settings)
    usual = done(start.override(out=tmp_path / "usual"), parts)
    assert usual != "refused"
    without = []
    for leaf, value in VALUES.items():
        config = start.override(**{leaf: value}).override(out=tmp_path / leaf)
        if done(config, parts) == usual:
            without.append(leaf)
    assert without == []

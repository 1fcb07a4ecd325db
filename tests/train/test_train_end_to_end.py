"""Whole recipes on their real formats, small: from the command line, over two processes, through a kill."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from train_helpers import KilledAfter, exact, lines

from cloob.cli import main
from cloob.models.load import load_model
from cloob.recipes import get_recipe
from cloob.train.loop import train
from support import fork

SMALL = "--model nano-vit --image-size 32 --batch-size 8 --epochs 3 --workers 1 --warmup 3 --log-every 5 --device cpu"


@pytest.mark.parametrize(
    ("recipe", "form"),
    [("cc3m-cloob", "table"), ("yfcc-rn50-cloob", "shards"), ("cc3m-clip", "table"), ("yfcc-rn50-clip", "shards")],
)
def test_the_paper_s_recipes_on_their_formats(
    pairs_as: dict[str, str], nano_configs: Path, tmp_path: Path, recipe: str, form: str
) -> None:
    """The authors' tab-separated table named .csv; tars with their sizes.json. Only sizes are overridden."""
    words = ["train", recipe, "--data", pairs_as[form], "--out", str(tmp_path / "run"), *SMALL.split()]
    ranks = fork(tmp_path, 1, lambda: main([*words, "--max-bad-fraction", "0.1"]))
    assert ranks.wait() == [0], ranks.told()
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 16)) and found[-1]["samples_seen"] == 114
    assert sum(line["loss"] is not None for line in found) >= 12  # fp16 finds its scale in the first steps
    for line in lines(tmp_path / "run" / "epochs.jsonl"):
        assert line["skipped"] == {"corrupt image": 1, "empty caption": 1}
    encoder = load_model(tmp_path / "run")
    assert encoder.objective_config["hopfield"] == recipe.endswith("cloob")
    assert encoder.objective_config["learnable_inv_tau"] == recipe.endswith("clip")


def first_pairs(shard: Path, folder: Path, pairs: int) -> str:
    """The first pairs of a shard as two shards."""
    folder.mkdir()
    with tarfile.open(shard) as tar:
        members = [tar.next() for _ in range(2 * pairs)]  # a picture and its caption each
        for number, part in enumerate((members[:pairs], members[pairs:])):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as small:
                for member in part:
                    assert member is not None
                    small.addfile(member, tar.extractfile(member))
    return str(folder)


@pytest.mark.parametrize(
    "size",
    [
        {"model": "nano-vit", "batch_size": 80, "epochs": 2, "save_every": 3, "pairs": 640},
        pytest.param({"batch_size": 128, "epochs": 3, "save_every": 10, "pairs": 4804}, marks=pytest.mark.nightly),
    ],
    ids=["short", "tiny-resnet"],
)
def test_pictograms_killed_and_resumed(
    shared_data: Path, nano_configs: Path, tmp_path: Path, size: dict[str, Any]
) -> None:
    """Several epochs from shards with two processes; killed with -9, resumed; the metrics are those of a whole run."""
    size = dict(size)
    pairs = size.pop("pairs")
    last = pairs // size["batch_size"] * size["epochs"]
    shards = first_pairs(shared_data / "pictograms" / "train" / "00000.tar", tmp_path / "shards", pairs)
    config = get_recipe("pictograms-cloob").override(data=[shards], keep=2, device="cpu", tensorboard=False, **size)
    runs = {name: config.override(out=tmp_path / name) for name in ("whole", "killed")}
    ranks = fork(tmp_path / "a", 2, lambda: train(runs["whole"]) and None)
    assert ranks.wait(280) == [0, 0], ranks.told()
    chance = random.Random()
    killed = KilledAfter(chance.randint(3, last - 4), chance.uniform(0, 0.095))
    print(killed)
    ranks = fork(tmp_path / "b", 2, lambda: train(runs["killed"], callbacks=[killed]) and None)
    codes = ranks.wait(280, together=True)
    assert -9 in codes and set(codes) <= {-9, 1}, ranks.told()  # the other rank may notice before it is killed
    ranks = fork(tmp_path / "c", 2, lambda: train(runs["killed"].override(resume="auto")) and None)
    assert ranks.wait(280) == [0, 0], ranks.told()
    found = exact(runs["killed"].save.out)
    assert found == exact(runs["whole"].save.out)
    assert [line["step"] for line in found] == list(range(1, last + 1))

"""docs/reproduce.md: its commands are ones that the program takes, and its numbers those of the record."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from cloob.commands import eval as eval_command
from cloob.commands.arguments import parse
from cloob.commands.train import read_start
from cloob.recipes import RECIPES, get_recipe
from cloob.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reproduce.md"
RECORD = ROOT / "benchmarks" / "results" / "train_cost" / "results.json"


def commands() -> list[list[str]]:
    """The words of each cloob command of the page, torchrun's own left out."""
    if not PAGE.is_file():  # the tests of an installed package have no documentation beside them
        return []
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ "))
        if words[:1] == ["torchrun"]:
            module = words.index("-m")
            assert words[1:3] == ["--nproc-per-node", "8"] and words[module + 1] == "cloob"
            found.append(words[module + 2 :])
        elif words[:1] == ["cloob"]:
            found.append(words[1:])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_command_is_understood(words: list[str]) -> None:
    command, *rest = words
    if command == "eval":
        arguments = parse(eval_command.EvalArguments, rest, "cloob eval")
        assert arguments.models and arguments.suite
        return
    assert command == "train"
    recipe, (start, changes) = rest[0], read_start(rest)
    config = parse(TrainConfig, changes, "cloob train", start)
    assert config.loss == get_recipe(recipe).loss and config.pairs.data != ("demo",)
    assert config.run.batch_size == 512


def test_the_page_has_every_recipe_of_the_paper() -> None:
    trained = {words[1] for words in commands() if words[0] == "train"}
    paper = {name for name in RECIPES if name.startswith(("cc3m", "yfcc")) and "vit" not in name}
    assert trained == paper
    assert all((words[0] == "eval") == (words[1] not in RECIPES) for words in commands())


def test_what_it_costs_is_what_the_record_says() -> None:
    record = json.loads(RECORD.read_text())
    exponents = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    rows = re.findall(r"^\| `([\w-]+)-\*`[^|]*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 6
    for prefix, cells in rows:
        pixels, steps, *others = [cell.strip() for cell in cells.split("|")]
        row = record["recipes"][f"{prefix}-cloob"]
        assert (int(pixels), int(steps.replace(",", ""))) == (row["image_size"], row["steps"])
        numbers = [float(a) * 10 ** int(b.translate(exponents)) for a, b in (cell.split(" × 10") for cell in others)]
        expected = [row["pairs_seen"], row["tower_flops_a_pair"], row["total_flops"]]
        assert numbers == pytest.approx(expected, rel=0.05)
    for name, row in record["recipes"].items():  # the record is that of the recipes as they are
        config = get_recipe(name)
        pairs = record["pairs"][name.partition("-")[0]]
        assert row["model"] == config.towers.model
        assert row["steps"] == pairs // config.run.batch_size * config.run.epochs
        assert row["total_flops"] == row["steps"] * config.run.batch_size * row["tower_flops_a_pair"]
    rate = 8 * 1e14
    hours = [record["recipes"][name]["total_flops"] / rate / 3600 for name in ("cc3m-cloob", "yfcc-rn50-cloob")]
    assert hours == pytest.approx([3.8, 20], rel=0.02)
    assert rate / record["recipes"]["cc3m-cloob"]["tower_flops_a_pair"] == pytest.approx(14_800, rel=0.01)

"""What commands say at their end, and the batch that ``cloob train`` takes of few pairs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from cloob import cli
from cloob.commands.train import read_config
from cloob.recipes import get_recipe
from cloob.training.build import fit_batch
from cloob.training.config import TrainConfig
from cloob.training.config.checks import check_combination
from support import write_pairs


def next_commands(err: str) -> list[list[str]]:
    """The words of the commands that were offered, without ``cloob``."""
    found = [line.partition(":")[2] for line in err.splitlines() if line.startswith(("next:", "  or:"))]
    words = [shlex.split(line) for line in found]
    assert all(line[0] == "cloob" and line[1] in cli.COMMANDS for line in words)
    return [line[1:] for line in words]


def check_train(command: list[str]) -> TrainConfig:
    """A ``cloob train`` command as the command line reads it."""
    assert command[0] == "train"
    config = read_config(command[1:])
    check_combination(config)
    return config


TINY = ["train", "--model", "tiny-vit", "--image-size", "32", "--workers", "0", "--device", "cpu"]


def colours(folder: Path, n: int) -> None:
    write_pairs(folder, {f"{i}": ((6 * i, 255 - 6 * i, 90), f"colour number {i}") for i in range(n)})


def test_data_leads_to_training_and_training_to_looking(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch suits the number of pairs, and the run, which says so once, finds the same one when it goes on."""
    monkeypatch.chdir(tmp_path)
    colours(tmp_path / "my pairs", 40)
    assert cli.main(["data", "my pairs"]) == 0
    (command,) = next_commands(capsys.readouterr().err)
    assert command == ["train", "align", "--data", "my pairs"]
    assert check_train(command).pairs.val_split == 0.1
    tiny = [*TINY, "--out", "run", "--data"]
    words = [*tiny, "my pairs", "--epochs", "2", "--val-split", "0.1", "--patience", "9"]
    assert cli.main(words) == 0
    err = capsys.readouterr().err
    assert "4 of 40 pairs are held out" in caplog.text
    assert "36 pairs: batch size 8, 8 steps, warm-up 0" in caplog.messages
    assert "better:" not in err
    assert next_commands(err) == [
        ["eval", "run", "--held-out"],
        ["index", "my pairs", "--model", "run", "--out", "pictures.idx"],
    ]
    assert json.loads(Path("run/config.json").read_text())["run"]["batch_size"] == 8
    assert cli.main([*words, "--resume", "auto", "--epochs", "3"]) == 0
    assert "run: 12 steps" in capsys.readouterr().out and "instead of 8" not in caplog.text


def test_a_batch_that_was_asked_for_is_taken_or_impossible(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    colours(tmp_path / "mine", 20)
    words = [*TINY, "--data", "mine", "--epochs", "1"]
    assert cli.main([*words, "--batch-size", "20", "--warmup", "9"]) == 0
    assert next_commands(capsys.readouterr().err)[0][0] == "index"  # no pairs are held out
    assert "batch size" not in caplog.text and "warm-up" not in caplog.text
    assert cli.main([*words, "--batch-size", "32", "--out", "other"]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error == "cloob: mine holds 20 pairs, fewer than one batch of 32; give --batch-size 20 or less"


@pytest.mark.parametrize(
    ("pairs", "batch"), [(1, 2), (2, 2), (6, 6), (50, 8), (128, 8), (500, 16), (1313, 64), (4096, 256), (10**7, 256)]
)
def test_a_batch_of_its_own_makes_many_steps(pairs: int, batch: int) -> None:
    assert fit_batch(get_recipe("align"), pairs).run.batch_size == batch
    assert fit_batch(get_recipe("cc3m"), pairs) == get_recipe("cc3m")


@pytest.mark.parametrize(
    ("words", "held_out"),
    [
        ("align", (("demo:val",), 0.0)),
        ("align --data demo", (("demo:val",), 0.0)),
        ("align --data=demo:train", (("demo:val",), 0.0)),
        ("align --data pairs.csv", ((), 0.1)),
        ("--data demo pairs.csv align --epochs 3", ((), 0.1)),
        ("align --data demo --data=pairs.csv", ((), 0.1)),
        ("align --data pairs.csv --data demo", (("demo:val",), 0.0)),
        ("align --data pairs.csv --val-data demo:val", (("demo:val",), 0.0)),
        ("align --data pairs.csv --val-split 0.3", ((), 0.3)),
        ("align --data s3://bucket/{0..9}.tar --patience 0", ((), 0.0)),
        ("finetune --init a --data pairs.csv", ((), 0.0)),
    ],
)
def test_the_demos_held_out_pairs_judge_no_others(words: str, held_out: tuple[tuple[str, ...], float]) -> None:
    pairs = check_train(["train", *words.split()]).pairs
    assert (pairs.val_data, pairs.val_split) == held_out

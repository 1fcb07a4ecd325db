"""What commands say at their end, and what ``cloob train`` says of few pairs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cloob import cli
from cloob.commands import advice
from cloob.commands.arguments import parse
from cloob.commands.steps import say_next, shell
from cloob.commands.train import read_start
from cloob.recipes import get_recipe
from cloob.train.config import TrainConfig
from cloob.train.config.checks import check_combination
from support import write_pairs


def next_commands(err: str) -> list[list[str]]:
    """The words of the commands that were offered, without ``cloob``."""
    found = [line.partition(":")[2] for line in err.splitlines() if line.startswith(("next:", "  or:"))]
    words = [shlex.split(line) for line in found]
    assert all(line[0] == "cloob" and line[1] in cli.COMMANDS for line in words)
    return [line[1:] for line in words]


def test_words_are_quoted_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["eval", Path("my runs/it's $HOME"), "--out", "a;b"]
    say_next(odd, ["models"])
    assert next_commands(capsys.readouterr().err) == [[str(word) for word in odd], ["models"]]


@pytest.mark.parametrize("words", [["models", "--contains", "tiny"], ["recipes"]])
def test_lists_end_with_a_command_that_parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    (command,) = next_commands(capsys.readouterr().err)
    check_train(command)


def check_train(command: list[str]) -> TrainConfig:
    """A ``cloob train`` command as the command line reads it."""
    assert command[0] == "train"
    start, rest = read_start(command[1:])
    config = parse(TrainConfig, rest, "cloob train", start)
    check_combination(config)
    return config


def test_data_leads_to_training_and_training_to_looking(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "my pairs", {f"{n}": ((6 * n, 255 - 6 * n, 90), f"colour number {n}") for n in range(40)})
    assert cli.main(["data", "my pairs"]) == 0
    (command,) = next_commands(capsys.readouterr().err)
    config = check_train(command)
    assert config.pairs.data == ("my pairs",) and config.pairs.val_split == 0.1 and config.run.batch_size == 8
    assert config.align.text_encoder is not None and not config.pairs.val_data
    words = "train --model tiny-vit --epochs 1 --batch-size 32 --workers 0 --device cpu --out run --val-split 0.1"
    assert cli.main([*words.split(), "--data", "my pairs"]) == 0
    err = capsys.readouterr().err
    assert "4 of 40 pairs are held out" in caplog.text
    assert "36 pairs: tiny-vit, cloob, batches of 32, 1 steps" in err and "heads on two frozen encoders" in err
    analyze, index = next_commands(err)
    assert analyze[:4] == ["analyze", "run", "--pairs", "my pairs"]
    assert index == ["index", "my pairs", "--model", "run:best", "--out", "run/index"]
    (better,) = [shlex.split(line.partition(":")[2])[1:] for line in err.splitlines() if "better:" in line]
    advised = check_train(better)
    assert advised.run.batch_size == 8 and advised.pairs.val_split == 0.1 and str(advised.save.out) == "run-advised"
    assert advised.optim.warmup == 8  # a tenth of 20 epochs of 4 steps, in place of the recipe's 100


def test_json_output_is_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "demo:val", "--most", "4", "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize(("pairs", "batch"), [(2, 8), (50, 8), (128, 8), (500, 16), (611, 32), (5000, 256)])
def test_a_good_batch_makes_many_steps(pairs: int, batch: int) -> None:
    assert advice.good_batch(pairs) == batch


def test_advice_is_about_what_is_wrong_alone() -> None:
    good = get_recipe("align").override(data=["mine"], val_data=["held"], batch_size=64, warmup=20)
    assert advice.lines(good, 1000, 300, 20) == []
    assert advice.lines(good.override(val_data=[]), 5001, 300, 20) == []
    cases = {
        "without held-out pairs": (good.override(val_data=[]), 1000, 300, 20),
        "the held-out pairs are demo:val, which are not like yours": (
            good.override(val_data=["demo:val"]),
            1000,
            300,
            20,
        ),
        "100 steps of warm-up leave little of 300 steps": (good.override(warmup=100), 1000, 300, 100),
        "a batch of 512 makes 1 steps of an epoch": (good.override(batch_size=512), 1000, 20, 2),
    }
    for reason, case in cases.items():
        said = advice.lines(*case)
        assert [line for line in said if line.startswith("  - ")] == [line for line in said if reason in line]
        check_train(shlex.split(said[-1].partition(":")[2])[1:])


def test_one_way_to_hold_out_takes_the_place_of_the_recipes_other() -> None:
    start, rest = read_start(["align", "--val-split", "0.1"])
    assert parse(TrainConfig, rest, "cloob train", start).pairs.val_data == ()
    config = TrainConfig().override(data=["a"], val_split=0.2)
    assert shell(["train"]) == "cloob train"
    start, rest = read_start(["align", "--val-split", "0.1", "--val-data", "x"])
    assert start.pairs.val_data == ("demo:val",) and config.pairs.holds_out


def test_pairs_too_few_for_a_batch_get_advice_before_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a beginner sees first: a folder of a few pictures, and all defaults."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "mine", {f"{n}": ((6 * n, 90, 90), f"colour number {n}") for n in range(20)})
    words = ["train", "--data", "mine", "--model", "tiny-vit", "--workers", "0", "--device", "cpu"]
    assert cli.main(words) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert error == "cloob: mine holds 20 pairs, fewer than one batch of 256: a batch size of 20 or less is right"
    assert "  - a batch of 256 is more than there are" in said
    config = check_train(shlex.split(said[-1].partition("better:")[2])[1:])
    assert config.align.text_encoder is not None and config.run.batch_size == 8 and config.pairs.val_split == 0.1
    assert not (tmp_path / "runs").exists()

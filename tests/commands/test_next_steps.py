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


@pytest.mark.parametrize(("usable", "batch"), [(3, None), (4, 2), (8, 6), (20, 8)])
def test_data_leads_to_a_batch_that_the_pairs_fill(
    usable: int, batch: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the usable pairs a part is held out, and a bad one is in no batch."""
    write_pairs(tmp_path / "mine", {f"{n}": ((6 * n, 90, 90), f"number {n}") for n in range(usable)})
    (tmp_path / "mine" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "mine" / "bad.txt").write_text("a caption", encoding="utf-8")
    assert cli.main(["data", str(tmp_path / "mine")]) == 0
    commands = next_commands(capsys.readouterr().err)
    assert [check_train(command).run.batch_size for command in commands] == ([batch] if batch else [])


@pytest.mark.parametrize(("rows", "begins"), [(50_000, ["train", "align", "--data"]), (50_001, ["train", "--data"])])
def test_data_leads_to_heads_as_far_as_they_were_studied(
    rows: int, begins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "mine", {"a": ((9, 90, 90), "one")})
    (tmp_path / "many.csv").write_text("filepath\ttitle\n" + f"{tmp_path}/mine/a.png\tone\n" * rows)
    assert cli.main(["data", str(tmp_path / "many.csv"), "--most", "4"]) == 0
    (command,) = next_commands(capsys.readouterr().err)
    check_train(command)
    assert command[: len(begins)] == begins


def test_json_output_is_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "demo:val", "--most", "4", "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")


def advised(words: str, pairs: int, steps: int, warmup: int) -> tuple[list[str], TrainConfig, TrainConfig | None]:
    """The reasons of the advice for a command, its configuration, and the advised one."""
    typed = words.split()
    config = check_train(["train", *typed])
    said = advice.lines(config, pairs, steps, warmup, typed)
    reasons = [line for line in said if line.startswith("  - ")]
    better = [check_train(shlex.split(line.partition(":")[2])[1:]) for line in said if "better:" in line]
    return reasons, config, better[0] if better else None


def test_advice_is_about_what_is_wrong_alone() -> None:
    good = "align --data mine --batch-size 64 --warmup 20"
    assert advised(f"{good} --val-data held", 1000, 300, 20)[0] == []
    assert advised(f"{good} --val-data demo:val", 5001, 300, 20)[0] == []
    cases = {
        "the held-out pairs are demo:val, which are not like yours": (f"{good} --val-data demo:val", 1000, 300, 20),
        "100 steps of warm-up leave little of 300 steps": (
            "align --data mine --batch-size 64 --val-data held --warmup 100",
            1000,
            300,
            100,
        ),
        "a batch of 512 makes 1 steps of an epoch": (
            "align --data mine --batch-size 512 --val-data held --warmup 2",
            1000,
            20,
            2,
        ),
    }
    for reason, case in cases.items():
        reasons, _, better = advised(*case)
        assert better is not None and len(reasons) == 1 and reason in reasons[0]
    reasons, _, better = advised("--init tiny --data mine --batch-size 64", 1000, 300, 20)
    assert better is not None and len(reasons) == 1 and "without held-out pairs" in reasons[0]


TUNED = "--lr 3e-5 --clip-grad-norm 0.5 --beta2 0.9 --layer-decay 0.5 --inv-tau 100 --objective clip --data a b"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (f"lit --init r/a {TUNED} --batch-size 512 --val-data c", {"batch_size": 32}),
        (f"finetune --init r/a {TUNED}", {"val_split": 0.1, "batch_size": 16}),
        (f"{TUNED} --batch-size=256 finetune --init r/a --out r/b", {"val_split": 0.1, "batch_size": 16}),
        (f"--init r/a {TUNED} --val_split 0.2 --epochs 2 --warmup 50", {"batch_size": 32, "warmup": 3}),
        (f"--val-data demo:val lit --init r/a {TUNED}", {"val_data": (), "val_split": 0.1, "batch_size": 16}),
        (
            "--init r/a --data a --batch-size 32 --retrieval-from 0.5",
            {"val_split": 0.1, "best": "val_recall"},
        ),
        (
            "align --image-encoder pypi:x --text-encoder pypi:y --data mine --head linear --patience 9",
            {"batch_size": 32, "warmup": 32},
        ),
    ],
)
def test_advice_keeps_what_it_is_not_about(words: str, changes: dict[str, object]) -> None:
    _, config, better = advised(words, 530, 0, 0)
    assert better == config.override(**changes, out=f"{config.save.out}-advised")


def test_one_way_to_hold_out_takes_the_place_of_the_recipes_other() -> None:
    start, rest = read_start(["align", "--val-split", "0.1"])
    assert parse(TrainConfig, rest, "cloob train", start).pairs.val_data == ()
    config = TrainConfig().override(data=["a"], val_split=0.2)
    assert shell(["train"]) == "cloob train"
    start, rest = read_start(["align", "--val-split", "0.1", "--val-data", "x"])
    assert start.pairs.val_data == ("demo:val",) and config.pairs.holds_out


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


def test_pairs_too_few_for_a_batch_get_advice_before_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a beginner sees first: a folder of a few pictures, and all defaults."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "mine", {f"{n}": ((6 * n, 90, 90), f"colour number {n}") for n in range(20)})
    words = ["train", "--data", "mine", "--model", "tiny-vit", "--workers", "0", "--device", "cpu"]
    assert cli.main(words) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert error == "cloob: mine holds 20 pairs, fewer than one batch of 256; give --batch-size 20 or less"
    assert "  - a batch of 256 is more than there are" in said
    config = check_train(shlex.split(said[-1].partition("better:")[2])[1:])
    assert config.align.text_encoder is not None and config.run.batch_size == 8 and config.pairs.val_split == 0.1
    assert not (tmp_path / "runs").exists()

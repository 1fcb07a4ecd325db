"""``cloob train`` and ``cloob recipes``: wrong values in one line, and what a run says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloob import cli
from cloob.commands.arguments import parse
from cloob.commands.train import read_start
from cloob.recipes import RECIPES, get_recipe
from cloob.training.config import TrainConfig
from support import write_pairs


def test_the_config_of_a_run_that_overwrote_another_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    config = TrainConfig().override(data=["demo"], out=tmp_path, overwrite=True, model="tiny-vit", device="cpu")
    (tmp_path / "config.json").write_text(config.to_json())
    assert cli.main(["train", "--config", str(tmp_path / "config.json")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "checkpoints").is_dir()


@pytest.mark.parametrize(
    "words",
    [
        "finetune --epochs 3 --data a b --flip",
        "--epochs 3 finetune --data a b --flip",
        "--epochs 3 --data a b --flip finetune",
        "--epochs=3 --flip --data a b finetune",
        "--flip --data a b --epochs 3 --no-tensorboard finetune --tensorboard",
    ],
)
def test_a_recipe_is_found_anywhere_in_the_words(words: str) -> None:
    start, rest = read_start(words.split())
    config = parse(TrainConfig, rest, "cloob train", start)
    assert config == get_recipe("finetune").override(epochs=3, data=["a", "b"], flip=True)


def test_a_length_takes_the_place_of_the_recipes_own() -> None:
    for words, length in (("--steps 5", (None, None, 5)), ("--samples 640", (None, 640, None))):
        start, rest = read_start(["demo-cloob", *words.split()])
        run = parse(TrainConfig, rest, "cloob train", start).run
        assert (run.epochs, run.samples, run.steps) == length


@pytest.mark.parametrize("words", ["--objective clip", "--objective=clip", "--objective cloob --objective clip"])
def test_another_objective_does_not_begin_with_the_recipes_scales(words: str) -> None:
    start, rest = read_start(["cc3m-cloob", *words.split()])
    loss = parse(TrainConfig, rest, "cloob train", start).loss
    assert loss == TrainConfig().override(objective="clip").loss and loss.overrides() == {}
    start, rest = read_start(["cc3m-cloob", "--inv-tau", "20", *words.split()])
    assert parse(TrainConfig, rest, "cloob train", start).loss.overrides() == {"inv_tau": 20.0}
    start, rest = read_start(["cc3m-cloob", "--objective", "cloob"])
    assert parse(TrainConfig, rest, "cloob train", start).loss == get_recipe("cc3m-cloob").loss


def test_a_config_of_a_run_begins_another_run(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(TrainConfig().override(data=["a"], resume="auto", accept_changed_data=True).to_json())
    asked = TrainConfig().override(data=["a"])
    assert read_start(["--config", str(file)])[0] == asked.override(resume="auto")  # of one's own
    (tmp_path / "checkpoints").mkdir()
    assert read_start(["--config", str(file)])[0] == asked


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_a_run_says_where_the_best_and_the_average_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloob.models.folder import save_model
    from cloob.models.towers import create_model
    from cloob.objective import make_objective

    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "start", create_model("tiny-vit", seed=0), make_objective("clip").config())
    write_pairs(tmp_path / "pairs", {f"{n}": ((60 * n, 255 - 60 * n, 90), f"colour number {n}") for n in range(4)})
    words = "train finetune --init start --data pairs --val-data pairs --epochs 1 --batch-size 4 --workers 0"
    assert cli.main([*words.split(), "--device", "cpu", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "run:best: val_loss " in out and "run/averaged: averaged with start" in out

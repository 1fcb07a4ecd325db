"""``cloob train`` and ``cloob recipes``: wrong values in one line, and what a run says at its end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloob import cli
from cloob.commands.train import read_config
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
        "finetune --epochs 3 --data a b --mask-duplicates",
        "--epochs 3 finetune --data a b --mask-duplicates",
        "--epochs 3 --data a b --mask-duplicates finetune",
        "--epochs=3 --mask-duplicates --data a b finetune",
        "--data a b --epochs 3 --no-mask-duplicates finetune --mask-duplicates",
    ],
)
def test_a_recipe_is_found_anywhere_in_the_words(words: str) -> None:
    config = get_recipe("finetune").override(epochs=3, data=["a", "b"], mask_duplicates=True)
    assert read_config(words.split()) == config


def test_a_length_takes_the_place_of_the_recipes_own() -> None:
    run = read_config(["demo", "--steps", "5"]).run
    assert (run.epochs, run.samples, run.steps) == (None, None, 5)


@pytest.mark.parametrize("words", ["--objective clip", "--objective=clip", "--objective cloob --objective clip"])
def test_a_recipe_has_settings_for_each_objective(words: str) -> None:
    for recipe, tau in (("demo", 14.0), ("cc3m", 1 / 0.07), ("align", None)):
        loss = read_config([recipe, *words.split()]).loss
        assert (loss.objective, loss.inv_tau, loss.beta) == ("clip", tau, None)
    assert read_config(["cc3m", "--inv-tau", "20", *words.split()]).loss.inv_tau == 20.0
    assert read_config(["cc3m", "--objective", "cloob"]) == get_recipe("cc3m")


def test_a_file_stands_over_the_recipe_and_options_over_both(tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    file.write_text("[optim]\nbeta2 = 0.5\nlr = 1.0\n[run]\nsteps = 7\n")
    config = read_config(["--config", str(file), "cc3m", "--lr", "0.25"])
    assert config == get_recipe("cc3m").override(beta2=0.5, lr=0.25, steps=7)


def test_the_help_shows_at_most_45_options_the_usual_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_config(["--help"])
    shown = re.findall(r"^\W*(?:-h, )?(--[a-z-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert shown[shown.index("--help") :][1:4] == ["--data", "--val-data", "--val-split"]
    assert len({*shown, "--config"}) <= 45


def test_a_config_of_a_run_begins_another_run(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(TrainConfig().override(data=["a"], resume="auto", accept_changed_data=True).to_json())
    asked = TrainConfig().override(data=["a"])
    assert read_config(["--config", str(file)]) == asked.override(resume="auto")  # of one's own
    (tmp_path / "checkpoints").mkdir()
    assert read_config(["--config", str(file)]) == asked


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

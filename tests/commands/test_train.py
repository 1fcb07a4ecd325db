"""``cloob train``: the configuration that words describe, and
what a run says at its end.
"""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cloob import cli, get_recipe
from cloob.commands import train
from cloob.heads.config import HeadsConfig, check_config
from cloob.recipes import RECIPES
from cloob.training.config import TrainConfig
from cloob.training.preflight import check_combination
from make import write_pairs
from support import read_json, run_cloob

TINY = "train --model tiny-vit --image-size 32 --workers 0 --device cpu"


def config_of(words):
    config = train.read(shlex.split(words))
    is_of_heads = isinstance(config, HeadsConfig)
    (check_config if is_of_heads else check_combination)(config)
    return config


def next_commands(err):
    """The commands that were offered, without ``cloob``."""
    lines = [
        line.partition(": cloob ")[2]
        for line in err.splitlines()
        if line.startswith(("next:", "  or:"))
    ]
    assert all(line.split()[0] in cli.COMMANDS for line in lines)
    return lines


def test_recipes_and_towers_are_listed(capsys):
    run_cloob("train --list")
    recipes, _, towers = capsys.readouterr().out.partition("\n\ntowers (--model):\n")
    lines = recipes.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert {"tiny-vit", "RN50"} <= set(towers.split())


def test_options_change_a_recipe():
    changed = get_recipe("finetune").override(
        epochs=3, data=["a", "b"], mask_duplicates=True
    )
    words = "finetune --epochs 3 --data a b --mask-duplicates"
    assert train.read(words.split()) == changed
    run = config_of("demo-scratch --steps 5")
    assert run.epochs is None
    assert run.steps == 5


def test_the_slurm_script_starts_a_run_that_there_is():
    script = (Path(__file__).parents[2] / "examples" / "slurm.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (words,) = re.findall(r"-m cloob train ([^&]+)", script.replace("\\\n", ""))
    config = config_of(words)
    assert config.resume == "auto"
    assert config.save_every > 0


@pytest.mark.parametrize(
    "words",
    ["--objective clip", "--objective=clip", "--objective cloob --objective clip"],
)
def test_a_recipe_has_settings_for_each_objective(words):
    for recipe, tau in (("demo", 14.0), ("align", None)):
        heads = train.read([recipe, *words.split()])
        assert heads.objective == "clip"
        assert heads.inv_tau == tau
        assert heads.beta is None
    loss = train.read(["cc3m", *words.split()])
    assert loss.objective == "clip"
    assert loss.inv_tau == 1 / 0.07
    assert loss.beta is None
    assert train.read(["cc3m", "--inv-tau", "20", *words.split()]).inv_tau == 20.0
    assert train.read(["cc3m", "--objective", "cloob"]) == get_recipe("cc3m")


def test_a_file_stands_over_the_recipe_and_options_over_both(tmp_path):
    file = tmp_path / "more.toml"
    file.write_text("beta2 = 0.5\nlr = 1.0\nsteps = 7\n")
    config = train.read(["cc3m", "--config", str(file), "--lr", "0.25"])
    assert config == get_recipe("cc3m").override(beta2=0.5, lr=0.25, steps=7)


def test_the_help_shows_at_most_45_options_the_usual_first(capsys):
    with pytest.raises(SystemExit):
        train.read(["--help"])
    shown = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert shown[:3] == ["--data", "--val-data", "--val-split"]
    assert len(shown) == len(set(shown)) <= 45


HELD_OUT = [
    ("align", (("demo:val",), 0.0)),
    ("align --data=demo:train", (("demo:val",), 0.0)),
    ("align --data pairs.csv", ((), 0.1)),
    ("align --data demo --data=pairs.csv", ((), 0.1)),
    ("align --data pairs.csv --data demo", (("demo:val",), 0.0)),
    ("align --data pairs.csv --val-data demo:val", (("demo:val",), 0.0)),
    ("align --data pairs.csv --val-split 0.3", ((), 0.3)),
    (
        "align --data s3://bucket/{0..9}.tar --patience 0 --objective cloob",
        ((), 0.0),
    ),
]


@pytest.mark.parametrize(
    ("words", "held_out"),
    HELD_OUT,
)
def test_the_demos_held_out_pairs_judge_no_others(words, held_out):
    config = config_of(words)
    assert (config.held_out_sources, config.held_out_share) == held_out
    config = get_recipe("align").override(data=["pairs.csv"])  # and by Python
    assert config.held_out_sources == ()
    assert config.held_out_share == 0.1


def test_a_config_of_a_run_begins_another_run(tmp_path, capsys):
    file = tmp_path / "config.json"
    config = TrainConfig().override(
        data=["demo"], resume="auto", out=tmp_path, model="tiny-vit", device="cpu"
    )
    file.write_text(config.override(overwrite=True).to_json())
    assert train.read(["--config", str(file)]) == config  # of one's own
    (tmp_path / "checkpoints").mkdir()
    assert train.read([f"--config={file}"]) == config.override(resume="none")
    file.write_text(config.override(resume="none", overwrite=True).to_json())
    run_cloob(f"train --config {file}", code=2)
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "checkpoints").is_dir()


def test_data_leads_to_training_and_training_to_looking(
    tmp_path, capsys, caplog, monkeypatch
):
    """The batch suits the number of pairs, and the run, which says so once, finds the
    same one when it goes on.
    """
    monkeypatch.chdir(tmp_path)
    write_pairs(
        Path("my pairs"),
        {f"{i}": ((6 * i, 255 - 6 * i, 90), f"colour number {i}") for i in range(40)},
    )
    run_cloob("data 'my pairs'")
    (command,) = next_commands(capsys.readouterr().err)
    assert command == "train align --data 'my pairs'"
    assert config_of(command.removeprefix("train ")).held_out_share == 0.1
    words = f"{TINY} --out run --data 'my pairs' --val-split 0.1 --patience 9"
    run_cloob(f"{words} --epochs 2")
    out, err = capsys.readouterr()
    assert "4 of 40 pairs are held out" in caplog.text
    assert "run:best: val_loss " in out
    assert "36 pairs: batch size 8, 8 steps, warm-up 0" in caplog.messages
    index = "index 'my pairs' --model run --out pictures.idx"
    assert next_commands(err) == [
        "eval run --held-out",
        index,
        "search pictures.idx 'a red bird'",
    ]
    assert read_json(Path("run/config.json"))["batch_size"] == 8
    run_cloob(f"{words} --resume auto --epochs 3")
    assert "run: 12 steps" in capsys.readouterr().out
    assert "instead of 8" not in caplog.text


def test_what_is_offered_after_heads_of_vectors_runs_as_it_is_printed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cause = np.random.default_rng(0).normal(size=(60, 3))
    np.save("my a.npy", cause @ np.ones((3, 5)))
    np.save("b.npy", cause**3)
    words = "train vectors --a 'my a.npy' --b b.npy --objective cca"
    run_cloob(f"{words} --out run")
    offered = next_commands(capsys.readouterr().err)
    assert [line.split()[0] for line in offered] == ["eval", "embed"]
    for line in offered:
        run_cloob(line)
    words = "data --a 'my a.npy' --b b.npy --suspects"
    run_cloob(words)
    (line,) = next_commands(capsys.readouterr().err)
    run_cloob(f"{line} --out clean")


def test_heads_whose_patience_was_used_up_say_what_goes_on(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cause = np.random.default_rng(0).normal(size=(60, 3))
    np.save("a.npy", cause @ np.ones((3, 5)))
    np.save("b.npy", cause**3)
    words = "train vectors --a a.npy --b b.npy --device cpu"
    words += " --objective clip --patience 2 --out run"
    run_cloob(words)
    run, stopped, *_ = capsys.readouterr().out.splitlines()
    said = re.match(r"run: (\d+ steps), (\d+) epochs, \d+ pairs, \d+ s$", run)
    assert said is not None
    steps, epochs = said.groups()
    assert stopped == f"stopped at epoch {epochs}: no better for 2 epochs"
    run_cloob(f"{words} --resume auto")
    assert capsys.readouterr().out == (
        f"run: already finished ({epochs} epochs, {steps}); the patience was used up,"
        " --patience 0 goes on\n"
    )

"""What a command writes into a folder of somebody else leaves all that was there."""

from pathlib import Path

import numpy as np
import pytest

from cloob import cli
from make import COLOURS, tiny_model, write_classes, write_forty
from support import run_cloob

STRANGERS = [
    "thesis.txt",
    "index/notes.txt",
    "pictures/me.txt",
    "data.sqlite",
    ".hidden/x",
    "checkpoints/mine",
    "state/mine",
    "averaged/mine",
]


def listing():
    """The bytes of all files here, by path."""
    files = (path for path in Path().rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Inputs, and a folder ``out`` with files of somebody else."""
    monkeypatch.chdir(tmp_path)
    tiny_model(Path("model"), "tiny-convnext")
    write_classes(Path("sets/two"), COLOURS, 2)
    rng = np.random.default_rng(0)
    write_forty(Path("pairs"))
    np.save("a.npy", rng.normal(size=(60, 5)).astype(np.float32))
    np.save("b.npy", rng.normal(size=(60, 4)).astype(np.float32))
    for name in STRANGERS:
        path = Path("out", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"years of work: {name}")


EVALUATE = "eval model --zeroshot sets/two --device cpu --out out"
TRAIN = (
    "train vectors --a a.npy --b b.npy --objective clip --epochs 1 --embed-dim 4"
    " --device cpu --out out"
)
TOWERS = (
    "train --data pairs --model tiny-vit --epochs 1 --batch-size 8 --workers 0"
    " --device cpu --out out"
)


RUNS = [
    [EVALUATE, EVALUATE],
    [TRAIN, f"{TRAIN} --overwrite"],
    [f"{TOWERS} --overwrite", f"{TOWERS} --overwrite"],
    [
        TRAIN,
        "embed out --a a.npy --out out/rows.npy --device cpu",
        "match out --a a.npy --b b.npy --out out/hits.csv --device cpu",
        "match out --a a.npy --b b.npy --out out/hits.csv --overwrite --device cpu",
    ],
    ["data sets/two/red --out out/page.html"],
    ["index sets --model model --out out --device cpu"],
    ["export model --to cloob --out out"],
    ["export model --to cloob --out out --overwrite"],
    ["demo --out out"],
]


@pytest.mark.parametrize(
    "commands",
    RUNS,
    ids=lambda commands: commands[-1][:24].strip(),
)
def test_files_of_others_stay(here, commands):
    before = listing()
    for command in commands:
        cli.main(command.split())
    after = listing()
    lost = [name for name in before if after.get(name) != before[name]]
    assert not lost
    outside = [name for name in after.keys() - before if not name.startswith("out/")]
    assert not outside


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", [TRAIN, TOWERS], ids=["heads", "towers"])
@pytest.mark.parametrize(
    "name",
    ["state/thesis.pt", "checkpoints/step-00000003/thesis", "config.json"],
)
def test_what_only_bears_the_name_of_a_run_s_file_is_not_overwritten(
    name, command, capsys
):
    path = Path("other", name)
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    words = command.replace("--out out", "--out other --overwrite")
    run_cloob(words, code=2)
    assert "but no run" in capsys.readouterr().err
    assert path.read_text() == "years of work"

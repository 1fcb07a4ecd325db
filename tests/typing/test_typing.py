"""What a strict type checker sees of ``cloob`` from a program of somebody else's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cloob

PROJECT = Path(__file__).with_name("project")
PACKAGE = Path(cloob.__file__).parent
CACHE = Path(__file__).parents[2] / ".mypy_cache" / "outside"


def test_the_project_uses_each_public_name() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PROJECT.glob("*.py"))
    assert not [name for name in cloob.__all__ if not re.search(rf"\b{name}\b", text)]


@pytest.mark.nightly
def test_the_project_passes_and_its_mistakes_are_seen() -> None:
    """Its ``assert_type`` hold, and each ``type: ignore`` has an error behind it; `make lint` looks at that as well."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(CACHE), "."]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""README's numbers and the record they come from cannot drift apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_readme_shows_the_recorded_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.demo_table import KEPT, MARKED, ROOT, render

    found = MARKED.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    table = render(json.loads(KEPT.read_text(encoding="utf-8")))
    assert found[0] == found[1] + table + found[2]
    assert table.count("\n") > 10

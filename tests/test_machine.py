"""What this machine has for a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloob import machine


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None)])
def test_a_containers_quota_bounds_the_processors(
    quota: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "_CPU_QUOTA", tmp_path / "cpu.max")
    assert machine.processors() == 8
    (tmp_path / "cpu.max").write_text(quota)
    assert machine.processors() == (expected or 8)

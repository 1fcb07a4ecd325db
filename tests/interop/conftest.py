"""Environments for what does not fit beside our own packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.fixture
def overlaid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], str]:
    """The Python of an environment with these packages of PyPI in front of ours."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.overlay import overlay

    def python(packages: Sequence[str]) -> str:
        try:
            return overlay(tuple(packages))
        except RuntimeError as error:
            pytest.skip(f"they cannot be installed here: {error}")

    return python

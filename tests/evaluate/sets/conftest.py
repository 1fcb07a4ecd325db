"""Tiny pictures and archives made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import noise, write_archive


@pytest.fixture(scope="session")
def image() -> Callable[..., bytes]:
    """``image(i)``: see ``support.noise``."""
    return noise


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """``write_tar(path, {name: bytes})``: see ``support.write_archive``."""
    return write_archive

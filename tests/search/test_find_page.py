"""What docs/find.md writes is what runs here, with a model that knows colours."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import support
from cloob.cli import main
from search_colours import ColourModel, write_pictures

PAGE = Path(__file__).parents[2] / "docs" / "find.md"


def blocks(kind: str) -> list[str]:
    if not PAGE.is_file():  # the tests of an installed package have no documentation beside them
        pytest.skip("docs/find.md is not beside the tests")
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_commands_and_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cloob.models.load.load_model", "cloob.models.fingerprint.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: ColourModel())
    for variable in ("CLOOB_CACHE", "CLOOB_CACHE_BYTES"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    write_pictures(Path("pictures"), n=3)
    Path("runs/mine").mkdir(parents=True)  # loading it gives the model that knows colours
    shutil.copy("pictures/red-0.png", "pictures/red.png")
    Path("photo.jpg").write_bytes(support.picture("red", kind="JPEG"))
    Path("labels.txt").write_text("red\nblue\n")
    for name in ("red", "blue"):
        Path("examples", name).mkdir(parents=True)
        for path in Path("pictures").glob(f"{name}-*.png"):
            shutil.copy(path, Path("examples", name, path.name))
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if "models/mine-onnx" not in line]  # an export needs real towers
    assert len(commands) > 15 and all(words[0] == "cloob" for words in commands)
    for words in commands:
        assert main(words[1:]) == 0, (words, capsys.readouterr().err)
    assert len(opened) == 1
    Path(opened[0].removeprefix("file://")).unlink()
    assert Path("vectors.npz").is_file() and Path("vectors.parquet").is_file()
    before = sorted(Path("pictures").iterdir())
    assert main(["classify", "pictures", "--labels", "red,blue", "--model", "runs/mine", "--move-to", "sorted"]) == 0
    assert not list(Path("pictures").glob("*.png"))
    capsys.readouterr()
    for code in blocks("python"):
        exec(compile(code, "docs/find.md", "exec"), {})
    assert "red" in capsys.readouterr().out and sorted(Path("pictures").iterdir()) == before

"""docs/weights.md: its commands of exports and pushes run; its Python runs in ``test_export_transformers.py``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cloob import cli
from cloob.export.transformers import export_transformers
from cloob.models.towers import create_model

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not beside the tests")


def out() -> str:
    return PAGE.read_text(encoding="utf-8").partition("\n## Out: ")[2]


def test_the_commands_of_the_page_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "finetune").symlink_to(small)
    blocks = re.findall(r"```console\n(.*?)```", out(), re.DOTALL)
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for code in blocks for line in code.splitlines()]
    ours = [words[1:] for words in lines if words[1] == "push" or "transformers" in words]
    assert len(ours) >= 2
    for words in ours:
        assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "models" / "mine-hf" / "config.json").is_file()


def test_the_refusal_of_the_page_is_the_refusal(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    cloob: (.*)$", out(), re.MULTILINE)
    with pytest.raises(ValueError, match=re.escape(line)):
        export_transformers(create_model("tiny-resnet", seed=0), tmp_path)

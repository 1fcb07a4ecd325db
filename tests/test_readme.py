"""README: its snippets run, its commands are commands, its figures are those of the pages that it links to."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import support
from cloob.cli import main
from search_colours import ColourModel, write_pictures

ROOT = Path(__file__).parents[1]
# Commands that take a network, minutes, or until Ctrl-C: their words are read, and what they do is tested elsewhere.
ONLY_READ = ("train", "serve", "convert", "export", "eval")


class PathModel(ColourModel):
    """Takes paths too, as loaded models do."""

    def encode_image(self, images: Tensor | Sequence[str]) -> Tensor:
        if isinstance(images, Tensor):
            return super().encode_image(images)
        return super().encode_image(torch.stack([self.preprocess(Image.open(path)) for path in images]))


@pytest.fixture
def readme() -> str:
    if not (ROOT / "README.md").is_file():  # the tests of an installed package have no README beside them
        pytest.skip("README.md is not beside the tests")
    return (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each command, without comments."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


@pytest.fixture
def beginner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with what README's commands name, a model that knows colours, and the commands that were only read."""
    monkeypatch.chdir(tmp_path)
    read: list[str] = []
    for command in ONLY_READ:
        module = {"eval": "evaluate"}.get(command, command)
        monkeypatch.setattr(
            f"cloob.commands.work.{module}.run", lambda *_, _name=command, **__: read.append(_name) or 0
        )
    # Only now: what is imported while it is replaced keeps the replacement.
    for name in ("cloob.models.load.load_model", "cloob.models.fingerprint.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: PathModel())
    for variable in ("CLOOB_CACHE", "CLOOB_CACHE_BYTES"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    write_pictures(Path("photos"), n=2)
    Path("cat.jpg").write_bytes(support.picture("red", kind="JPEG"))
    for table in ("pairs.csv", "val.csv"):
        Path(table).write_text("filepath,title\ncat.jpg,a red cat\n")
    Path("runs/mine").mkdir(parents=True)
    return read


def test_it_fits_on_a_screen(readme: str) -> None:
    assert len(readme.splitlines()) <= 90


def test_the_commands_are_commands(readme: str, beginner: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`?\$? ?make ([a-z-]+)", readme)) <= targets
    found = [words for words in commands(readme) if words[0] == "cloob"]
    for words in found:
        assert main(words[1:]) == 0, (words, capsys.readouterr().err)
    assert {words[1] for words in found} == {"index", "search", "classify", *ONLY_READ}
    assert set(beginner) == set(ONLY_READ)
    (demo,) = (words for words in commands(readme) if words[0] == ".venv/bin/cloob")
    assert demo[1:] == ["serve", "runs/demo/index"]


@pytest.mark.usefixtures("beginner")
def test_the_snippets_run(readme: str) -> None:
    names: dict[str, Any] = {}
    for block in blocks(readme, "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].isfinite() and len(blocks(readme, "python")) == 2


def figures(item: str, folder: Path) -> int:
    """How many figures with an interval a piece of text has; each must stand on a page that it links."""
    links = re.findall(r"\]\(([^)#]+\.md)\)", item)
    pages = "\n".join((folder / page).read_text(encoding="utf-8") for page in links)
    pages = re.sub(r"−(?=\d)", "-", re.sub(r"\s+", " ", pages))
    found = re.findall(r"([+-]\d+\.\d) \(([+-]\d+\.\d) … ([+-]\d+\.\d)\)", item)
    for mean, low, high in found:
        figure, interval = re.escape(mean), f"{re.escape(low)} … {re.escape(high)}"
        in_a_row = rf"\| {figure} \| (?:[^|]+ \| )?{interval} \|"  # of a table, with one interval or two
        assert re.search(rf"{figure} \({interval}[);]|{in_a_row}", pages), (mean, low, high)
    return len(found)


def test_each_figure_stands_on_the_page_that_is_linked(readme: str) -> None:
    """In the item of the list that names it, with its interval."""
    section = readme.partition("## What CLOOB is good for")[2].partition("\n![")[0]
    assert sum(figures(" ".join(item.split()), ROOT) for item in section.split("\n- ")[1:]) == 15


def test_each_figure_of_the_advice_stands_on_the_page_that_is_linked() -> None:
    text = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    section = text.partition("## What was found")[2]
    assert sum(figures(" ".join(item.split()), ROOT / "docs") for item in section.split("\n- ")[1:]) == 43

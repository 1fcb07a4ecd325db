"""docs/weights.md: its snippets run, on small files in the place of the public ones in the cache."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import own_files
import pytest
import torch

from cloob import cli, load_model
from cloob.models.weights import registry

PAGE = Path(__file__).parents[3] / "docs" / "weights.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not beside the tests")


def snippets(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    text = text.partition("\n## Out: ")[0]  # tests/export has the rest
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def public_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files with CLIP's vocabulary under the names of the public ones; and the cache that they are in."""
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "cache" / "weights"
    name = "crowsonkb/vit-b-16-laion400m-32"
    config = own_files.CROWSONKB | {"text_encoder": own_files.CROWSONKB["text_encoder"] | {"vocab_size": 49408}}
    model = registry.PublicModel("a test", registry.MODELS[name].files, config=config)
    monkeypatch.setitem(registry.MODELS, name, model)
    folder = weights / name.replace("/", "--")
    folder.mkdir(parents=True)
    arrays = own_files.crowsonkb_arrays(vocabulary=49408)
    own_files.write_crowsonkb(folder, arrays).rename(folder / model.files[0].name)
    name = "ml-jku/rn50-yfcc"
    folder = weights / name.replace("/", "--")
    folder.mkdir(parents=True)
    towers = own_files.open_clip_towers(text_cfg=own_files.CLIP["text_cfg"] | {"vocab_size": 49408})
    torch.save({"state_dict": own_files.mljku_state(towers)}, folder / registry.MODELS[name].files[0].name)
    return weights


def test_the_python_of_the_page_runs(public_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = snippets("python")
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    rows = names["rows"]
    assert isinstance(rows, torch.Tensor) and rows.shape == (1, 16)
    assert capsys.readouterr().out.split() == ["towers", "16", "30.0", "15.0"]


def test_the_commands_of_the_page_run(
    public_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    lines = [shlex.split(line.removeprefix("$ ")) for code in snippets("console") for line in code.splitlines()]
    assert lines
    for words in lines:
        assert words[0] == "cloob"
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
    converted = load_model(tmp_path / lines[0][-1])
    assert converted.config.kind == "open_clip" and converted.make_objective().name == "cloob"


def test_the_table_of_loading_is_what_the_record_says() -> None:
    record = json.loads((PAGE.parents[1] / "benchmarks/results/weights/results.json").read_text())
    page = PAGE.read_text(encoding="utf-8")
    for result in record["families"].values():
        for who in ("cloob", "other"):
            cell = f"{result[who]['seconds']:.2f} s, {result[who]['peak_over_weights']:.2f} ×"
            assert cell in page, cell


def test_no_public_name_is_missing_from_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in registry.MODELS if f"`{name}`" not in page] == []

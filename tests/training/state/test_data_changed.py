"""A run that goes on with other pairs than those it was trained on: refused in one line."""

from __future__ import annotations

import shutil
import signal
import tarfile
from pathlib import Path

import pytest
from train_helpers import At

from cloob.cli import main
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from make import write_tar


def test_edited_pairs_are_refused_on_resumption(
    base: TrainConfig, pairs_as: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first shard again, with a longer caption."""
    data, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(pairs_as["shards"], data)
    config = base.override(data=[str(data)], out=run, epochs=1, save_every=0)
    assert train(config, callbacks=[At(3, lambda: signal.raise_signal(signal.SIGTERM))]).steps == 3
    with tarfile.open(data / "00000.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    write_tar(data / "00000.tar", files | {"00.txt": b"a very red disc"})
    changed = "other members"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["train", "--config", str(run / "config.json"), "--resume", "auto"]
    capfd.readouterr()
    assert main(command) == 2
    *_, said = capfd.readouterr().err.splitlines()
    newest = run / "checkpoints" / "step-00000003"
    assert said == (
        f"cloob: {newest}: the training pairs are not those of this checkpoint's run ({changed}); "
        f"start from its weights with --init {newest}"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

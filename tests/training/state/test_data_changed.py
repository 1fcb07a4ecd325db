"""A run that goes on with other pairs than those it was trained on: refused in one line."""

from __future__ import annotations

import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from test_train_loop import At

from cloob.cli import main
from cloob.data.open import open_source
from cloob.training.config import TrainConfig
from cloob.training.loop import train


def copy_of(spec: str, folder: Path) -> str:
    """A data set of its own, to be edited."""
    target = folder / Path(spec).name
    shutil.copytree(spec, target) if Path(spec).is_dir() else shutil.copy(spec, target)
    return str(target)


def edit_shards(spec: str) -> None:
    """The first shard again, with a longer caption."""
    shard = Path(spec) / "00000.tar"
    with tarfile.open(shard) as tar:
        tar.extractall(Path(spec) / "members", filter="data")
        names = tar.getnames()
    (Path(spec) / "members" / "00.txt").write_text("a very red disc")
    with tarfile.open(shard, "w") as tar:
        for name in names:
            tar.add(Path(spec) / "members" / name, name)
    shutil.rmtree(Path(spec) / "members")


def shorten_table(spec: str) -> None:
    Path(spec).write_text("\n".join(Path(spec).read_text().splitlines()[:-3]) + "\n")


def replace_picture(spec: str) -> None:
    Image.new("RGB", (50, 50), (1, 2, 3)).save(Path(spec) / "00.png")


EDITS: dict[str, tuple[str, Callable[[str], None], str]] = {
    "table with fewer rows": ("table", shorten_table, "40 rows before, 37 now; other image paths; other captions"),
    "picture in a folder": ("folder", replace_picture, "other sizes of pictures"),
    "shards": ("shards", edit_shards, "other members"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.nightly] * (kind != "shards")) for kind in EDITS]
)
def test_edited_pairs_are_refused_on_resumption(
    base: TrainConfig, pairs_as: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    form, edit, changed = EDITS[kind]
    data, run = copy_of(pairs_as[form], tmp_path), tmp_path / "run"
    config = base.override(data=[data], out=run, epochs=1, save_every=0)
    assert train(config, callbacks=[At(3, lambda: signal.raise_signal(signal.SIGTERM))]).steps == 3
    edit(data)
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


@pytest.mark.parametrize("form", ["table", "folder", "shards"])
def test_a_copy_elsewhere_has_the_same_fingerprint(pairs_as: dict[str, str], tmp_path: Path, form: str) -> None:
    copied = open_source(copy_of(pairs_as[form], tmp_path)).fingerprint()
    assert copied == open_source(pairs_as[form]).fingerprint()
    assert len(set(copied.values())) == len(copied) >= 3

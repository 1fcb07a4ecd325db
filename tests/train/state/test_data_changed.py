"""A run that goes on with other pairs than those it was trained on: said, and refused unless that is accepted."""

from __future__ import annotations

import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from test_train_loop import At
from train_helpers import lines

from cloob.cli import main
from cloob.data.fingerprint import Fingerprint, differences, of_column, spread
from cloob.data.mix import mix
from cloob.data.open import open_source
from cloob.models.runs import list_checkpoints
from cloob.train.config import TrainConfig
from cloob.train.loop import train


def copy_of(spec: str, folder: Path) -> str:
    """A data set of its own, to be edited."""
    target = folder / Path(spec).name
    shutil.copytree(spec, target) if Path(spec).is_dir() else shutil.copy(spec, target)
    return str(target)


def edit_table(spec: str) -> None:
    text = Path(spec).read_text()
    assert "a red disc" in text
    Path(spec).write_text(text.replace("a red disc", "a red dish"))


def edit_folder(spec: str) -> None:
    (Path(spec) / "00.txt").write_text("a red dish")


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
    "table": ("table", edit_table, "other captions"),
    "table with fewer rows": ("table", shorten_table, "40 rows before, 37 now; other image paths; other captions"),
    "folder": ("folder", edit_folder, "other captions"),
    "picture in a folder": ("folder", replace_picture, "other sizes of pictures"),
    "shards": ("shards", edit_shards, "other members"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_edited_pairs_are_refused_on_resumption_unless_accepted(
    base: TrainConfig, pairs_as: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    form, edit, changed = EDITS[kind]
    data, run = copy_of(pairs_as[form], tmp_path), tmp_path / "run"
    config = base.override(data=[data], out=run, epochs=1)
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
        "--accept-changed-data goes on with these"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    assert main([*command, "--accept-changed-data"]) == 0
    assert len(lines(run / "metrics.jsonl")) > 3 and len(list_checkpoints(run)) > 1
    # From here on these are the run's pairs; what the next change does is asked again.
    more = ["train", "--config", str(run / "config.json"), "--resume", "auto", "--epochs", "2"]
    assert main(more) == 0, capfd.readouterr().err


def test_held_out_pairs_count_where_both_runs_have_some(
    base: TrainConfig, pairs_as: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held_out, run = copy_of(pairs_as["table"], tmp_path), tmp_path / "run"
    config = base.override(val_data=[held_out], out=run, epochs=1)
    train(config)
    edit_table(held_out)
    command = ["train", "--config", str(run / "config.json"), "--resume", "auto", "--epochs", "2"]
    assert main(command) == 2
    assert "the held-out pairs are not those of this checkpoint's run (other captions)" in capfd.readouterr().err
    assert train(config.override(val_data=[], best="val_loss", resume="auto", epochs=2)).epochs == 2


@pytest.mark.parametrize("form", ["table", "folder", "shards"])
def test_a_copy_elsewhere_has_the_same_fingerprint(pairs_as: dict[str, str], tmp_path: Path, form: str) -> None:
    copied = open_source(copy_of(pairs_as[form], tmp_path)).fingerprint()
    assert copied == open_source(pairs_as[form]).fingerprint()
    assert len(set(copied.values())) == len(copied) >= 3


def test_a_column_counts_by_its_content_however_it_is_cut() -> None:
    texts = ["a", "", None, "bcd", "e"]
    together = of_column(pa.chunked_array([pa.array(texts)]))
    parts = [pa.array(["x", *texts[:2]])[1:], pa.array([], pa.large_binary()).cast(pa.string()), pa.array(texts[2:])]
    assert of_column(pa.chunked_array(parts)) == together
    for other in (
        ["a", None, "", "bcd", "e"],
        ["a", "", None, "bc", "de"],
        ["a", "", None, "bcd"],
        ["e", *texts[1:4], "a"],
    ):
        assert of_column(pa.chunked_array([pa.array(other)])) != together


def test_of_a_large_folder_files_evenly_spread_are_looked_into() -> None:
    assert spread(5, 10) == [0, 1, 2, 3, 4]
    some = spread(1_000_003, 1000)
    assert len(set(some)) == 1000 and (some[0], some[-1]) == (0, 1_000_002)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_pictures_in_tables_and_several_sources(
    pairs_folder: Path, pairs_as: dict[str, str], tmp_path: Path, suffix: str
) -> None:
    """Another caption of the same length shows; in a mix it is said whose it is."""

    def write(caption: str) -> str:
        picture = {"bytes": (pairs_folder / "00.png").read_bytes(), "path": None}
        table = pa.table({"image": [picture] * 4, "text": ["a", "b", "c", caption]})
        path = tmp_path / f"pairs{suffix}"
        if suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        return str(path)

    def fingerprint(caption: str) -> Fingerprint:
        own = open_source(write(caption), image_column="image", caption_column="text")
        return mix([open_source(pairs_as["table"]), own]).fingerprint()

    before = fingerprint("d")
    assert fingerprint("d") == before
    assert differences(before, fingerprint("e")) == ["other captions of source 2"]

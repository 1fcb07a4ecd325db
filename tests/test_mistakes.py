"""The table in ``mistakes.txt``: exit code 2, one line, nothing left behind; public
names, and what importing costs.
"""

import ast
import contextlib
import doctest
import inspect
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import cloob
from cloob import ContrastiveHeads, cli
from make import tiny_model, write_classes, write_pairs, write_tar
from search_colours import make_index, write_pictures
from support import OPENING, made_once, read_json, run_script


def rows_of(part):
    """A list for each line of a command: the command, and what its answer says."""
    lines = [line for line in part.splitlines() if line.startswith("cloob ")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


TABLE = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8")
BEFORE_TORCH, LATER = map(rows_of, TABLE.split("## Refused once"))
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
FILES = read_json(Path(__file__).with_name("mistakes_files.json"))
FILES["old/index.sqlite"] = "nothing" * 999
CHILD = """
import contextlib, io, json, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        assert name != "torch", "torch is imported"
sys.meta_path.insert(0, Guard())
from cloob.cli import main
found = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main(words)
        except Exception as error:
            code = repr(error)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def make(folder):
    """What the mistakes name: pairs, tables, sets, a model, an index; whole ones and
    broken ones.
    """
    for name in (
        "sets/one/test",
        "sets/one/train",
        "sets/two",
        "sets/names",
        "sets/templates",
    ):
        write_classes(folder / name, COLOURS, 2)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "utf16.csv").write_text(FILES["own.csv"], encoding="utf-16")
    parquet.write_table(
        pa.table({"filepath": ["a.png"], "text": ["x"]}), folder / "table.parquet"
    )
    for name in ("empty", "folder.csv"):
        (folder / name).mkdir()
    write_tar(folder / "shards" / "3.tar", {})
    write_pairs(
        folder / "pairs", {stem: (COLOURS["red"], f"pair {stem}") for stem in "abcd"}
    )
    tiny_model(folder / "model", "tiny-convnext")
    shutil.copytree(
        folder / "model",
        folder / "weightless",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    rows = np.random.default_rng(0).normal(size=(6, 6))
    np.save(folder / "rows.npy", rows)
    np.save(folder / "wide.npy", np.ones((6, 9)))
    ContrastiveHeads("clip", n_components=4, epochs=1, validation_fraction=0).fit(
        rows, rows
    ).save(folder / "heads")
    make_index(folder / "index", write_pictures(folder / "pictures", n=1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return made_once(tmp_path_factory, "mistakes", make)


def listing(place):
    """The files of the folder, but for what SQLite keeps beside an index that is
    read.
    """
    files = (path for path in place.rglob("*") if path.is_file())
    return sorted(path for path in files if not path.name.startswith("index.sqlite-"))


def faults(rows, told):
    """The rows that were not answered by exit code 2 and one line that holds all their
    words.
    """
    found = []
    for (command, *words), (code, out, err) in zip(rows, told, strict=True):
        line = err.removeprefix(OPENING)
        is_one = line.startswith("cloob: ") and line.count("\n") == 1
        missing = [word for word in words if word not in line]
        if (code, out) != (2, "") or not is_one or len(line) >= 600 or missing:
            found.append(f"{command}\n  exit {code}, {missing} not in: {out}{line}")
    return found


def test_words_are_refused_before_torch_is_imported(place, monkeypatch):
    before = listing(place)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    helps = [[name, "--help"] for name in cli.COMMANDS]
    words = [shlex.split(command)[1:] for command, *_ in BEFORE_TORCH]
    works = ["search", "index", "--like", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([*words, *helps, works]),
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    wrong = faults(BEFORE_TORCH, told[: len(words)])
    assert not wrong, "\n".join(wrong)
    assert told.pop()[0] == 0, "a search without words needs no torch"
    for (name, _), (code, out, _) in zip(helps, told[len(words) :], strict=True):
        assert code == 0
        assert f"usage: cloob {name}" in out
    assert listing(place) == before


def test_files_are_refused_and_nothing_is_left_behind(place, monkeypatch):
    monkeypatch.chdir(place)
    before = listing(place)
    told = []
    for command, *_ in LATER:
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            code = cli.main(shlex.split(command)[1:])
        told.append((code, out.getvalue(), err.getvalue()))
    wrong = faults(LATER, told)
    assert not wrong, "\n".join(wrong)
    assert listing(place) == before


# What ``cloob`` shows of itself


NAMES = [name for name in cloob.__all__ if not name.startswith("__")]


def modules_after(statement):
    """The modules that a fresh Python has imported after a statement."""
    done = run_script(f"{statement}; import sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_dir_shows_the_public_names():
    assert dir(cloob) == sorted(cloob.__all__)
    for name in cloob.__all__:
        assert getattr(cloob, name) is not None


def test_the_program_that_mypy_checks_uses_each_public_name():
    used = set()
    for path in Path(__file__).with_name("typing").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "cloob":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                used.add(ast.unparse(node).removeprefix("cloob."))
    assert set(cloob.__all__) <= used


def test_importing_costs_nothing():
    heavy = "torch numpy open_clip pydantic rich PIL pyarrow dataclasses"
    assert not modules_after("import cloob") & {*heavy.split()}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "functional"])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = inspect.unwrap(getattr(cloob, name))
    (example,) = doctest.DocTestFinder(recurse=False).find(shown, name, globs={})
    assert example.examples, f"{name} has no example"
    output = []
    failed = doctest.DocTestRunner(verbose=False).run(example, out=output.append).failed
    assert not failed, "".join(output)

"""What ``cloob`` shows of itself: its public names, their examples, and how little importing it costs."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import cloob
from support import run_script

NAMES = [name for name in cloob.__all__ if not name.startswith("__")]


def modules_after(statement):
    """The modules that a fresh Python has imported after a statement."""
    done = run_script(f"{statement}; import sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_dir_shows_the_public_names():
    wanted = {"ContrastiveObjective", "make_objective", "load_model", "create_model", "TrainConfig", "train"}
    assert wanted | {"cached_backward", "get_recipe", "evaluate", "open_source", "functional"} <= set(dir(cloob))
    assert dir(cloob) == sorted(cloob.__all__)
    for name in cloob.__all__:
        assert getattr(cloob, name) is not None


def test_the_program_that_mypy_checks_uses_each_public_name():
    program = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).with_name("typing").rglob("*.py"))
    assert not [name for name in cloob.__all__ if not re.search(rf"cloob\.{name}\b|cloob import .*\b{name}\b", program)]


def test_importing_costs_nothing():
    heavy = {"torch", "numpy", "open_clip", "tyro", "rich", "PIL", "pyarrow", "dataclasses"}
    assert not modules_after("import cloob") & heavy


def test_the_objective_needs_torch_alone():
    names = "ContrastiveObjective, cached_backward, make_objective, functional"
    statement = f"from cloob import {names}; functional.cloob_reference"
    others = {"open_clip", "timm", "torchvision", "tyro", "rich", "PIL", "pyarrow", "fsspec", "sklearn", "matplotlib"}
    assert not modules_after(statement) & {*others, "torch._dynamo"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "functional"])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = inspect.unwrap(getattr(cloob, name))
    (example,) = doctest.DocTestFinder(recurse=False).find(shown, name, globs={})
    assert example.examples, f"{name} has no example"
    output = []
    failed = doctest.DocTestRunner(verbose=False).run(example, out=output.append).failed
    assert not failed, "".join(output)

"""The pages: links lead somewhere, commands are understood, and the Python runs.

That the site builds without a warning, and each page is in its contents, is checked by
``make docs``.
"""

import argparse
import contextlib
import io
import json
import math
import os
import pydoc
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cloob
from cloob import cli
from pages import (
    DOCS,
    README,
    ROOT,
    SHOWN,
    as_words,
    blocks,
    commands,
    pages_of,
    run_page,
    snippets,
    write_reader_folder,
    write_runs,
)
from support import overlaid

API = (DOCS / "api.md").read_text(encoding="utf-8") if DOCS.is_dir() else ""
PAGES = (
    set((DOCS / "modules.txt").read_text(encoding="utf-8").split())
    if DOCS.is_dir()
    else set()
)
pytestmark = pytest.mark.skipif(
    not DOCS.is_dir(), reason="an installed package has no documentation beside it"
)


# The reference of the command line

REFERENCE = """# The command line

What every command says with `--help`. A test compares;
`pytest tests/test_docs.py -k reference --update-golden` writes this page.
"""


def test_the_reference_is_what_the_commands_say_of_themselves(
    monkeypatch, capsys, pytestconfig
):
    monkeypatch.setenv("COLUMNS", "88")
    page = [REFERENCE]
    for name in ("", *cli.COMMANDS, "train align", "train vectors"):
        assert cli.main([*name.split(), "--help"]) == 0
        said = capsys.readouterr().out.rstrip()
        page.append(f"## {' '.join(['cloob', name]).strip()}\n\n```text\n{said}\n```\n")
    written = "\n".join(page)
    path = DOCS / "commands.md"
    if pytestconfig.getoption("update_golden"):
        path.write_text(written, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == written


# Pages


def test_each_public_name_is_in_the_api():
    shown = dict(
        re.findall(r"^\| \{py:\w+\}`(\w+) <([\w.]+)>`", API, flags=re.MULTILINE)
    )
    assert sorted(shown) == sorted(
        name for name in cloob.__all__ if not name.startswith("__")
    )
    assert [
        name for name, at in shown.items() if not PAGES & {at, at.rpartition(".")[0]}
    ] == []  # else a dead link
    assert all(pydoc.locate(at) is getattr(cloob, name) for name, at in shown.items())


def test_the_walk_of_a_step_names_its_files_which_are_few_and_short():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    walk = re.findall(r"^\d\. `(training/\w+\.py)`: (.*)$", text, flags=re.MULTILINE)
    sources = [
        (ROOT / "src" / "cloob" / file).read_text(encoding="utf-8") for file, _ in walk
    ]
    for (file, sentence), source in zip(walk, sources, strict=True):
        names = re.findall(r"`(\w+)`", sentence)
        assert names and all(
            re.search(rf"(def|class) {name}\b|\b{name}\(", source) for name in names
        ), file
    assert len(walk) == 5 and sum(source.count("\n") for source in sources) <= 1_350


def test_pages_that_the_source_names_have_these_titles():
    titles = {
        page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for page in SHOWN
    }
    files = [
        path for kind in ("py", "toml") for path in (ROOT / "src").rglob(f"*.{kind}")
    ]
    named = set(
        re.findall(
            r"\bpage\s“([^”]*)”",
            "\n".join(path.read_text(encoding="utf-8") for path in files),
        )
    )
    assert {" ".join(title.split()) for title in named} <= titles
    assert not [
        path
        for path in files
        if re.search(r"\bdocs/[\w-]+\.md", path.read_text(encoding="utf-8"))
    ]


def located(name):
    """Whether there is an object of this full name; one whose module needs a package
    that is not here counts.
    """
    try:
        return pydoc.locate(name) is not None
    except pydoc.ErrorDuringImport:
        return True


def test_modules_of_the_api_and_targets_of_docstrings_are_there():
    """Also of names that are no public ones of ``cloob`` but stand on pages."""
    shown = "\n".join(block for page in SHOWN for block in blocks(page, "python", "py"))
    imported = set(
        re.findall(r"^(?:from|import) (cloob\.[\w.]+)", shown, flags=re.MULTILINE)
    )
    assert (
        imported
        | {
            "cloob.evaluation.analysis",
            "cloob.evaluation.sets.pictures",
            "cloob.interop.negatives",
        }
        <= PAGES
    )
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")
    )
    targets = set(
        re.findall(r":(?:func|class|mod|meth|attr|data):`~?(cloob\.[\w.]+)`", sources)
    )
    assert [name for name in sorted(PAGES | targets) if not located(name)] == []


def test_links_lead_to_files():
    lost = []
    for page in SHOWN:
        text = re.sub(
            r"^```.*?^```",
            "",
            page.read_text(encoding="utf-8"),
            flags=re.MULTILINE | re.DOTALL,
        )
        here = [
            to
            for to in re.findall(r"\]\(([^)\s]+?)(?:#[^)]*)?\)", text)
            if not re.match(r"https?:|mailto:|#", to)
        ]
        lost += [
            f"{page.name}: {target}"
            for target in here
            if not (page.parent / target).exists()
        ]
    assert not lost


# Commands


class Understood(BaseException):
    """Ends a command once its words are parsed."""


@pytest.mark.parametrize(
    "page", [page for page in SHOWN if commands(page)], ids=lambda page: page.name
)
def test_commands_are_understood(page, tmp_path, monkeypatch):
    parse = argparse.ArgumentParser.parse_known_intermixed_args
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    (tmp_path / "more.toml").write_text(
        "\n".join(blocks(page, "toml")), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)

    def only_parse(parser, words):
        assert not parse(parser, words)[1]
        raise Understood

    name = "parse_known_intermixed_args"
    monkeypatch.setattr(argparse.ArgumentParser, name, only_parse)
    for words in commands(page):
        with (
            contextlib.redirect_stderr(io.StringIO()) as err,
            pytest.raises(Understood),
        ):
            assert cli.main(words) == 0, (words, err.getvalue())


def test_make_has_the_targets_that_are_named():
    targets = set(
        re.findall(
            r"^(\w[\w-]*):",
            (ROOT / "Makefile").read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
    )
    for page in [*SHOWN, ROOT / "CONTRIBUTING.md"]:
        assert (
            set(re.findall(r"[`$] ?make ([a-z-]+)", page.read_text(encoding="utf-8")))
            <= targets
        ), page


# What runs

EXAMPLES = [README, DOCS / "vectors.md", *pages_of("How to")]
# Run by a test of their own, with what is to be seen of them.
SEEN = {"README", "own-loop", "soft-targets", "audit", "scikit-learn", "wrong-pairs"}
SEEN |= {"parts", "weights"}
QUICK = {"find", "classify"}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what the pages name."""
    monkeypatch.chdir(tmp_path)
    write_reader_folder(monkeypatch)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_what_runs_elsewhere_names_the_page():
    for page in EXAMPLES:
        for _, _, note in snippets(page):
            if note.startswith("run by "):
                test = (ROOT / note.removeprefix("run by ")).read_text(encoding="utf-8")
                assert page.name in test, (page, note)


@pytest.mark.usefixtures("reader")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.stem in QUICK else pytest.mark.nightly)
        for page in EXAMPLES
        if page.stem not in SEEN
    ],
    ids=lambda page: page.stem,
)
def test_what_a_page_shows_runs(page):
    if page.stem == "evaluate":
        write_runs()
    run_page(page)


def as_pattern(line):
    """A line of output, with any number for a number and anything for ``…``."""
    pattern = re.sub(r"\d+(\\\.\d+)?", r"-?\\d+(?:[.,]\\d+)*", re.escape(line))
    return pattern.replace("…", ".*")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_readme_prints_what_it_shows(tmp_path, monkeypatch, capfd):
    """In an empty folder, as a reader would; ``…`` stands for what is left out."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names, printed = {}, ""
    for kind, text, note in snippets(README):
        if note:
            continue
        if kind == "text":
            lines = text.splitlines()
            assert re.search(".*".join(map(as_pattern, lines)), printed, re.DOTALL)
        elif kind == "python":
            exec(compile(text, "README.md", "exec"), names)
            printed = capfd.readouterr().out
        else:
            for shown in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, *lines = shown.splitlines()
                assert cli.main(as_words(command)[1:]) == 0, command
                printed = "".join(capfd.readouterr())
                wanted = ".*".join(map(as_pattern, lines))
                assert re.search(wanted, printed, re.DOTALL), (wanted, printed)


def readme_table():
    """The objectives of README's first table, with their lines."""
    shown = re.search(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)[1]
    return {line.split()[0]: line for line in shown.splitlines()}


def first_figure(line):
    return float(re.search(r"([\d.]+)%", line)[1])


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "objectives",
    [["cca"], pytest.param(list(readme_table()), marks=pytest.mark.nightly)],
)
def test_the_first_table_of_the_readme(objectives, capsys):
    [code] = [block for block in blocks(README, "python") if "cca" in block]
    chosen = re.sub(r"in \(.*\):", f"in {objectives}:", code)
    exec(compile(chosen, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    for objective, line in zip(objectives, lines, strict=True):
        wanted = first_figure(readme_table()[objective])
        assert first_figure(line) == pytest.approx(wanted, abs=1.5), line


@pytest.mark.usefixtures("reader")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute"
)
def test_own_loop_runs_and_its_losses_agree():
    names = run_page(DOCS / "own-loop.md")
    expected = names["objective"](*names["features"])
    torch.testing.assert_close(names["program"].module()(*names["features"]), expected)
    torch.testing.assert_close(names["loss"], expected)


def test_the_page_of_soft_targets_runs_and_its_losses_are_the_formulas():
    names = run_page(DOCS / "soft-targets.md")
    x, y = (F.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    ids = torch.tensor([0, 1, 0, 2, 1])
    loss = 0.0
    for i in range(5):
        mass = {
            same: [
                math.exp(4.0 * float(x[i] @ y[j]))
                for j in range(5)
                if (ids[j] == ids[i]) == same
            ]
            for same in (0, 1)
        }
        loss -= math.log(sum(mass[1]) / len(mass[1]) / sum(mass[0])) / 5
    assert names["with_positives"](x, y, ids, 4.0).item() == pytest.approx(
        loss, abs=1e-5
    )
    check_losses_of_others(names)


def check_losses_of_others(names):
    """CWCL, S2L and weights of equal targets, pair by pair from their formulas."""
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(7, 3).double(), dim=1) for _ in range(2))
    frozen = 0.3 * torch.randn(7, 4).double()
    target, n = torch.tensor([0, 1, 0, 2, 1, 0, 3]), 7
    s = [[5 * float(x[i] @ y[j]) for j in range(n)] for i in range(n)]

    def cross_entropy(row, j):
        return math.log(sum(math.exp(value) for value in row)) - row[j]

    columns = [list(column) for column in zip(*s, strict=True)]
    hard = [(cross_entropy(s[i], i), cross_entropy(columns[i], i)) for i in range(n)]
    cwcl = s2l = same = 0.0
    for i in range(n):
        w = [float(F.cosine_similarity(frozen[i], f, dim=0)) / 2 + 0.5 for f in frozen]
        cwcl += sum(w[j] * cross_entropy(s[i], j) for j in range(n)) / sum(w) / n
        cwcl += hard[i][1] / n
        equal = sum(int(target[i] == t) for t in target) - 1
        same += (1 + equal / (n - 1)) * sum(hard[i]) / 2 / n
        for j in range(n):
            squared = float((frozen[i] - frozen[j]).square().sum())
            w_ij = 1 - math.atan(squared / 0.3) * 4 / math.pi
            w_ij = w_ij if w_ij >= 0.75 else 0.0
            s2l += w_ij * math.log1p(math.exp(-s[i][j] + 2)) / n
            s2l += (1.7 - 0.75 * w_ij) * math.log1p(math.exp(s[i][j] - 2)) / n
    assert float(names["cwcl"](frozen, x, y, 5.0)) == pytest.approx(cwcl, abs=1e-6)
    found = float(names["s2l"](frozen, x, y, 5.0, -2.0))
    assert found == pytest.approx(s2l, abs=1e-6)
    found = float(names["same_target"](x, y, target, 5.0))
    assert found == pytest.approx(same, abs=1e-6)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_loops_of_other_trainers_run(tmp_path, monkeypatch):
    """Lightning's, transformers' and accelerate's, on the towers of the page's first
    block.
    """
    pytest.importorskip("accelerate")
    code = "\n".join(
        [
            blocks(DOCS / "own-loop.md", "python")[0],
            *blocks(DOCS / "several-gpus.md", "python"),
            "assert lightning and Trainer and accelerator",
        ]
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    words = [overlaid("lightning"), "-c", code]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_page_of_the_audit_prints_what_it_says_and_knows_all_faults(capsys):
    page = DOCS / "audit.md"
    run_page(page)
    printed = re.sub(r" to \de-\d+", "", capsys.readouterr().out)
    (shown,) = blocks(page, "text")
    assert printed == re.sub(r" to \de-\d+", "", shown)
    explained = re.findall(r"\*\*([^*]+)\*\*", page.read_text(encoding="utf-8"))
    listed = re.search(r"are kinds:(.*)Raises:", cloob.audit.__doc__, re.DOTALL)[1]
    kinds = {" ".join(kind.split()) for kind in re.findall(r"``([^`]+)``", listed)}
    assert len(kinds) == 16
    assert kinds - set(explained) == {"not what was expected"}


def test_python_of_dcl_runs_and_lightlys_loss_is_as_it_says():
    names = run_page(DOCS / "dcl.md")
    x, y = (names[side].detach() for side in "xy")
    expected = 0.0
    for a, b in ((x, y), (y, x)):
        for i in range(8):
            others = [
                math.exp(10 * float(a[i] @ side[j]))
                for side in (a, b)
                for j in range(8)
                if j != i
            ]
            expected += (math.log(sum(others)) - 10 * float(a[i] @ b[i])) / 16
    assert float(names["lightly_dcl"](x, y, 0.1)) == pytest.approx(expected, abs=1e-5)
    dcl, infoloob = (
        cloob.get_recipe("vectors", objective=name) for name in ("dcl", "infoloob")
    )
    assert dcl == infoloob == infoloob.override(objective="dcl")


@pytest.mark.usefixtures("reader")
def test_python_of_weights_runs(capsys):
    run_page(DOCS / "weights.md")
    assert " 30.0 8.0\n" in capsys.readouterr().out


@pytest.mark.usefixtures("reader")
def test_wrong_pairs_are_found_and_heads_are_fitted_and_searched(capsys):
    pytest.importorskip("sklearn")
    run_page(DOCS / "wrong-pairs.md")
    printed = capsys.readouterr().out.splitlines()[-1]
    assert {0, 2} < set(json.loads(printed))
    a, b = (np.load(f"{name}.npy")[:40] for name in "ab")
    names = {
        "cells": a,
        "molecules": b,
        "keys": [*range(20)] * 2,
        "plates": [*range(10)] * 4,
        "names": [f"leaf {row % 20} of plant {row % 7}" for row in range(40)],
    }
    fitted, piped, own = blocks(DOCS / "scikit-learn.md", "python")
    exec(fitted, names)
    search = names["search"]
    exec(own, names)
    exec(piped, names)
    assert search.best_params_["objective"] in ("clip", "infoloob", "cloob")
    requests = search.best_estimator_.get_metadata_routing().fit.requests
    assert requests["groups"] is True


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "objective"),
    [("ddp.py", "cloob"), ("ddp.py", "clip"), ("fsdp.py", "clip")],
)
def test_two_ranks_print_what_one_does(name, objective, tmp_path):
    """The scripts that several-gpus.md shows."""

    def losses(ranks):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        how = {
            "cwd": tmp_path,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"},
            "timeout": 240,
        }
        command += [str(ROOT / "examples" / name), objective]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, **how
        )
        return [
            float(number)
            for number in re.findall(
                r"^step \d: loss (\S+)$", done.stdout, re.MULTILINE
            )
        ]

    one, two = losses(1), losses(2)
    assert len(one) == 3 and len(set(one)) == 3
    # The third loss is after two updates: with another gradient it would be another
    # one.
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", sorted((DOCS / "tutorials").glob("*.md")), ids=lambda page: page.name
)
def test_tutorials_print_what_they_show(page, tmp_path, pytestconfig):
    """Numbers within 5, as another processor trains another model.

    ``make tutorials`` writes the outputs anew.
    """
    (tmp_path / "tutorial.py").write_text(
        "\nprint('\\f', end='')\n".join(blocks(page, "python")), encoding="utf-8"
    )
    words, environment = (
        [sys.executable, "tutorial.py"],
        {**os.environ, "MPLBACKEND": "agg"},
    )
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    printed = [output for output in done.stdout.split("\f") if output]
    if pytestconfig.getoption("update_golden"):
        outputs, text = iter(printed), page.read_text(encoding="utf-8")
        text = re.sub(
            r"(?ms)^```text\n.*?^```", lambda _: f"```text\n{next(outputs)}```", text
        )
        page.write_text(text, encoding="utf-8")
        for drawn in tmp_path.glob("*.webp"):
            shutil.copy(drawn, DOCS / "images" / f"{page.stem}.webp")
        return
    number, shown = r"\d+(?:\.\d+)?", blocks(page, "text")
    assert [re.sub(number, "N", output) for output in printed] == [
        re.sub(number, "N", output) for output in shown
    ]
    numbers = [
        [float(found) for found in re.findall(number, "".join(outputs))]
        for outputs in (printed, shown)
    ]
    assert numbers[0] == pytest.approx(numbers[1], abs=5)

"""The pages: links lead somewhere, commands are understood, and the Python runs.

That the site builds without a warning, and each page is in its contents, is checked by
``make docs``.
"""

import argparse
import contextlib
import io
import json
import math
import pydoc
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

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

SOURCE = ROOT / "src"
nearly = {"rtol": 0, "atol": 1e-6, "check_dtype": False}


def read(path):
    return path.read_text(encoding="utf-8")


API = read(DOCS / "api.md") if DOCS.is_dir() else ""
PAGES = set(read(DOCS / "modules.txt").split()) if DOCS.is_dir() else set()
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
    row = r"^\| \{py:\w+\}`(\w+) <([\w.]+)>`"
    shown = dict(re.findall(row, API, flags=re.MULTILINE))
    public = {name for name in cloob.__all__ if not name.startswith("__")}
    assert shown.keys() == public
    for name, at in shown.items():
        assert PAGES & {at, at.rpartition(".")[0]}, f"{name}: a dead link"
        assert pydoc.locate(at) is getattr(cloob, name)


def entered(action):
    """The files of cloob of which an action calls a function."""
    source = str(ROOT / "src" / "cloob") + "/"
    files = set()

    def note(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(source):
            files.add(path.removeprefix(source))

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return files


def test_the_walks_name_each_file_that_a_step_enters(tmp_path, monkeypatch):
    """The second step of towers, and the second epoch of heads."""
    from cloob.heads import fit
    from cloob.training.loop import Loop

    files = set()

    def watched(owner, name):
        action = getattr(owner, name)
        calls = []

        def noted(*arguments):
            calls.append(None)
            results = []
            step = lambda: results.append(action(*arguments))  # noqa: E731
            files.update(entered(step) if len(calls) == 2 else (step(), ())[1])
            return results[0]

        monkeypatch.setattr(owner, name, noted)

    watched(Loop, "_step")
    watched(fit, "fit_epoch")
    towers = cloob.get_recipe("demo-scratch").override(model="tiny-vit", steps=2)
    towers = towers.override(batch_size=8, workers=0, device="cpu", warmup=0)
    cloob.train(towers.override(out=tmp_path / "towers"))
    a = np.random.default_rng(0).normal(size=(60, 9))
    settings = cloob.HeadSettings("infoloob", epochs=2, device="cpu")
    cloob.fit_heads(a, a[:, :4], settings=settings)

    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert {"training/step.py", "heads/fit.py"} <= files
    unnamed = []
    for file in sorted(files):
        name = file if file.endswith("__init__.py") else file.rpartition("/")[2]
        if name not in text:
            unnamed.append(file)
    assert unnamed == []


def test_pages_that_the_source_names_have_these_titles():
    titles = {read(page).partition("\n")[0].removeprefix("# ") for page in SHOWN}
    for path in [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.toml")]:
        named = re.findall(r"\bpage\s“([^”]*)”", read(path))
        assert {" ".join(title.split()) for title in named} <= titles, path
        assert not re.search(r"\bdocs/[\w-]+\.md", read(path)), path


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
    imports = r"^(?:from|import) (cloob\.[\w.]+)"
    assert set(re.findall(imports, shown, flags=re.MULTILINE)) <= PAGES
    sources = "\n".join(map(read, SOURCE.rglob("*.py")))
    target = r":(?:func|class|mod|meth|attr|data):`~?(cloob\.[\w.]+)`"
    targets = set(re.findall(target, sources))
    assert [name for name in sorted(PAGES | targets) if not located(name)] == []


def test_links_lead_to_files():
    for page in SHOWN:
        text = re.sub(r"(?ms)^```.*?^```", "", read(page))
        for target in re.findall(r"\]\(([^)\s]+?)(?:#[^)]*)?\)", text):
            outside = re.match(r"https?:|mailto:|#", target)
            assert outside or (page.parent / target).exists(), (page, target)


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
    targets = set(re.findall(r"(?m)^(\w[\w-]*):", read(ROOT / "Makefile")))
    for page in [*SHOWN, ROOT / "CONTRIBUTING.md"]:
        assert set(re.findall(r"[`$] ?make ([a-z-]+)", read(page))) <= targets, page


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
    names = {}
    printed = ""
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
    assert_close(names["program"].module()(*names["features"]), expected)
    assert_close(names["loss"], expected)


def test_the_page_of_soft_targets_runs_and_its_losses_are_the_formulas():
    names = run_page(DOCS / "soft-targets.md")
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(2, 7, 3).double(), dim=2)
    frozen = 0.08 * torch.randn(7, 4).double()  # near enough to count for S2L
    target = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    same = target[:, None] == target
    scores = 5 * x @ y.T
    by_row = -scores.log_softmax(1)
    by_column = -scores.log_softmax(0)
    hard = by_row.diagonal() + by_column.diagonal()

    shares = F.cosine_similarity(frozen[:, None], frozen, dim=2) / 2 + 0.5
    soft = (shares * by_row).sum(1) / shares.sum(1)
    cwcl = soft.mean() + by_column.diagonal().mean()
    found = names["cwcl"](frozen, x, y, 5.0)
    assert_close(found, cwcl, **nearly)

    w = 1 - torch.atan(torch.cdist(frozen, frozen).square() / 0.3) * 4 / math.pi
    w = w * (w >= 0.75)
    positive = F.softplus(2 - scores)
    negative = F.softplus(scores - 2)
    s2l = (w * positive + (1.7 - 0.75 * w) * negative).sum() / 7
    found = names["s2l"](frozen, x, y, 5.0, -2.0)
    assert_close(found, s2l, **nearly)

    weighted = ((1 + (same.sum(1) - 1) / 6) * hard).mean() / 2
    found = names["same_target"](x, y, target, 5.0)
    assert_close(found, weighted, **nearly)

    mass = scores.exp()
    positives = (mass * same).sum(1) / same.sum(1)
    negatives = (mass * ~same).sum(1)
    found = names["with_positives"](x, y, target, 5.0)
    expected = -(positives / negatives).log().mean()
    assert_close(found, expected, **nearly)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_loops_of_other_trainers_run(tmp_path, monkeypatch):
    """Lightning's, transformers' and accelerate's, on the towers of the page's first
    block.
    """
    pytest.importorskip("accelerate")
    towers = blocks(DOCS / "own-loop.md", "python")[0]
    loops = blocks(DOCS / "several-gpus.md", "python")
    seen = "assert lightning and Trainer and accelerator"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    python = overlaid("lightning")
    code = "\n".join([towers, *loops, seen])
    subprocess.run([python, "-c", code], cwd=tmp_path, timeout=600, check=True)


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
    rows = torch.cat([x, y])
    own_pair = torch.eye(8, dtype=torch.bool).repeat(2, 2)
    negatives = (10 * rows @ rows.T).masked_fill(own_pair, -torch.inf)
    expected = negatives.logsumexp(1).mean() - 10 * (x * y).sum(1).mean()
    assert_close(names["lightly_dcl"](x, y, 0.1), expected, **nearly)
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
def test_two_ranks_print_what_one_does(name, objective, tmp_path, monkeypatch):
    """The scripts that several-gpus.md shows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = [str(ROOT / "examples" / name), objective]

    def losses(ranks):
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={ranks}"
        command = [sys.executable, *torchrun.split(), *script]
        printed = subprocess.check_output(command, cwd=tmp_path, text=True, timeout=240)
        found = re.findall(r"(?m)^step \d: loss (\S+)$", printed)
        return list(map(float, found))

    one = losses(1)
    assert len(set(one)) == 3
    # The third loss is after two updates: another gradient would change it.
    assert losses(2) == pytest.approx(one, rel=1e-4)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", sorted((DOCS / "tutorials").glob("*.md")), ids=lambda page: page.name
)
def test_tutorials_print_what_they_show(page, tmp_path, pytestconfig, monkeypatch):
    """Numbers within 5, as another processor trains another model.

    ``make tutorials`` writes the outputs anew.
    """
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = "\nprint('\\f', end='')\n".join(blocks(page, "python"))
    (tmp_path / "tutorial.py").write_text(code, encoding="utf-8")
    printed = subprocess.check_output(
        [sys.executable, "tutorial.py"], cwd=tmp_path, text=True
    )
    outputs = list(filter(None, printed.split("\f")))
    if pytestconfig.getoption("update_golden"):
        replaced = iter(outputs)
        text = re.sub(
            r"(?ms)^```text\n.*?^```",
            lambda _: f"```text\n{next(replaced)}```",
            read(page),
        )
        page.write_text(text, encoding="utf-8")
        for drawn in tmp_path.glob("*.webp"):
            shutil.copy(drawn, DOCS / "images" / f"{page.stem}.webp")
        return
    number = r"\d+(?:\.\d+)?"
    found = "\f".join(outputs)
    shown = "\f".join(blocks(page, "text"))
    assert re.sub(number, "N", found) == re.sub(number, "N", shown)
    numbers = [float(each) for each in re.findall(number, found)]
    assert numbers == pytest.approx(
        [float(each) for each in re.findall(number, shown)], abs=5
    )

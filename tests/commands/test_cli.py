"""The command line as a user meets it: help, one-line errors and exit codes, in real
processes where it matters.
"""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING
from unittest.mock import Mock

import pytest

import cloob
from cloob import __version__, cli
from cloob.commands import console, removed
from cloob.commands.options import fields_of, names_on, pages
from support import run_script

HEAVY = {
    "torch",
    "numpy",
    "open_clip",
    "PIL",
    "pyarrow",
    "transformers",
    "safetensors",
    "starlette",
    "sklearn",
    "pydantic",
}


KINDS = {
    name: importlib.import_module(f"cloob.commands.{name}") for name in cli.COMMANDS
}
OF_TRAINING = {
    "train": cloob.TrainConfig,
    "train align": cloob.HeadsConfig,
    "train vectors": cloob.HeadsConfig,
}
PAGES = {name: module.Options for name, module in KINDS.items() if name != "train"}
PAGES |= OF_TRAINING


@pytest.mark.parametrize("page", PAGES)
def test_help_has_every_option_in_a_group_and_three_examples(page, capsys):
    fields = fields_of(PAGES[page])
    listed = [*names_on(page), *pages()[page]["groups"].get("arguments", [])]
    if page in OF_TRAINING:  # most settings go into a file
        assert set(listed) - {"config", "list"} < set(fields)
    else:
        assert sorted(listed) == sorted(fields)
    assert len(listed) == len(set(listed))
    assert cli.main([*page.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: cloob {page}")
    assert not re.search(r"None|\{\}|= False|--no-(?!token)|\{\}", shown)
    examples = pages()[page]["examples"]
    assert len(examples) == 3
    for example in examples:
        assert example in shown


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_help_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    ran = []
    for name, module in KINDS.items():
        monkeypatch.setattr(module, "run", lambda options, name=name: ran.append(name))
    for example in pages()[page]["examples"]:
        cli.main(shlex.split(example)[1:])
    assert ran == [page.split()[0]] * 3


def test_the_top_of_a_command_imports_what_a_mistake_needs():
    script = """if True:
        import importlib, pkgutil, sys, cloob.cli, cloob.commands
        for module in pkgutil.iter_modules(cloob.commands.__path__):
            importlib.import_module(f"cloob.commands.{module.name}")
        print(*sys.modules)"""
    modules = set(run_script(script).stdout.split())
    assert "cloob.commands.train" in modules
    assert not modules & HEAVY


def test_the_version_and_the_usage(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cloob {__version__}\n"
    assert cli.main([]) == 2
    assert "usage: cloob COMMAND" in capsys.readouterr().out


def test_sigterm_leaves_no_half_written_folder(tmp_path):
    program = """if True:
        import pathlib, sys, time
        from cloob import cli, files
        from cloob.commands import export
        def run(options):
            with files.whole_folder(options.out) as folder:
                (folder / "weights").write_bytes(bytes(9))
                print("half", flush=True)
                time.sleep(60)
        export.run = run
        sys.exit(cli.main())"""
    words = ["export", "x", "--to", "cloob", "--out", str(tmp_path / "model")]
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        assert list(tmp_path.iterdir())
        process.terminate()
        assert process.wait(30) == 130
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="did you mean train"):
        cli.main(["--debug", "trian"])
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


ENDS = [
    ("serve", KeyboardInterrupt(), 130, "interrupted"),
    (
        "demo",
        KeyboardInterrupt(),
        130,
        "interrupted; the last complete checkpoint stays as it is",
    ),
    (
        "train",
        KeyboardInterrupt(),
        130,
        "interrupted; the last complete checkpoint stays as it is, and --resume",
    ),
    (
        "serve",
        MemoryError(),
        2,
        "out of memory; a smaller --batch-size or fewer --workers need less",
    ),
    (
        "serve",
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        2,
        "out of memory; a smaller ",
    ),
]


@pytest.mark.parametrize(
    ("command", "error", "code", "line"),
    ENDS,
)
def test_an_interruption_and_a_lack_of_memory_are_one_line(
    command, error, code, line, monkeypatch, capsys
):
    monkeypatch.setattr(f"cloob.commands.{command}.run", Mock(side_effect=error))
    assert cli.main([command, *(["x"] if command == "serve" else [])]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"cloob: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("page", PAGES)
def test_the_usage_names_what_must_be_given(page, capsys):
    fields = fields_of(PAGES[page])
    usage = pages()[page]["usage"]
    needed = {name for name, field in fields.items() if field.default is MISSING}
    arguments = pages()[page]["groups"].get("arguments", [])
    assert {*re.findall(r"--(\w+)", usage)} == needed - {*arguments}
    words = re.sub(r"--\w+ \w+|\[options\]", "", usage.removeprefix(page)).split("[")
    assert len(words) > 1 or needed & {*arguments} or not arguments


def test_a_line_of_progress_every_ten_seconds(monkeypatch, capsys):
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 0.0)
    update = console.progress()
    update("runs/[/x]: demo", 1, 2)
    update("runs/[/x]: demo", 2, 2)  # what is done is told by what follows
    assert capsys.readouterr().err == "cloob: runs/[/x]: demo: 1 of 2\n"
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 10.0)
    console.progress()("pictures", 1, 2)
    assert capsys.readouterr().err == ""


def test_what_left_is_answered_with_what_serves_instead():
    script = """if True:
        import sys
        from cloob import cli
        from cloob.commands import removed
        words = [[name, "x"] for name in removed.COMMANDS]
        codes = [cli.main(each) for each in words]
        heavy = ("torch", "pydantic", "numpy")
        print(codes, [name for name in heavy if name in sys.modules])
    """
    done = run_script(script)
    assert done.stdout == f"{[2] * len(removed.COMMANDS)} []\n"
    lines = done.stderr.splitlines()
    for (name, successor), line in zip(removed.COMMANDS.items(), lines, strict=True):
        assert line == f"cloob: cloob {name} is gone; use {successor}"


def test_a_successor_is_a_command_with_such_options(capsys):
    """What the table names is in the help of the command that it names."""
    for sentence in removed.COMMANDS.values():
        for command, option in re.findall(
            r"cloob (\w+)[^,]*? (--[a-z0-9-]+)", sentence
        ):
            assert cli.main([command, "--help"]) == 0
            assert option in capsys.readouterr().out


def test_a_name_that_is_not_utf_8_is_one_line(capsys):
    assert cli.main(["data", "caf\udce9.csv"]) == 2
    assert (
        capsys.readouterr().err
        == "cloob: caf\N{REPLACEMENT CHARACTER}.csv: this name is not UTF-8; rename"
        " it\n"
    )


def test_a_missing_package_is_named_with_the_install_that_brings_it(tmp_path):
    for package, call in (
        ("pydantic", "cloob.cli.main(['train', '--data', 'x'])"),
        ("numpy", "cloob.Index"),
    ):
        code = f"import sys; sys.modules[{package!r}] = None; import cloob.cli; {call}"
        brings = (
            f'{package} is not installed; pip install -e ".[train]" in a clone of cloob'
            " brings it\n"
        )
        assert run_script(code, cwd=tmp_path).stderr.endswith(brings)

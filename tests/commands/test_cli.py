"""The command line as a user meets it: help, one-line errors and exit codes, in real processes where it matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cloob import cli
from support import run_cloob, run_script


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = run_cloob("--help", python=("-X", "importtime"))
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not modules & {"torch", "numpy", "open_clip", "tyro", "rich", "PIL"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from cloob import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cloob {__version__}\n"


def test_no_command_shows_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: cloob COMMAND" in capsys.readouterr().out


def test_what_a_terminal_has_no_letters_for_is_escaped() -> None:
    done = run_cloob("recipes", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u03c4" in done.stdout and "Traceback" not in done.stderr


def test_sigterm_leaves_no_half_written_folder(tmp_path: Path) -> None:
    program = """if True:
        import pathlib, sys, time
        from cloob import cli, files
        from cloob.commands import convert
        def main(words):
            with files.whole_folder(pathlib.Path(words[0])) as folder:
                (folder / "weights").write_bytes(bytes(9))
                print("half", flush=True)
                time.sleep(60)
        convert.main = main
        sys.exit(cli.main())"""
    command = [sys.executable, "-c", program, "convert", str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        assert list(tmp_path.iterdir())
        process.terminate()
        assert process.wait(30) == 130
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback() -> None:
    done = run_cloob("--debug", "trian")
    assert done.returncode != 0 and "Traceback" in done.stderr
    assert "Traceback" not in run_cloob("trian").stderr


def test_ctrl_c_ends_with_130_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(words: object) -> int:
        raise KeyboardInterrupt

    stays = "; the last complete checkpoint stays as it is"
    for command, said in (("models", ""), ("demo", stays), ("train", f"{stays}, and --resume auto goes on from it")):
        monkeypatch.setattr(f"cloob.commands.{command}.main", interrupted)
        assert cli.main([command]) == 130
        assert capsys.readouterr().err == f"cloob: interrupted{said}\n"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("tyro", ["eval", "runs/none"]),
        ("tyro", ["analyze", "runs/none"]),
        ("tyro", ["train", "--data", "x.csv"]),
        ("tyro", ["models"]),
        ("rich", ["analyze", "runs/none"]),
    ],
)
def test_a_missing_package_is_named_with_an_install_that_works_in_a_clone(
    module: str, words: list[str], tmp_path: Path
) -> None:
    script = f"import sys; sys.modules[{module!r}] = None; from cloob import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = run_script(script, *words, cwd=tmp_path)
    said = f'cloob: {module} is not installed; pip install -e ".[train]" in a clone of cloob brings it\n'
    assert done.returncode == 2 and done.stderr == said

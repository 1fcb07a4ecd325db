"""The command line as a user meets it: help, one-line errors and exit codes, in real processes where it matters."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cloob import cli
from support import refused, run_cloob, run_script


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = run_cloob("--help", python=("-X", "importtime"))
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not modules & {"torch", "numpy", "open_clip", "tyro", "rich", "PIL"}


def in_one_process(*commands: list[str]) -> list[tuple[int, str, str, list[str]]]:
    """Exit code, stdout, stderr and the heavy modules there are after each command, one after the other."""
    script = """
import contextlib, io, json, sys
from cloob import cli

told = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(words)
    heavy = [name for name in ("torch", "open_clip") if name in sys.modules]
    told.append((code, out.getvalue(), err.getvalue(), heavy))
print(json.dumps(told))
"""
    done = run_script(script, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout)]


def test_help_of_each_command_needs_no_torch() -> None:
    for command, told in zip(cli.COMMANDS, in_one_process(*([name, "--help"] for name in cli.COMMANDS)), strict=True):
        code, out, _, heavy = told
        assert (code, heavy) == (0, []) and f"usage: cloob {command}" in out, command


def test_help_breaks_where_the_line_is_full() -> None:
    compared = 0
    for _, out, _, _ in in_one_process(*([name, "--help"] for name in cli.COMMANDS)):
        inside = [line[2:-2] for line in out.splitlines() if line.startswith("  ")]  # of boxes whose edges are spaces
        for line, following in itertools.pairwise(inside):
            column = len(following) - len(following.lstrip())
            if column > 2 and re.fullmatch(r"(--?\w.*| *)  \S", line[: column + 1]):  # text above text
                compared += 1
                assert len(line.rstrip()) + 1 + len(following.split()[0]) > len(line), (line, following)
    assert compared > 200


def test_a_mistake_in_the_words_needs_no_torch() -> None:
    mistakes = [
        ["trian"],
        ["train", "--datta", "x"],
        ["train", "--epochs", "3", "demo-clob"],
        ["train", "demo-cloob", "--lr", "fast"],
        ["eval", "x", "--zeroshott", "y"],
        ["analyze", "x", "--limit", "1"],
        ["demo", "--objectives"],
        ["convert", "a"],
        ["export", "a", "b"],
        ["export", "a", "b", "--to", "transformers", "--int8"],
        ["export", "a", "b", "--to", "onnx", "--license", "mine"],
        ["push", "a", "me/b"],
        ["push", "a", "b", "--license", "mit"],
    ]
    for words, told in zip(mistakes, in_one_process(*mistakes), strict=True):
        code, out, err, heavy = told
        assert (code, out, heavy) == (2, "", []), words
        assert err.startswith("cloob: ") and err.count("\n") == 1, words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from cloob import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cloob {__version__}\n"


def test_no_command_shows_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: cloob COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["'trian'", "did you mean train?"]),
        (["train", "--datta", "x"], ["--datta", "did you mean --data?"]),
        (["train"], ["data is missing", "--data demo"]),
        (["train", "--lr", "fast"], ["--lr", "fast"]),
        (["train", "--lr", "-1"], ["lr is -1.0", "a positive number"]),
        (["train", "--objective", "clib"], ["clib", "infoloob", "cloob"]),
        (["train", "--batch-size", "1"], ["batch_size is 1", "2 or more"]),
        (["train", "no-such-recipe"], ["no-such-recipe"]),
        (["train", "--epochs", "3", "demo-clob"], ["unknown recipe 'demo-clob'", "did you mean demo-cloob"]),
        (["train", "--no-flip", "demo-clob"], ["unknown recipe 'demo-clob'"]),
        (["train", "demo-cloob", "--lr", "1", "align"], ["demo-cloob and align", "one recipe"]),
        (["train", "--epochs", "2", "--steps", "5", "demo-cloob"], ["epochs is 2 and steps is 5", "one of them"]),
        (["train", "--samples", "0"], ["samples is 0", "1 or more"]),
        (["train", "--data", "a", "b", "--weights", "1", "2"], ["--weights is called --data-weights now"]),
        (["train", "--weights=1"], ["--weights is called --data-weights now"]),
        (["train", "--config", "nowhere.json"], ["nowhere.json"]),
        (["train", "demo", "--config", "x.json"], ["recipe", "--config"]),
        (["train", "--config"], ["--config needs a file"]),
        (["train", "--data", "nowhere.csv"], ["nowhere.csv", "no such file"]),
        (["train", "--data", "demo", "--model", "ViT-B-23", "--device", "cpu"], ["ViT-B-23", "ViT-B-32"]),
        (["train", "--data", "demo", "--device", "cuda:99"], ["cuda"]),
        (["eval"], ["no model given"]),
        (["eval", "runs/x"], ["nothing to evaluate on"]),
        (["eval", "nowhere", "--zeroshot", "nowhere-either"], ["nowhere-either"]),
        (["eval", "nowhere", "--zeroshot", "demo:noto-emoji"], ["nowhere"]),
        (["eval", "x", "--zeroshot", "demo:noto-emoji", "--device", "gpu"], ["device is 'gpu'", "cuda:N"]),
        (["eval", "x", "--zeroshot", "demo:noto-emoji", "--batch-size", "0"], ["--batch-size is 0", "1 or more"]),
        (["eval", "x", "--zeroshot", "demo:noto-emoji", "--workers", "-1"], ["--workers is -1", "0 or more"]),
        (["analyze", "x", "--batch-size", "0"], ["--batch-size is 0", "1 or more"]),
        (["analyze", "x", "--workers", "-1"], ["--workers is -1", "0 or more"]),
        (["analyze", "x", "--device", "gpu"], ["device is 'gpu'", "cuda:N"]),
        (["models", "--contains", "ViT-B-23"], ["ViT-B-23"]),
        (["demo", "--objectives", "cloob", "cloob"], ["objectives"]),
        (["demo", "--objectives"], ["objectives"]),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    words: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *words)
    for part in parts:
        assert part in line


def test_an_unknown_key_of_a_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"optim": {"learning_rate": 1e-3}}')
    line = refused(capsys, "train", "--config", str(file))
    assert str(file) in line and "optim.learning_rate" in line


def test_a_missing_column_lists_those_that_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("path\tcaption\na.png\ta cat\nb.png\ta dog\n")
    line = refused(capsys, "train", "--data", str(table), "--model", "tiny-vit", "--out", str(tmp_path / "run"))
    assert "filepath" in line and "path" in line and "caption" in line


def test_a_folder_that_cannot_be_written_is_named_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert cli.main(["demo", "--from-scratch", "--out", str(blocked / "demo"), "--device", "cpu"]) == 2
    begins, line = capsys.readouterr().err.splitlines()
    assert begins.endswith("loading …") and line.startswith(f"cloob: {blocked / 'demo'}: ")


def test_a_demo_that_is_stopped_does_not_begin_the_next_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    asked: list[object] = []

    def stopped(config: object, **_: object) -> object:
        asked.append(config)
        return types.SimpleNamespace(stopped="SIGTERM")

    monkeypatch.setattr("cloob.commands.work.demo.train", stopped)
    assert cli.main(["demo", "--from-scratch", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 1
    assert len(asked) == 1 and "was stopped by SIGTERM" in capsys.readouterr().err


def test_what_a_terminal_has_no_letters_for_is_escaped() -> None:
    done = run_cloob("recipes", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u03c4" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("encoding", "errors", "written"),
    [
        ("utf-8", "strict", b"caf\\udce9"),
        ("ascii", "strict", b"caf\\udce9"),
        ("utf-8", "surrogateescape", b"caf\xe9"),  # a locale that writes names as they are
    ],
)
def test_a_name_that_is_not_utf8_can_be_printed(
    encoding: str, errors: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(words: object) -> int:
        print("caf\udce9", end="", flush=True)
        return 0

    out = io.BytesIO()
    monkeypatch.setattr("cloob.commands.models.main", show)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, errors))
    assert cli.main(["models"]) == 0
    assert out.getvalue() == written


def test_a_file_whose_name_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    table = tmp_path / "caf\udce9.csv"
    table.write_text("filepath,title\na.png,a\n", encoding="utf-8")
    done = run_cloob("data", str(table))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "caf\\udce9.csv: this name is not" in done.stderr


def test_what_is_left_out_is_no_choice() -> None:
    done = run_cloob("export", "runs/x", "there", "--to", "tensorflow")
    assert done.returncode == 2 and "'torch-export'" in done.stderr and "None" not in done.stderr


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

"""The command line: the sub-commands, and how an error reaches the person who typed
one.

A command is a module of ``cloob.commands``: ``Options`` (a dataclass), and
``run(options)``, which refuses mistakes, then imports what is heavy, and returns the
exit code: help and mistakes are instant.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cloob import __version__
from cloob.commands.removed import refuse_command
from cloob.errors import (
    InputError,
    TrainingFailed,
    message,
    nearest,
    needs,
    out_of_memory,
    printable,
)

COMMANDS = (
    "demo",
    "train",
    "data",
    "eval",
    "match",
    "find",
    "index",
    "search",
    "classify",
    "embed",
    "serve",
    "export",
)
_STAYS = "; the last complete checkpoint stays as it is"
_KEPT = {"demo": _STAYS, "train": f"{_STAYS}, and --resume auto goes on from it"}
_USAGE = """usage: cloob COMMAND [options]      (cloob COMMAND --help)

Train, judge and use image-text models by CLOOB (arXiv:2110.11316).

{}
  --version  the version
  --debug    show the traceback of an error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of these words, or of the process; 0 done, 1 failed, 2 the
    user's mistake, 130 interrupted.
    """
    _print_any_text()
    typed = sys.argv[1:] if argv is None else argv
    debug = "--debug" in typed
    name, words = _command_of(typed)
    if argv is None:
        _prepare_process(name)
    try:
        return _run(name, words)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except BrokenPipeError:
        # the reader of our output has left; Python would complain at exit
        sys.stderr.close()
        return 1
    except (KeyboardInterrupt, Exception) as error:
        line, code = _line_and_code(error, name)
        if debug or not line:
            raise
        print(f"cloob: {line}", file=sys.stderr)
        return code


def _print_any_text() -> None:
    """Lets stdout print what its encoding lacks, as stderr does."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        return
    if out.encoding.lower() != "utf-8" or out.errors == "strict":
        out.reconfigure(errors="backslashreplace")


def _command_of(typed: Sequence[str]) -> tuple[str, list[str]]:
    """The name of a command, empty where there is none, and its words."""
    words = [_expand_home(word) for word in typed if word != "--debug"]
    return (words[0], words[1:]) if words else ("", [])


def _expand_home(word: str) -> str:
    """``--out=~/x`` with the home folder, which shells leave as it is."""
    option, _, value = word.partition("=")
    if option.startswith("--") and value.startswith("~/"):
        return f"{option}={os.path.expanduser(value)}"  # noqa: PTH111
    return word


def _prepare_process(name: str) -> None:
    """Sets how the process of a command ends."""
    # At its end Python takes 0.3 s to look through all that was imported. With triton's
    # modules it has to: they list every object that nobody collected as a leak.
    atexit.register(lambda: None if "triton" in sys.modules else gc.freeze())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if name in ("export", "match"):
        # as Ctrl-C: half-written files are removed
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _interrupt(*_: object) -> None:
    """Ctrl-C ends the command; another one does not break off its clean-up, unless that
    takes five seconds.
    """
    first = time.monotonic()

    def again(*_: object) -> None:
        if time.monotonic() - first > 5:
            os._exit(130)

    signal.signal(signal.SIGINT, again)
    raise KeyboardInterrupt


def _run(name: str, words: Sequence[str]) -> int:
    """Runs one command, or prints the help or the version."""
    if name in ("", "-h", "--help", "help"):
        print(_USAGE.format("".join(map(_help_line, COMMANDS))))
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"cloob {__version__}")
        return 0
    for word in words:
        if word.encode("utf-8", "ignore").decode() != word:
            raise InputError(f"{printable(word)}: this name is not UTF-8; rename it")
    if name not in COMMANDS:
        refuse_command(name)
        raise InputError(
            f"no command {name!r}; {nearest(name, COMMANDS)} (cloob --help)"
        )
    with needs("train"):
        from cloob.commands.options import run_command

        logging.basicConfig(format="cloob: %(message)s")
        return run_command(name, words)


def _help_line(name: str) -> str:
    """The line of a command in the help: the first sentence of its file."""
    file = Path(__file__).parent / "commands" / f"{name}.py"
    sentence = file.read_text(encoding="utf-8").partition("``: ")[2].partition(".")[0]
    return f"  {name:<8}  {' '.join(sentence.split())}\n"


def _line_and_code(error: BaseException, name: str) -> tuple[str, int]:
    """What an error says in one line, and the exit code; no line where it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{_KEPT.get(name, '')}", 130
    if isinstance(error, TrainingFailed):
        return message(error), 1
    if isinstance(error, InputError | OSError):
        return message(error), 2
    if isinstance(error, MemoryError | RuntimeError) and out_of_memory(error):
        return "out of memory; a smaller --batch-size or fewer --workers need less", 2
    return "", 1

"""The command line: the sub-commands, and how an error reaches the person who typed
one.

A command is a module of ``cloob.commands``: ``Options`` (a dataclass), and
``run(options)``, which refuses mistakes, then imports what is heavy, and returns the
exit code: help and mistakes are instant.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cloob import __version__
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
    "demo", "train", "recipes", "data", "eval", "analyze", "find", "index", "search", "classify", "embed", "serve",
    "convert", "export", "push", "models",
)  # fmt: skip
_USAGE = """usage: cloob COMMAND [options]      (cloob COMMAND --help)

Train, judge and use image-text models by CLOOB (arXiv:2110.11316).

{}
  --version  the version
  --debug    show the traceback of an error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of these words, or of the process; 0 done, 1 failed, 2 the
    user's mistake, 130 interrupted.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (
        out.encoding.lower() != "utf-8" or out.errors == "strict"
    ):
        out.reconfigure(errors="backslashreplace")  # as stderr has it
    words = list(sys.argv[1:] if argv is None else argv)
    for place, word in enumerate(words):
        option, _, value = word.partition("=")
        if option.startswith("--") and value.startswith(
            "~/"
        ):  # which shells leave as it is
            words[place] = f"{option}={os.path.expanduser(value)}"  # noqa: PTH111
    debug = "--debug" in words
    name, *words = [word for word in words if word != "--debug"] or [""]
    if argv is None:
        # At its end Python takes 0.3 s to look through all that was imported. With
        # triton's modules it has to: they list every object that nobody collected as a
        # leak.
        atexit.register(lambda: None if "triton" in sys.modules else gc.freeze())
        if name in ("convert", "export", "push"):
            signal.signal(
                signal.SIGTERM, signal.default_int_handler
            )  # as Ctrl-C: half-written folders are removed
    try:
        if name in ("", "-h", "--help", "help"):
            rows = ""
            for known in COMMANDS:  # the first line of its file is its help
                text = (
                    Path(__file__)
                    .with_name("commands")
                    .joinpath(f"{known}.py")
                    .read_text(encoding="utf-8")
                )
                rows += f"  {known:<8}  {text.partition('``: ')[2].partition('.')[0]}\n"
            print(_USAGE.format(rows))
            return 0 if name else 2
        if name in ("-V", "--version"):
            print(f"cloob {__version__}")
            return 0
        for word in words:
            if word.encode("utf-8", "ignore").decode() != word:
                raise InputError(
                    f"{printable(word)}: this name is not UTF-8; rename it"
                )
        if name not in COMMANDS:
            raise InputError(
                f"no command {name!r}; {nearest(name, COMMANDS)} (cloob --help)"
            )
        with needs("train"):
            from cloob.commands.console import parse  # tyro

            command = importlib.import_module(f"cloob.commands.{name}")
            read = getattr(command, "read", None)
            options = (
                read(words) if read else parse(command.Options, words, f"cloob {name}")
            )
            logging.basicConfig(format="cloob: %(message)s")
            if hasattr(options, "machine"):
                options.machine.use()
            code: int = command.run(options)
            return code
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except BrokenPipeError:
        # the reader of our output has left; Python would complain at exit
        sys.stderr.close()
        return 1
    except (KeyboardInterrupt, InputError, OSError, TrainingFailed) as error:
        if debug:
            raise
        if not isinstance(error, KeyboardInterrupt):
            print(f"cloob: {message(error)}", file=sys.stderr)
            return 1 if isinstance(error, TrainingFailed) else 2
        kept = (
            "; the last complete checkpoint stays as it is"
            if name in ("train", "demo")
            else ""
        )
        kept += ", and --resume auto goes on from it" if name == "train" else ""
        print(f"cloob: interrupted{kept}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if debug or not out_of_memory(error):
            raise
        print(
            "cloob: out of memory; a smaller --batch-size or fewer --workers need less",
            file=sys.stderr,
        )
        return 2

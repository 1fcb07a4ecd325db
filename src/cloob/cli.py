"""The command line: the sub-commands, and how an error reaches the person who typed one.

A command is a module of ``cloob.commands``: ``Options`` (a dataclass), and ``run(options)``, which refuses mistakes,
then imports what is heavy, and returns the exit code: help and mistakes are instant.
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

from cloob import __version__
from cloob.errors import InputError, TrainingFailed, message, nearest, needs, out_of_memory, printable

COMMANDS = {
    "demo": "train CLIP, InfoLOOB and CLOOB on a set that comes along, and search its pictures",
    "train": "train on your own image-caption pairs, or a named recipe",
    "recipes": "list the named training set-ups",
    "data": "look at a data set: what is in it, what is bad, what is there twice; count shards",
    "eval": "zero-shot classification, linear probes, retrieval and geometry of one or several models",
    "analyze": "geometry of the embeddings, over a run's checkpoints too; similar pictures and duplicates",
    "find": "find pictures below a folder in one command: index what is new, then search",
    "index": "index a collection of pictures, or bring an index up to date",
    "search": "find pictures of an index by words and pictures; duplicates",
    "classify": "sort pictures by the names of classes, or by a few examples of each",
    "embed": "write the vectors of pictures into one file",
    "serve": "an index in the browser: search, sort, wander; and its API",
    "convert": "write other people's weights as a model folder",
    "export": "write a model for transformers, sentence-transformers or ONNX",
    "push": "push a model to the Hugging Face hub, with a card written from its run",
    "models": "list the towers by name",
}
DOCS = ""  # the address of the documentation, once there is one
_ROWS = "\n".join(f"  {name:<8}  {what}" for name, what in COMMANDS.items())
_USAGE = f"""usage: cloob COMMAND [options]      (cloob COMMAND --help)

Train, judge and use image-text models by CLOOB (arXiv:2110.11316).

{_ROWS}

  --version  the version
  --debug    show the traceback of an error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of these words, or of the process; 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (out.encoding.lower() != "utf-8" or out.errors == "strict"):
        out.reconfigure(errors="backslashreplace")  # as stderr has it
    words = list(sys.argv[1:] if argv is None else argv)
    for place, word in enumerate(words):
        option, _, value = word.partition("=")
        if option.startswith("--") and value.startswith("~/"):  # which shells leave as it is
            words[place] = f"{option}={os.path.expanduser(value)}"  # noqa: PTH111
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = words[0] if words else ""
    if argv is None:
        # At its end Python takes 0.3 s to look through all that was imported. With triton's modules it has to: they
        # list every object that nobody collected as a leak.
        atexit.register(lambda: None if "triton" in sys.modules else gc.freeze())
        if name in ("convert", "export", "push"):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: half-written folders are removed
    try:
        return _run(name, words[1:])
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; Python would complain at exit
        return 1
    except (KeyboardInterrupt, InputError, OSError, TrainingFailed) as error:
        if debug:
            raise
        if not isinstance(error, KeyboardInterrupt):
            print(f"cloob: {message(error)}", file=sys.stderr)
            return 1 if isinstance(error, TrainingFailed) else 2
        kept = "; the last complete checkpoint stays as it is" if name in ("train", "demo") else ""
        kept += ", and --resume auto goes on from it" if name == "train" else ""
        print(f"cloob: interrupted{kept}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if debug or not out_of_memory(error):
            raise
        print("cloob: out of memory; a smaller --batch-size or fewer --workers need less", file=sys.stderr)
        return 2


def _run(name: str, words: list[str]) -> int:
    if name in ("", "-h", "--help", "help"):
        print(_USAGE, f"\nDocumentation: {DOCS}" if DOCS else "", sep="\n" if DOCS else "")
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"cloob {__version__}")
        return 0
    for word in words:
        if word.encode("utf-8", "ignore").decode() != word:
            raise InputError(f"{printable(word)}: this name is not UTF-8; rename it")
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}; {nearest(name, COMMANDS)} (cloob --help)")
    with needs("train"):
        from cloob.commands.console import parse  # tyro

        command = importlib.import_module(f"cloob.commands.{name}")
        options = command.read(words) if hasattr(command, "read") else parse(command.Options, words, f"cloob {name}")
        logging.basicConfig(format="cloob: %(message)s")
        if hasattr(options, "machine"):
            options.machine.use()
        code: int = command.run(options)
    return code

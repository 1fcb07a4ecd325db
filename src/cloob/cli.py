"""The command line: which sub-commands there are, and how an error reaches the person who typed one.

Nothing heavy is imported before a command's arguments are known to be right.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from cloob import __version__
from cloob.errors import InputError, TrainingFailed, install, message, nearest

COMMANDS = {
    "demo": "train CLIP, InfoLOOB and CLOOB on a set that comes along, and search its pictures",
    "train": "train on your own image-caption pairs, or a named recipe",
    "recipes": "list the named training set-ups",
    "data": "look at a data set: what is in it, what is bad, what is there twice; count shards",
    "eval": "zero-shot classification, linear probes, retrieval and geometry of one or several models",
    "analyze": "geometry of the embeddings, over a run's checkpoints too; similar pictures and duplicates",
    "index": "index a collection of pictures, or bring an index up to date",
    "search": "find pictures of an index by words and pictures; duplicates",
    "classify": "sort pictures by the names of classes, or by a few examples of each",
    "embed": "write the vectors of pictures into one file",
    "serve": "an index in the browser: search, sort, wander; and its API",
    "convert": "write other people's weights as a model folder",
    "export": "write a model for transformers, sentence-transformers, ONNX or torch.export",
    "push": "push a model to the Hugging Face hub, with a card written from its run",
    "models": "list the towers by name",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after ``cloob``; those of the process if None.

    Returns:
        The exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (out.encoding.lower() != "utf-8" or out.errors == "strict"):
        # As stderr has it: UTF-8 has no letters for the bytes of some names. A locale that writes them as they are may.
        out.reconfigure(errors="backslashreplace")
    if argv is None:
        atexit.register(gc.freeze)  # else Python looks through all that was imported once more, for 0.3 s
    words = [_at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if argv is None and words[:1] in (["convert"], ["export"], ["push"]):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: half-written folders are removed
    try:
        return _dispatch(words)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except KeyboardInterrupt:
        if debug:
            raise
        kept = "; the last complete checkpoint stays as it is" if words[:1] in (["train"], ["demo"]) else ""
        kept += ", and --resume auto goes on from it" if words[:1] == ["train"] else ""
        print(f"cloob: interrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # Whoever read our output has left; Python would complain at exit.
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if debug or package in ("", "cloob"):
            raise
        print(f"cloob: {package} is not installed; {install('train')} brings it", file=sys.stderr)
        return 2
    except UnicodeEncodeError:
        odd = [word for word in words if not _is_utf8(word)]
        if debug or not odd:
            raise
        print(
            f"cloob: {odd[0]}: this name is not UTF-8, and what reads the file takes no other; rename it",
            file=sys.stderr,
        )
        return 2
    except (InputError, OSError, TrainingFailed) as error:
        if debug:
            raise
        print(f"cloob: {message(error)}", file=sys.stderr)
        return 1 if isinstance(error, TrainingFailed) else 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"cloob {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}; {nearest(name, COMMANDS)} (cloob --help)")
    result: int = importlib.import_module(f"cloob.commands.{name}").main(rest)
    return result


def _at_home(word: str) -> str:
    """A word with ``~/`` at its start, or after ``--option=``, as the home folder: shells leave the second as it is."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    home = os.path.expanduser("~") if value.startswith("~/") else ""  # noqa: PTH111
    return f"{option}{equals}{home}{value.removeprefix('~') if home else value}"


def _is_utf8(word: str) -> bool:
    return word.encode("utf-8", "ignore").decode() == word


def usage() -> str:
    """The text of ``cloob --help``."""
    rows = "\n".join(f"  {name:<8}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: cloob COMMAND [options]      (cloob COMMAND --help)\n\n"
        "Train, judge and use image-text models by CLOOB (arXiv:2110.11316).\n\n"
        f"{rows}\n\n  --version  the version\n  --debug    show the traceback of an error"
    )


if __name__ == "__main__":
    sys.exit(main())

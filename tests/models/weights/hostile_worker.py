"""Loads a list of files, each within its memory, in a process of its own; prints what became of each."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path

from cloob import load_model
from cloob.errors import InputError

_PAGE = resource.getpagesize()


def _used() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE


def _load(source: str, megabytes: int, file_size: int) -> dict[str, object]:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_used() + (megabytes << 20) + file_size, hard))
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_model(source)
        outcome, said = "loaded", ""
    except InputError as error:
        outcome, said = "refused", str(error)
    except BaseException as error:
        outcome, said = "crashed", f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return {"outcome": outcome, "said": said, "seconds": time.perf_counter() - start}


def main() -> None:
    """Warms up by the first source, which is a control, then takes each in turn."""
    cases = json.load(sys.stdin)
    for source, _, _ in cases:
        if Path(source).name.startswith("warm"):
            load_model(source)
    print(json.dumps({source: _load(source, megabytes, size) for source, megabytes, size in cases}))


if __name__ == "__main__":
    main()

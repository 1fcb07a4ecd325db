"""What loading crowsonkb's and rinna's weights does beyond reading bytes, and what each part of that takes.

A file of benchmarks/weights.py is loaded again and again in one process, as it is and with one part left out, in turn;
what a part takes is the median of the differences to the load as it is. Run on one thread, as that benchmark is.

    OMP_NUM_THREADS=1 python benchmarks/weights_parts.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import weights as loading

OF_FAMILY = {
    "crowsonkb": ("all values finite?", "matrices turned", "tokenizer"),
    "rinna": ("all values finite?", "checksums of the zip archive"),
}


def parts() -> dict[str, list[Any]]:
    """Each part, and what leaves it out."""
    from cloob.models.weights import crowsonkb, keymap
    from cloob.models.weights.formats import archive

    def view(part: Any, value: Any) -> Any:
        value = value.reshape(value.shape[part.lead :])
        return value if part.permute is None else value.permute(part.permute)

    return {
        "all values finite?": [patch.object(keymap, "_is_finite", lambda value: True)],
        "matrices turned": [patch.object(keymap.Part, "turned", view)],
        "tokenizer": [patch.object(crowsonkb, "clip_tokenizer", lambda *_: lambda texts: texts)],
        "checksums of the zip archive": [patch.object(archive, "_check_crc", lambda *_: None)],
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    loading.import_all()
    for family in ("crowsonkb", "rinna"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(loading.WRITERS[family](Path(folder))["path"])
            print(f"{family}: {measure(family, path, arguments.rounds)}", flush=True)


def measure(family: str, path: Path, rounds: int) -> dict[str, float]:
    """Median seconds of the load, of the bare reader, and of each part."""
    seconds: dict[str, list[float]] = {"all": [], "bare reader": []}
    for number in range(rounds + 1):
        row = {"all": timed(loading.load_by_cloob, path, []), "bare reader": timed(loading.LOADERS[family], path, [])}
        for name, patches in parts().items():
            if name not in OF_FAMILY[family]:
                continue
            row[name] = row["all"] - timed(loading.load_by_cloob, path, patches)
        for name, value in row.items() if number else ():
            seconds.setdefault(name, []).append(value)
    return {name: round(statistics.median(values), 2) for name, values in seconds.items()}


def timed(load: Callable[[Path], Any], path: Path, patches: list[Any]) -> float:
    """Seconds of one load."""
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        start = time.perf_counter()
        load(path)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""``cloob convert``: other people's weights into a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloob.commands.arguments import parse
from cloob.errors import InputError
from cloob.files import check_replaceable
from cloob.models.runs import ALIGNED_FILE, CONFIG_FILE, TOWERS_FILE
from cloob.models.source import check_not_source


@dataclass(frozen=True)
class _Options:
    """Write a model as a model folder: SRC is whatever --init and `cloob eval` take, DEST is made.

    Where the towers are open_clip's, DEST is a `local-dir:` folder of open_clip as well.
    """

    overwrite: bool = False
    """Replace DEST where it is a model folder already."""


def main(words: Sequence[str]) -> int:
    """Converts one model; nothing is written to DEST when SRC is refused."""
    places = [word for word in words if not word.startswith("-")]
    options = parse(_Options, [word for word in words if word.startswith("-")], "cloob convert", usage="SRC DEST")
    if len(places) != 2:
        raise InputError(f"SRC and DEST are wanted, {len(places)} given (cloob convert --help)")
    source, target = places[0], Path(places[1])
    _check_target(source, target, overwrite=options.overwrite)
    from cloob.commands.work.convert import run  # torch: only for words that are right

    return run(source, target)


def _check_target(source: str, target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    check_replaceable(target)
    names = (CONFIG_FILE, TOWERS_FILE, ALIGNED_FILE)
    if not target.is_dir() or (not any((target / name).is_file() for name in names) and any(target.iterdir())):
        raise InputError(f"{target}: exists and is no model folder; give another place")
    check_not_source(source, target)
    if not overwrite and any(target.iterdir()):
        raise InputError(f"{target}: exists; --overwrite replaces it")

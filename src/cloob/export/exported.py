"""An export: its description, its place, its packages. No torch here."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.errors import InputError
from cloob.files import check_replaceable
from cloob.models.runs import OBJECTIVE_FILE
from cloob.models.source import ModelSource

if TYPE_CHECKING:
    from cloob.models.tokenizer import TokenizerSettings

CARD_FILE = "README.md"


class Unsupported(InputError):  # noqa: N818
    """A model that the other program has no place for."""


@dataclass(frozen=True)
class Exported:
    """An export as the model card and the command line describe it."""

    library: str  # the library_name of the hub's metadata
    summary: str  # one clause for the command line: who reads the folder
    usage: str  # Markdown: how to use the folder, with code; DIR stands for the folder
    # the card's list "What to know": what differs from the model here, figures
    notes: tuple[str, ...]
    tags: tuple[str, ...]


def usage_of(name: str) -> str:
    """How to use an export, as Markdown for its card; DIR stands for the folder."""
    return (Path(__file__).parent / "usage" / f"{name}.md").read_text(encoding="utf-8")


def tokenizer_note(settings: TokenizerSettings) -> str:
    """A sentence for people who use the folder without this package: how its tokens
    differ from the model's.
    """
    file = Path(__file__).parent / "usage" / "tokenizer.json"
    notes = json.loads(file.read_text(encoding="utf-8"))
    kind: str = settings["kind"]
    if kind == "clip":
        kind = f"clip {settings['ending']}"
    elif settings.get("clean"):
        kind = "json clean"
    return str(notes[kind]).format(**settings)


def write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def check_target(
    source: str,
    target: Path,
    kind: str,
    is_kind: Callable[[Path], bool],
    *,
    overwrite: bool,
) -> None:
    """Raises InputError for a target that is of no such kind, holds the source, or
    cannot be replaced.
    """
    if not target.exists():
        return
    check_replaceable(target)
    filled = not target.is_dir() or any(target.iterdir())
    if filled and not is_kind(target):
        raise InputError(f"{target}: exists and is no {kind}; give another place")
    place = ModelSource.parse(source).path
    if place is not None and _is_in(place, target):
        raise InputError(f"{target}: is where the model comes from; give another place")
    if filled and not overwrite:
        raise InputError(f"{target}: exists; --overwrite replaces it")


def _is_in(place: Path, folder: Path) -> bool:
    return place.exists() and place.resolve().is_relative_to(folder.resolve())


def is_export(folder: Path) -> bool:
    return (folder / CARD_FILE).is_file() and (folder / OBJECTIVE_FILE).is_file()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what exporters and readers print, warn of and log off the terminal."""
    disabled, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

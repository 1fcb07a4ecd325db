"""What an exporter says of the folder that it wrote, and where it may write one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloob.errors import InputError
from cloob.files import check_replaceable
from cloob.models.names import check_not_source
from cloob.models.runs import OBJECTIVE_FILE

CARD_FILE = "README.md"


class Unsupported(InputError):  # noqa: N818 (what the model is, in the words a user reads)
    """A model that the other program has no place for; the line names what to export to instead."""


@dataclass(frozen=True)
class Exported:
    """What the model card and the command line say of an export.

    Attributes:
        library: The ``library_name`` of the hub's metadata: ``"transformers"``, ``"onnx"``, …
        summary: One clause for the command line: what the folder is and who reads it.
        usage: Markdown: how to use the folder, with code; ``DIR`` stands for the folder.
        notes: Sentences of the card's list "What to know": what differs from the model here, figures.
        tags: More tags for the hub.
    """

    library: str
    summary: str
    usage: str
    notes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def check_target(source: str, target: Path, *, overwrite: bool) -> None:
    """Refuses a target that holds something else, would replace what is exported, or cannot be replaced itself.

    Args:
        source: What ``load_model`` takes.
        target: Where the export is to go.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        InputError: The line says why.
    """
    if not target.exists():
        return
    check_replaceable(target)
    if not target.is_dir() or (any(target.iterdir()) and not is_export(target)):
        raise InputError(f"{target}: exists and is no export; give another place")
    check_not_source(source, target)
    if any(target.iterdir()) and not overwrite:
        raise InputError(f"{target}: exists; --overwrite replaces it")


def is_export(folder: Path) -> bool:
    """Whether a folder is what ``cloob export`` wrote: each has a card and the objective's settings."""
    return (folder / CARD_FILE).is_file() and (folder / OBJECTIVE_FILE).is_file()

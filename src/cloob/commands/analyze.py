"""``cloob analyze``: how the embeddings of runs lie on the sphere, at the end and over their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cloob.commands.arguments import CacheArguments, check_amounts, parse
from cloob.errors import InputError, require

if TYPE_CHECKING:
    import tyro
else:  # the annotations below are read when the words are parsed
    tyro = require("tyro", "train")


@dataclass(frozen=True)
class AnalyzeArguments:
    """Geometry of models on image-caption pairs, effective eigenvalues by epoch, similar pictures and duplicates."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (all their checkpoints count), checkpoint or model folders, open_clip NAME/TAG, hf-hub:…"""
    pairs: str = "demo:val"
    """Image-caption pairs to measure on: what `cloob eval --retrieval` reads (of several captions the first)."""
    limit: int = 10_000
    """Pairs whose geometry is measured at most; similar pictures and duplicates are sought among all of them, in time
    that grows with their square."""
    similar: int = 20
    """Most similar pictures to list for each model."""
    duplicate: float = 0.999
    """Cosine from which two pictures count as one."""
    out: Path = Path("runs/analyze")
    """Folder of analysis.json and report.html."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    batch_size: int = 256
    """Images or texts a forward pass."""
    workers: int = 2
    """Decoding threads."""
    cache: CacheArguments = field(default_factory=CacheArguments)


def main(words: Sequence[str]) -> int:
    """Analyses; exit code 1 when a checkpoint could not be measured, with what there is written."""
    arguments = parse(AnalyzeArguments, words, "cloob analyze")
    if not arguments.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob analyze --help)")
    if not 0 < arguments.duplicate <= 1:
        raise InputError(f"duplicate is {arguments.duplicate}; a cosine above 0 and up to 1 is wanted")
    if arguments.similar < 0 or arguments.limit < 2:
        raise InputError("similar must be 0 or more, and limit 2 or more")
    check_amounts(arguments.batch_size, arguments.workers)
    arguments.cache.use()
    from cloob.commands.work.analyze import run  # torch: only for words that are right

    return run(arguments)
